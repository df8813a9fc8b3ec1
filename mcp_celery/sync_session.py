"""`self.mcp`: the synchronous face of a session, for task functions."""

from collections.abc import Callable, Coroutine, Mapping
from functools import partial
from typing import TYPE_CHECKING, Any, Literal, TypeVar, overload
from weakref import WeakKeyDictionary

from .async_session import AwaitedSession
from .events import Event, Told
from .exceptions import SessionError
from .portal import AwaitingCaller, Caller, Callers, Portal, get_portal, in_loop_thread
from .session_face import SessionFace

if TYPE_CHECKING:
    import mcp_types as types

    from .asked import Asked
    from .connections import Connections
    from .handle import SessionHandle
    from .journal import Journal
    from .live_session import Ledger
    from .session import AsyncMCPSession, ProgressCallback
    from .settings import JournalSettings, ServerSettings
    from .store import JournalStore

T = TypeVar("T")

#: The HTTP clients of each event loop. Weak: they go with their portal.
_connections: "WeakKeyDictionary[Portal, Connections]" = WeakKeyDictionary()


def new_session(
    settings: "ServerSettings",
    handle: "SessionHandle | None" = None,
    sibling: "Callable[[str], MCPSession] | None" = None,
    *,
    ledger: "Ledger | None" = None,
    lost_at: float | None = None,
    journal: "Journal | None" = None,
    tell: Callable[[Event], object] | None = None,
    asked: "Asked | None" = None,
    callers: Callers | None = None,
) -> "MCPSession":
    """Return a session on this process's event loop, which starts at the first use. Sends nothing.

    *tell* is called with what happens in the session, in the thread that uses it. What the server asks while a call is
    under way goes to *asked*, by way of the *callers* that it knows.

    Raises:
        SessionHandleError: The handle is of another server.
    """
    from .connections import Connections  # noqa: PLC0415 - publishing a task must not load the MCP SDK
    from .session import AsyncMCPSession  # noqa: PLC0415 - publishing a task must not load the MCP SDK

    portal = get_portal()
    connections = _connections.get(portal)
    if connections is None:
        connections = _connections.setdefault(portal, Connections())
        portal.on_close(connections.aclose)
    told = None if tell is None else Told(tell)
    session = AsyncMCPSession(
        settings,
        connections,
        handle,
        ledger=ledger,
        lost_at=lost_at,
        journal=journal,
        asked=asked,
        tell=None if told is None else told.note,
    )
    return MCPSession(session, portal, sibling, told, callers)


def new_journal(store: "JournalStore", task_id: str, attempt: int, settings: "JournalSettings") -> "SyncJournal":
    """Return the journal of an execution, on this process's event loop."""
    from .journal import Journal  # noqa: PLC0415 - as above

    journal = Journal(
        store,
        task_id,
        attempt=attempt,
        max_result_bytes=settings.max_result_bytes,
        keeps_over_retries=settings.keeps_over_retries,
        calls_again=settings.calls_again,
    )
    return SyncJournal(journal, get_portal())


class SyncJournal:
    """The synchronous face of a `Journal`."""

    def __init__(self, journal: "Journal", portal: Portal) -> None:
        self.journal = journal
        self._portal = portal

    def begin(self) -> None:
        """See `Journal.begin`."""
        self._portal.call(self.journal.begin)

    def end(self, *, is_done: bool, is_retried: bool = False) -> None:
        """See `Journal.end`."""
        self._portal.call(partial(self.journal.end, is_done=is_done, is_retried=is_retried))

    def has_lost_lease(self) -> bool:
        """See `Journal.has_lost_lease`."""
        if self._portal.is_current():  # `self.retry()` in a coroutine
            return self.journal.has_lost_lease_now()
        return self._portal.call(self.journal.has_lost_lease)


class MCPSession(SessionFace):
    """An MCP session, opened or resumed at the first call. Methods and result types are those of the SDK's client.

    Each call waits, in the task's thread, for the process's event loop; see `AsyncMCPSession` for what each does.
    `on_progress` is called in the task's thread. Interrupting the task cancels the call, also at the server.
    """

    def __init__(
        self,
        session: "AsyncMCPSession",
        portal: Portal,
        sibling: "Callable[[str], MCPSession] | None" = None,
        told: Told | None = None,
        callers: Callers | None = None,
    ) -> None:
        super().__init__(session)
        self._portal = portal
        self._sibling = sibling
        self._told = told
        self._callers = callers or Callers()

    def __getitem__(self, server: str) -> "MCPSession":
        """Return the session of another server of the task, by its name."""
        if self._sibling is None:
            raise SessionError("This session stands alone: it belongs to no task with several servers")
        return self._sibling(server)

    @property
    def awaited(self) -> AwaitedSession:
        """The asynchronous face of this session."""
        return AwaitedSession(
            self._session, self._portal, lambda server: self[server].awaited, self._callers, self._told
        )

    def open(self) -> None:
        """Open the session, or resume the one that was given. After its end, start a new one."""
        self._call(self._session.open)

    def detach(self) -> "SessionHandle":
        """Leave the session alive at the server, disown it, and return its handle. The task will not close it."""
        return self._call(self._session.detach)

    def close(self) -> None:
        """End the session at the server."""
        self._call(self._session.close)

    def end(self) -> None:
        """End the session at the server, for a task that has ended."""
        self._call_for_task(self._session.end)

    def release(self) -> None:
        """Drop this end without a word to the server. Calls raise from here on."""
        if not self._portal.is_current():  # there, nothing was opened
            self._call_for_task(self._session.release)

    @overload
    def call_tool(
        self,
        name: str,
        arguments: dict[str, Any] | None = None,
        *,
        timeout: float | None = None,
        on_progress: "ProgressCallback | None" = None,
        raise_on_error: bool = True,
        input_responses: "Mapping[str, object] | None" = None,
        request_state: str | None = None,
        allow_input_required: Literal[False] = False,
        check_arguments: bool = False,
        meta: dict[str, Any] | None = None,
    ) -> "types.CallToolResult": ...

    @overload
    def call_tool(
        self,
        name: str,
        arguments: dict[str, Any] | None = None,
        *,
        timeout: float | None = None,
        on_progress: "ProgressCallback | None" = None,
        raise_on_error: bool = True,
        input_responses: "Mapping[str, object] | None" = None,
        request_state: str | None = None,
        allow_input_required: Literal[True],
        check_arguments: bool = False,
        meta: dict[str, Any] | None = None,
    ) -> "types.CallToolResult | types.InputRequiredResult": ...

    def call_tool(
        self,
        name: str,
        arguments: dict[str, Any] | None = None,
        *,
        timeout: float | None = None,
        on_progress: "ProgressCallback | None" = None,
        raise_on_error: bool = True,
        input_responses: "Mapping[str, object] | None" = None,
        request_state: str | None = None,
        allow_input_required: bool = False,
        check_arguments: bool = False,
        meta: dict[str, Any] | None = None,
    ) -> "types.CallToolResult | types.InputRequiredResult":
        """Call a tool and return its result.

        Args:
            name: The tool.
            arguments: Its arguments.
            timeout: Seconds for the whole call; then it is cancelled at the server and the session stays usable.
            on_progress: Called with `(progress, total, message)` for each progress notification, in this thread.
                Without it, progress becomes the state of the task.
            raise_on_error: Raise `ToolError` where the tool answers `isError`; otherwise return that answer.
            input_responses: Answers to an earlier `InputRequiredResult` of this call (MCP 2026-07-28), by its keys.
            request_state: What that had as `request_state`.
            allow_input_required: Return an `InputRequiredResult`, instead of having the task's methods answer it.
            check_arguments: Check the names of the arguments by the tool's input schema, before it is called.
            meta: Sent as `_meta`.

        Raises:
            ToolError: The tool answered `isError`.
            SessionLostError: The server no longer knows the session.
            TransportError: The server could not be reached, broke off, or did not answer in time.
            MCPError: The server answered with a JSON-RPC error.
            ConfigurationError: By *check_arguments*: there is no such tool, or it takes other arguments.
        """
        caller = Caller()

        def report(progress: float, total: float | None, message: str | None) -> None:
            if on_progress is not None:
                caller.run(partial(on_progress, progress, total, message))

        call: Callable[[], Coroutine[Any, Any, types.CallToolResult | types.InputRequiredResult]] = partial(
            self._session.call_tool,
            name,
            arguments,
            timeout=timeout,
            on_progress=report if on_progress is not None else None,
            raise_on_error=raise_on_error,
            input_responses=input_responses,
            request_state=request_state,
            allow_input_required=allow_input_required,
            check_arguments=check_arguments,
            meta=meta,
        )
        return self._call(call, caller)

    def list_tools(self, *, cursor: str | None = None) -> "types.ListToolsResult":
        """List the tools, always from the server. `next_cursor` of the result continues."""
        return self._call(partial(self._session.list_tools, cursor=cursor))

    def list_resources(self, *, cursor: str | None = None) -> "types.ListResourcesResult":
        """List the resources. `next_cursor` of the result continues."""
        return self._call(partial(self._session.list_resources, cursor=cursor))

    def list_resource_templates(self, *, cursor: str | None = None) -> "types.ListResourceTemplatesResult":
        """List the resource templates. `next_cursor` of the result continues."""
        return self._call(partial(self._session.list_resource_templates, cursor=cursor))

    def read_resource(self, uri: str) -> "types.ReadResourceResult":
        """Read a resource."""
        return self._call(partial(self._session.read_resource, uri))

    def list_prompts(self, *, cursor: str | None = None) -> "types.ListPromptsResult":
        """List the prompts. `next_cursor` of the result continues."""
        return self._call(partial(self._session.list_prompts, cursor=cursor))

    def get_prompt(self, name: str, arguments: dict[str, str] | None = None) -> "types.GetPromptResult":
        """Get a prompt."""
        return self._call(partial(self._session.get_prompt, name, arguments))

    def complete(
        self,
        ref: "types.ResourceTemplateReference | types.PromptReference",
        argument: dict[str, str],
        context_arguments: dict[str, str] | None = None,
    ) -> "types.CompleteResult":
        """Complete an argument of a prompt or resource template: `argument` is `{"name": ..., "value": ...}`."""
        return self._call(partial(self._session.complete, ref, argument, context_arguments))

    # -- For agents, which run on a loop of their own

    @property
    def is_untouched(self) -> bool:
        """Whether the session was neither opened nor resumed here, and has not ended."""
        return self._session.is_untouched

    async def on_loop(self, function: "Callable[[AsyncMCPSession], Coroutine[Any, Any, T]]") -> T:
        """Await `function(session)` on the event loop of the session, from a coroutine of any loop.

        What the server asks and tells meanwhile is for the task, whose thread runs that loop, or waits for it.
        """
        call = partial(function, self._session)
        if self._portal.is_current():
            try:
                return await self._portal.acall(call)
            finally:
                if self._told is not None:
                    self._callers.run(self._told.tell)
        caller = AwaitingCaller()
        try:
            with self._callers.waiting(caller):
                return await self._portal.acall(call, caller)
        finally:
            if self._told is not None:
                self._told.tell()

    def _call(self, function: Callable[[], Coroutine[Any, Any, T]], caller: Caller | None = None) -> T:
        if in_loop_thread():
            raise SessionError(
                "self.mcp waits for the event loop, so it cannot be used in a coroutine: await self.amcp there, in a "
                "task whose function is async def"
            )
        return self._wait(function, caller)

    def _call_for_task(self, function: Callable[[], Coroutine[Any, Any, object]]) -> None:
        """Call what a task does when it ends. It may have been called in a coroutine, on another loop."""
        if self._portal.is_current():
            raise SessionError("A task that uses self.mcp was called on the event loop that it would have to wait for")
        self._wait(function)

    def _wait(self, function: Callable[[], Coroutine[Any, Any, T]], caller: Caller | None = None) -> T:
        caller = caller or Caller()
        try:
            with self._callers.waiting(caller):
                return self._portal.call(function, caller)
        finally:
            if self._told is not None:
                self._told.tell()
