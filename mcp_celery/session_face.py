"""What is known of a session: the part that its synchronous and its asynchronous face have in common."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

    import mcp_types as types

    from .handle import SessionHandle
    from .live_session import Call
    from .session import AsyncMCPSession


class SessionFace:
    """A session as task functions see it; what can be read without waiting."""

    def __init__(self, session: "AsyncMCPSession") -> None:
        self._session = session

    def __repr__(self) -> str:
        return repr(self._session).replace("AsyncMCPSession", type(self).__name__, 1)

    @property
    def server(self) -> str:
        """The server's name in `mcp_servers`, or its URL without credentials."""
        return self._session.server

    @property
    def session_id(self) -> str | None:
        """The server's `Mcp-Session-Id`, read live. A secret.

        None before the session is open, after it was closed, detached or lost, and for a server without sessions.
        """
        return self._session.session_id

    @property
    def handle(self) -> "SessionHandle | None":
        """What continues the session elsewhere; None before it is open and once it has ended."""
        return self._session.handle

    @property
    def resumed(self) -> bool:
        """Whether the session came with a handle, so another task opened it."""
        return self._session.resumed

    @property
    def is_open(self) -> bool:
        """Whether the session was opened or resumed here and has not ended."""
        return self._session.is_open

    @property
    def is_lost(self) -> bool:
        """Whether the server has lost the session."""
        return self._session.is_lost

    @property
    def calls(self) -> "Sequence[Call]":
        """The calls that this task has made; of many, the last."""
        return self._session.calls

    @property
    def requests_sent(self) -> int:
        """How many HTTP requests this task has sent to the server."""
        return self._session.requests_sent

    @property
    def protocol_version(self) -> str | None:
        """The negotiated protocol version; None before the session is open."""
        return self._session.protocol_version

    @property
    def server_info(self) -> "types.Implementation | None":
        """The server's name and version; None before the session is open, or where the server does not say."""
        return self._session.server_info

    @property
    def server_capabilities(self) -> "types.ServerCapabilities | None":
        """What the server offers; None before the session is open."""
        return self._session.server_capabilities
