"""What can go wrong, as one tree.

Every class here can be rebuilt from its `args`, because Celery's JSON result backends store nothing else: an error
raised in a worker is raised as the same class by `AsyncResult.get()`. No text here may hold a session ID, a token or
the credentials of a URL.
"""

from typing import Any


class MCPCeleryError(Exception):
    """Base of all errors of this package. `str()` is its first argument."""

    def __init__(self, message: str = "", *details: Any) -> None:
        super().__init__(message, *details)
        self.message = message

    def __str__(self) -> str:
        return self.message


class ConfigurationError(MCPCeleryError):
    """Raised when a server is not configured, cannot be used, or an option is wrong. Nothing was sent."""


class SessionError(MCPCeleryError):
    """Raised when a session cannot do what was asked, for instance a call after `close()`."""


class SessionLostError(SessionError):
    """Raised when the server no longer knows the session: it was restarted, or dropped the session as idle.

    The session's state is gone; `open()` starts another. The call that raised it did not run, unless the session went
    away while the call was under way: then it may have begun.

    Attributes:
        server: The configured name of the server.
        session: The first 8 hex digits of the SHA-256 of the session ID.
        status: The HTTP status that told.
    """

    def __init__(
        self, message: str = "", server: str | None = None, session: str | None = None, status: int | None = None
    ) -> None:
        super().__init__(message, server, session, status)
        self.server = server
        self.session = session
        self.status = status


class SessionHandleError(SessionError):
    """Raised when a handle is unreadable, altered, of another server, or of an unknown version. Nothing was sent."""


class ToolError(MCPCeleryError):
    """Raised when a tool answered `isError` (MCP, Tools, Error Handling).

    Attributes:
        tool: The name of the tool.
        structured_content: What the tool gave beside the text, or None.
    """

    def __init__(
        self, message: str = "", tool: str | None = None, structured_content: dict[str, Any] | None = None
    ) -> None:
        super().__init__(message, tool, structured_content)
        self.tool = tool
        self.structured_content = structured_content


class TransportError(MCPCeleryError):
    """Raised when the server could not be reached, broke off, or did not answer in time.

    Whether the request ran is not known, unless *sent* is False. Retry it only where the tool may run twice.

    Attributes:
        server: The configured name of the server.
        status: The HTTP status, where there was an answer.
        sent: False when the request cannot have reached the server.
        cancelled: True when nobody waited any longer, and the server was told so.
    """

    def __init__(
        self,
        message: str = "",
        server: str | None = None,
        status: int | None = None,
        sent: bool = True,
        cancelled: bool = False,
    ) -> None:
        super().__init__(message, server, status, sent, cancelled)
        self.server = server
        self.status = status
        self.sent = sent
        self.cancelled = cancelled


class CallInterruptedError(MCPCeleryError):
    """Raised when a durable task runs again and a call of its earlier run may or may not have been executed.

    The call cannot be continued: the server gave no event ID for it. Nothing was sent. `mcp_on_interrupted =
    "call-again"` makes such calls again; so are those of tools that say `readOnlyHint` or `idempotentHint`.

    Attributes:
        tool: The name of the tool.
    """

    def __init__(self, message: str = "", tool: str | None = None) -> None:
        super().__init__(message, tool)
        self.tool = tool


class JournalError(MCPCeleryError):
    """Raised when the journal of a durable task cannot serve: a result is too large for it, for instance."""


class JournalMismatchError(JournalError):
    """Raised when a durable task runs again and makes other calls than before. Nothing was sent.

    Attributes:
        number: Which call of the task it was, from 1.
        before: What the call was when the task ran before.
        now: What it is now.
    """

    def __init__(
        self, message: str = "", number: int | None = None, before: str | None = None, now: str | None = None
    ) -> None:
        super().__init__(message, number, before, now)
        self.number = number
        self.before = before
        self.now = now


#: What is said in a run of a durable task that has lost its lease.
HAS_TAKEN_OVER = "Another run of the task has taken over: this one was out of touch for too long"


class SupersededError(JournalError):
    """Raised in a run of a durable task that was out of touch for so long that another run has taken over."""


class StoreError(MCPCeleryError):
    """Raised by commands and by durable tasks, which cannot work without the store. Other tasks go on without it."""
