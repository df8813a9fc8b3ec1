"""`self.amcp`: the asynchronous face of a session, for task functions that are coroutine functions."""

from collections.abc import Callable, Coroutine, Mapping
from functools import partial
from typing import TYPE_CHECKING, Any, Literal, TypeVar, overload

from .events import Told
from .exceptions import SessionError
from .portal import Callers, Portal
from .session_face import SessionFace

if TYPE_CHECKING:
    import mcp_types as types
    from mcp import Client

    from .handle import SessionHandle
    from .session import AsyncMCPSession, ProgressCallback

T = TypeVar("T")


class AwaitedSession(SessionFace):
    """An MCP session, opened or resumed at the first call. Methods and result types are those of the SDK's client.

    Belongs to the process's event loop, on which `async def` tasks run; see `AsyncMCPSession` for what each method
    does. Calls may be made at once (`asyncio.gather`, task groups). One that is cancelled, or whose task is
    interrupted, is cancelled at the server as well.
    """

    def __init__(
        self,
        session: "AsyncMCPSession",
        portal: Portal,
        sibling: "Callable[[str], AwaitedSession]",
        callers: Callers,
        told: Told | None = None,
    ) -> None:
        super().__init__(session)
        self._portal = portal
        self._sibling = sibling
        self._callers = callers
        self._told = told

    def __getitem__(self, server: str) -> "AwaitedSession":
        """Return the session of another server of the task, by its name."""
        return self._sibling(server)

    def is_here(self) -> bool:
        """Whether the calling code runs on the event loop of the session."""
        return self._portal.is_current()

    @property
    def client(self) -> "Client":
        """The SDK's `mcp.Client` on this session, once it is open: `await self.amcp.open()`.

        Its calls go over the wire as they are: they raise the SDK's errors, and durable tasks do not know them again.

        Raises:
            SessionError: The session is not open.
        """
        return self._session.client

    async def open(self) -> None:
        """Open the session, or resume the one that was given. After its end, start a new one."""
        await self._call(self._session.open)

    async def detach(self) -> "SessionHandle":
        """Leave the session alive at the server, disown it, and return its handle. The task will not close it."""
        return await self._call(self._session.detach)

    async def close(self) -> None:
        """End the session at the server."""
        await self._call(self._session.close)

    @overload
    async def call_tool(
        self,
        name: str,
        arguments: dict[str, Any] | None = None,
        *,
        timeout: float | None = None,  # noqa: ASYNC109 - it cancels at the server as well, and is the fixed name
        on_progress: "ProgressCallback | None" = None,
        raise_on_error: bool = True,
        input_responses: Mapping[str, object] | None = None,
        request_state: str | None = None,
        allow_input_required: Literal[False] = False,
        check_arguments: bool = False,
        meta: dict[str, Any] | None = None,
    ) -> "types.CallToolResult": ...

    @overload
    async def call_tool(
        self,
        name: str,
        arguments: dict[str, Any] | None = None,
        *,
        timeout: float | None = None,  # noqa: ASYNC109 - it cancels at the server as well, and is the fixed name
        on_progress: "ProgressCallback | None" = None,
        raise_on_error: bool = True,
        input_responses: Mapping[str, object] | None = None,
        request_state: str | None = None,
        allow_input_required: Literal[True],
        check_arguments: bool = False,
        meta: dict[str, Any] | None = None,
    ) -> "types.CallToolResult | types.InputRequiredResult": ...

    async def call_tool(
        self,
        name: str,
        arguments: dict[str, Any] | None = None,
        *,
        timeout: float | None = None,  # noqa: ASYNC109 - it cancels at the server as well, and is the fixed name
        on_progress: "ProgressCallback | None" = None,
        raise_on_error: bool = True,
        input_responses: Mapping[str, object] | None = None,
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
            on_progress: Called with `(progress, total, message)` for each progress notification; may be asynchronous.
                What it raises ends the call. Without it, progress becomes the state of the task.
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
        call: Callable[[], Coroutine[Any, Any, types.CallToolResult | types.InputRequiredResult]] = partial(
            self._session.call_tool,
            name,
            arguments,
            timeout=timeout,
            on_progress=on_progress,
            raise_on_error=raise_on_error,
            input_responses=input_responses,
            request_state=request_state,
            allow_input_required=allow_input_required,
            check_arguments=check_arguments,
            meta=meta,
        )
        return await self._call(call)

    async def list_tools(self, *, cursor: str | None = None) -> "types.ListToolsResult":
        """List the tools, always from the server. `next_cursor` of the result continues."""
        return await self._call(partial(self._session.list_tools, cursor=cursor))

    async def list_resources(self, *, cursor: str | None = None) -> "types.ListResourcesResult":
        """List the resources. `next_cursor` of the result continues."""
        return await self._call(partial(self._session.list_resources, cursor=cursor))

    async def list_resource_templates(self, *, cursor: str | None = None) -> "types.ListResourceTemplatesResult":
        """List the resource templates. `next_cursor` of the result continues."""
        return await self._call(partial(self._session.list_resource_templates, cursor=cursor))

    async def read_resource(self, uri: str) -> "types.ReadResourceResult":
        """Read a resource."""
        return await self._call(partial(self._session.read_resource, uri))

    async def list_prompts(self, *, cursor: str | None = None) -> "types.ListPromptsResult":
        """List the prompts. `next_cursor` of the result continues."""
        return await self._call(partial(self._session.list_prompts, cursor=cursor))

    async def get_prompt(self, name: str, arguments: dict[str, str] | None = None) -> "types.GetPromptResult":
        """Get a prompt."""
        return await self._call(partial(self._session.get_prompt, name, arguments))

    async def complete(
        self,
        ref: "types.ResourceTemplateReference | types.PromptReference",
        argument: dict[str, str],
        context_arguments: dict[str, str] | None = None,
    ) -> "types.CompleteResult":
        """Complete an argument of a prompt or resource template: `argument` is `{"name": ..., "value": ...}`."""
        return await self._call(partial(self._session.complete, ref, argument, context_arguments))

    async def _call(self, function: Callable[[], Coroutine[Any, Any, T]]) -> T:
        """Await `function()` in an asyncio task of its own.

        An interruption of the Celery task may be any exception, raised here. The call only ever sees a cancellation,
        and a single one, which gives it the time to tell the server.
        """
        import asyncio  # noqa: PLC0415 - publishing a task must load none of these

        import anyio  # noqa: PLC0415 - as above

        from .coroutines import begin_call  # noqa: PLC0415 - as above

        if not self.is_here():
            raise SessionError(NOT_HERE)
        call = begin_call(function(), f"mcp_celery call of {self.server}")
        try:
            await asyncio.wait([call])
        except BaseException:
            if not call.cancelling():  # by the end of the task
                call.cancel()
            with anyio.CancelScope(shield=True):
                await asyncio.wait([call])
            if not call.cancelled():
                call.exception()  # mark as retrieved
            raise
        finally:
            if self._told is not None:
                self._callers.run(self._told.tell)
        return call.result()


#: What is said where `self.amcp` is used elsewhere.
NOT_HERE = (
    "self.amcp is there for tasks whose function is async def, and for what these await; in a plain function use "
    "self.mcp, and no event loop of your own"
)
