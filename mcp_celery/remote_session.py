"""What one connection knows of its session at the server: the ID, what was negotiated, and whether it is lost."""

from collections.abc import Mapping
from typing import Any

import httpx2
from mcp.shared.message import ClientMessageMetadata
from mcp_types import JSONRPCError

from .exceptions import SessionLostError, TransportError
from .handle import SessionHandle, short_hash
from .http import Endpoint

SESSION_HEADER = "mcp-session-id"
VERSION_HEADER = "mcp-protocol-version"
ACCEPT = {"accept": "application/json, text/event-stream"}

#: Longer `instructions` do not travel in a handle, which goes into every message of a workflow.
MAX_INSTRUCTIONS = 512
#: "Server error" of JSON-RPC 2.0, which TypeScript servers give with a 400 for a session that they do not know.
_SERVER_ERROR = -32000


class RemoteSession:
    """The session behind an endpoint (MCP 2025-11-25, Transports, Session Management).

    Attributes:
        endpoint: Where it lives.
        session_id: None before `initialize` was answered, after the end or loss, and for a server that gives none.
        version: The negotiated protocol version; None in the stateless era.
        negotiated: What `initialize` or `server/discover` gave, as far as it travels in a handle.
        is_resumed: Whether it came with a handle.
        lost: The error that every request gets once the server has disowned the session.
    """

    def __init__(self, endpoint: Endpoint, handle: SessionHandle | None) -> None:
        self.endpoint = endpoint
        self.session_id = handle.session_id if handle else None
        self.version = handle.protocol_version if handle else None
        self.negotiated: Mapping[str, Any] | None = handle.negotiated if handle else None
        self.is_resumed = handle is not None
        self.lost: SessionLostError | None = None
        self._is_shared = handle.shared if handle else False

    @property
    def handle(self) -> SessionHandle | None:
        """What another process needs to continue: None before the handshake and once the session has ended."""
        if self.negotiated is None or self.lost is not None:
            return None
        endpoint = self.endpoint
        return SessionHandle(endpoint.name, self.session_id, self.negotiated, dict(endpoint.cookies), self._is_shared)

    def headers(self, metadata: ClientMessageMetadata | None = None) -> dict[str, str]:
        """Return the headers of a request in the session, with those that *metadata* asks for."""
        headers = dict(ACCEPT)
        if self.session_id is not None:
            headers[SESSION_HEADER] = self.session_id
        if self.version is not None:
            headers[VERSION_HEADER] = self.version
        if metadata is not None and metadata.headers:
            headers.update({name.lower(): value for name, value in metadata.headers.items()})
        return headers

    def take_id(self, response: httpx2.Response) -> None:
        """Take the session ID from the response to `initialize`."""
        self.session_id = response.headers.get(SESSION_HEADER) or None

    def take_handshake(self, result: Mapping[str, Any]) -> None:
        """Take the result of `initialize`, or of `server/discover`, which states no version."""
        version = result.get("protocolVersion")
        self.version = version if isinstance(version, str) else None
        self.negotiated = _portable(result)

    def end(self) -> None:
        """Note that the session was ended at the server."""
        self.session_id = self.negotiated = None

    def is_loss(self, status: int, refusal: JSONRPCError | None) -> bool:
        """Whether a refusal says that the server no longer knows the session.

        Also true once it is lost: the requests under way all hear of it, and each is told the same.
        """
        return (self.session_id is not None or self.lost is not None) and _tells_loss(status, refusal)

    def lose(self, status: int) -> SessionLostError:
        """Note that the session is lost, and return the error to raise."""
        if self.lost is None:
            session = short_hash(self.session_id or "")
            self.lost = SessionLostError(
                f"Server {self.endpoint.name!r} no longer knows session {session} (HTTP {status}): it was restarted or "
                "dropped the session as idle. What the session held is gone; open() starts another",
                self.endpoint.name,
                session,
                status,
            )
            self.session_id = None
        return self.lost

    def failure(self, what: str, status: int | None = None, *, cancelled: bool = False) -> TransportError:
        """Return the error which says that the server *what*."""
        name = self.endpoint.name
        return TransportError(f"Server {name!r} {what}", name, status, cancelled=cancelled)


def _tells_loss(status: int, error: JSONRPCError | None) -> bool:
    """Whether a refusal says that the session is unknown (MCP 2025-11-25, Transports, Session Management: 404).

    By the status, not the code: Python servers give -32600 with the 404, and TypeScript's -32001 is also its timeout.
    Servers written after the TypeScript examples answer 400, with an error that is to no request or with none.
    """
    if status == httpx2.codes.NOT_FOUND:
        return True
    if status != httpx2.codes.BAD_REQUEST:
        return False
    return error is None or (error.id is None and error.error.code == _SERVER_ERROR)


def _portable(result: Mapping[str, Any]) -> dict[str, Any]:
    """What of a negotiated result travels in a handle: all but what is large and for show."""
    portable = {key: value for key, value in result.items() if key != "instructions"}
    instructions = result.get("instructions")
    if isinstance(instructions, str) and len(instructions) <= MAX_INSTRUCTIONS:
        portable["instructions"] = instructions
    info = result.get("serverInfo")
    if isinstance(info, Mapping):
        portable["serverInfo"] = {key: info[key] for key in ("name", "version", "title") if key in info}
    return portable
