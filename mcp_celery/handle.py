"""The session handle: what has to travel for another process to continue an MCP session.

A frozen value and its JSON form. No I/O, and nothing of the MCP SDK, so that a process which only publishes tasks can
read and write handles.
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Self

from .exceptions import SessionHandleError

VERSION = 1


def short_hash(session_id: str) -> str:
    """Return the first 8 hex digits of the SHA-256 of *session_id*: the only form that may be shown."""
    return _hash(session_id)[:8]


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def server_name(server: str) -> str:
    """Return what handles call *server*: the name itself, or the URL without the parts where secrets stand."""
    return without_secrets(server)


def without_secrets(uri: str) -> str:
    """Return *uri* without user name, password, query and fragment; what is none, as it is."""
    scheme, separator, rest = uri.partition("://")
    if not separator:
        return uri
    place = rest.partition("#")[0].partition("?")[0]
    authority, slash, path = place.partition("/")
    return f"{scheme}://{authority.rpartition('@')[2]}{slash}{path}"


def _checksum(body: Mapping[str, Any]) -> str:
    canonical = json.dumps(body, sort_keys=True, separators=(",", ":"))
    return _hash(canonical)[:8]


@dataclass(frozen=True, slots=True)
class SessionHandle:
    """A session of an MCP server, as a value that can be stored, sent, and resumed anywhere.

    Whoever has it can use the session, so treat it like a password: its JSON form holds the session ID, its `repr`
    does not. JSON serializers of Celery write it by themselves.

    Attributes:
        server: The name of the server in `mcp_servers`, or its URL without credentials.
        session_id: `Mcp-Session-Id` as the server gave it; None for a server without sessions.
        negotiated: The result of `initialize` (or of `server/discover`), as JSON.
        cookies: Name to value; a load balancer may pin the session by them.
        shared: More than one branch of a workflow holds the session, so only the last of its holders ends it.
    """

    server: str
    session_id: str | None = field(repr=False)
    negotiated: Mapping[str, Any] = field(repr=False)
    cookies: Mapping[str, str] = field(default_factory=dict, repr=False)
    shared: bool = False

    @property
    def short_id(self) -> str | None:
        """The first 8 hex digits of the SHA-256 of the session ID, or None without one. Safe to show."""
        return None if self.session_id is None else short_hash(self.session_id)

    @property
    def key(self) -> str:
        """What a store calls the session: a hash of its ID, and one of its server, which may count from 1 like others.

        Begins with `short_id`.
        """
        return _hash(self.session_id or "")[:24] + _hash(self.server)[:8]

    @property
    def protocol_version(self) -> str | None:
        """The negotiated protocol version; None in the stateless era, where each request states its own."""
        version = self.negotiated.get("protocolVersion")
        return version if isinstance(version, str) else None

    @property
    def is_stateless_era(self) -> bool:
        """Whether the server was met by `server/discover` (2026-07-28), not by `initialize`."""
        return "supportedVersions" in self.negotiated

    def to_json(self) -> dict[str, Any]:
        """Return the handle as JSON types. The result holds the session ID: keep it from logs."""
        body: dict[str, Any] = {"v": VERSION, "server": self.server, "negotiated": dict(self.negotiated)}
        if self.session_id is not None:
            body["id"] = self.session_id
        if self.cookies:
            body["cookies"] = dict(self.cookies)
        if self.shared:
            body["shared"] = True
        return {**body, "sum": _checksum(body)}

    def __json__(self) -> dict[str, Any]:  # kombu's JSON serializer looks for this name
        return self.to_json()

    def dumps(self) -> str:
        """Return the handle as one line of JSON text, for a database or an environment variable."""
        return json.dumps(self.to_json(), separators=(",", ":"))

    @classmethod
    def load(cls, value: "SessionHandle | Mapping[str, Any] | str") -> Self:
        """Read a handle from what `dumps` or `to_json` gave; a handle is returned as it is.

        Raises:
            SessionHandleError: It is not a handle, was altered on its way, or has a version unknown here.
        """
        if isinstance(value, cls):
            return value
        if isinstance(value, str):
            try:
                value = json.loads(value)
            except ValueError:
                raise SessionHandleError(
                    "The session handle is not readable: pass on the whole of what `handle` or `detach()` returned"
                ) from None
        if not isinstance(value, Mapping):
            raise SessionHandleError(
                f"A session handle is a SessionHandle, its JSON object or its JSON text, not {type(value).__name__}"
            )
        return cls._from_json(value)

    @classmethod
    def _from_json(cls, value: Mapping[str, Any]) -> Self:
        version = value.get("v")
        if version != VERSION:
            raise SessionHandleError(
                f"The session handle has version {version!r}, and this mcp_celery reads {VERSION}: "
                "run the same mcp_celery on every worker and publisher"
            )
        body = {key: item for key, item in value.items() if key != "sum"}
        if value.get("sum") != _checksum(body):
            raise SessionHandleError("The session handle was altered on its way: its checksum does not fit its content")
        server, session_id, negotiated = body.get("server"), body.get("id"), body.get("negotiated")
        cookies = body.get("cookies", {})
        if (
            not isinstance(server, str)
            or not isinstance(session_id, str | None)
            or not isinstance(negotiated, Mapping)
            or not isinstance(cookies, Mapping)
        ):
            raise SessionHandleError("The session handle lacks a part, or a part is of the wrong type")
        return cls(server, session_id, negotiated, cookies, shared=bool(body.get("shared", False)))

    def __hash__(self) -> int:
        return hash((self.server, self.session_id))

    def __repr__(self) -> str:
        return f"<SessionHandle {self.server} {self.short_id or 'without session ID'}>"
