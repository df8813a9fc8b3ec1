"""MCP sessions with the methods of the SDK's client, which open, resume and go on by themselves."""

import inspect
from collections.abc import Awaitable, Callable, Mapping
from typing import Any, Literal, TypeVar, cast, overload

import mcp_types as types
from mcp import Client, MCPError
from mcp.shared.dispatcher import ProgressFnT
from mcp.shared.message import ClientMessageMetadata
from mcp_types.version import MODERN_PROTOCOL_VERSIONS
from pydantic import BaseModel

from .asked import current_call, fail, under_way
from .durable import Check, Question
from .exceptions import ToolError
from .handle import without_secrets
from .live_session import LiveSession
from .tool_checks import ToolChecks

T = TypeVar("T")
R = TypeVar("R", bound=BaseModel)

#: `(progress, total, message)`; may be asynchronous on an `AsyncMCPSession`.
ProgressCallback = Callable[[float, float | None, str | None], object]


class _ToolAnswer(types.CallToolResult):
    """Reads either answer to a call of a tool."""

    @classmethod
    def model_validate(cls, obj: Any, **options: Any) -> types.Result:  # type: ignore[override]  # it is either
        """Return the `CallToolResult` or the `InputRequiredResult` in *obj*."""
        is_asking = isinstance(obj, Mapping) and obj.get("resultType") == "input_required"
        answer: type[types.Result] = types.InputRequiredResult if is_asking else types.CallToolResult
        return answer.model_validate(obj, **options)


class AsyncMCPSession(LiveSession):
    """One MCP session, opened or resumed at the first use.

    Methods and result types are those of the SDK's `mcp.Client`. Where a handle was given, the first call continues
    its session without a handshake. After `detach` or `close`, and once the server has lost the session, calls raise:
    only `open()` starts another one.

    Raises (each call):
        SessionLostError: The server no longer knows the session.
        TransportError: The server could not be reached, broke off, or did not answer in time.
        MCPError: The server answered with a JSON-RPC error.
    """

    @overload
    async def call_tool(
        self,
        name: str,
        arguments: dict[str, Any] | None = None,
        *,
        timeout: float | None = None,  # noqa: ASYNC109 - it cancels at the server as well, and is the fixed name
        on_progress: ProgressCallback | None = None,
        raise_on_error: bool = True,
        input_responses: Mapping[str, object] | None = None,
        request_state: str | None = None,
        allow_input_required: Literal[False] = False,
        check_arguments: bool = False,
        meta: dict[str, Any] | None = None,
    ) -> types.CallToolResult: ...

    @overload
    async def call_tool(
        self,
        name: str,
        arguments: dict[str, Any] | None = None,
        *,
        timeout: float | None = None,  # noqa: ASYNC109 - it cancels at the server as well, and is the fixed name
        on_progress: ProgressCallback | None = None,
        raise_on_error: bool = True,
        input_responses: Mapping[str, object] | None = None,
        request_state: str | None = None,
        allow_input_required: Literal[True],
        check_arguments: bool = False,
        meta: dict[str, Any] | None = None,
    ) -> types.CallToolResult | types.InputRequiredResult: ...

    async def call_tool(
        self,
        name: str,
        arguments: dict[str, Any] | None = None,
        *,
        timeout: float | None = None,  # noqa: ASYNC109 - it cancels at the server as well, and is the fixed name
        on_progress: ProgressCallback | None = None,
        raise_on_error: bool = True,
        input_responses: Mapping[str, object] | None = None,
        request_state: str | None = None,
        allow_input_required: bool = False,
        check_arguments: bool = False,
        meta: dict[str, Any] | None = None,
    ) -> types.CallToolResult | types.InputRequiredResult:
        """Call a tool.

        Args:
            name: The tool.
            arguments: Its arguments.
            timeout: Seconds for the whole call; then it is cancelled at the server and the session stays usable.
            on_progress: Called with `(progress, total, message)` for each progress notification.
            raise_on_error: Raise `ToolError` where the tool answers `isError`; otherwise return that answer.
            input_responses: Answers to an earlier `InputRequiredResult` of this call (MCP 2026-07-28), by its keys.
            request_state: What that had as `request_state`.
            allow_input_required: Return an `InputRequiredResult`, instead of having the task's methods answer it.
            check_arguments: Check the names of the arguments by the tool's input schema, before it is called.
            meta: Sent as `_meta`.

        Raises:
            ToolError: The tool answered `isError`, or its output does not fit its output schema.
            ConfigurationError: By *check_arguments*: there is no such tool, or it takes other arguments.
        """
        report = _as_coroutine(on_progress)
        if report is None and self._asked is not None:
            report = self._asked.progress_of(name, lambda: self.session_id)

        # Answers may be written as JSON has them.
        params = types.CallToolRequestParams.model_validate(
            {
                "name": name,
                "arguments": arguments,
                "inputResponses": input_responses,
                "requestState": request_state,
                "_meta": meta,
            }
        )
        request = types.CallToolRequest(params=params)

        async def call(client: Client, metadata: ClientMessageMetadata | None) -> types.Result:
            if check_arguments and not (metadata and metadata.resumption_token):
                await self._checks.arguments(client, name, arguments or {})
            if client.protocol_version not in MODERN_PROTOCOL_VERSIONS:
                return await client.session.send_request(
                    request, types.CallToolResult, metadata=metadata, progress_callback=report
                )
            if allow_input_required:
                return await _one_round(client, params, report)
            # Here the SDK has more to do: headers by the input schema, and rounds of input.
            return await client.call_tool(
                name,
                arguments,
                progress_callback=report,
                input_responses=params.input_responses,
                request_state=request_state,
                meta=params.meta,
            )

        async def check(result: types.Result) -> None:
            is_good = isinstance(result, types.CallToolResult) and not result.is_error
            if is_good and self.protocol_version not in MODERN_PROTOCOL_VERSIONS:
                await self._checks.output(self.client, name, cast("types.CallToolResult", result))

        answer: type[types.Result] = _ToolAnswer
        question = Question(f"tool {name!r}", request, answer, call, name)
        put = await self._put(question, timeout, check if raise_on_error else None)
        if isinstance(put, types.InputRequiredResult):
            return put
        result = cast("types.CallToolResult", put)
        if raise_on_error and result.is_error:
            raise ToolError(_text_of(result) or f"Tool {name!r} failed", name, result.structured_content)
        return result

    async def _put(
        self,
        question: "Question[R]",
        timeout_seconds: float | None = None,
        check: Check[R] | None = None,
    ) -> R:
        """Put a question to the server; of a durable task, by way of its journal. *check* may refuse the answer."""
        goes_on = self._durable is not None
        with (
            self._events.call(question.request.method, question.tool) as event,
            under_way(question.tool, goes_on=goes_on),
        ):
            if self._durable is not None:
                result = await self._durable.put(question, timeout_seconds, check, event.note_replay)
            else:
                result = await self.ask(question.what, lambda client: question.call(client, None), timeout_seconds)
                if check is not None:
                    await check(result)
            if isinstance(result, types.CallToolResult) and result.is_error:
                event.error = ToolError.__name__
        return result

    async def _get(self, method: str, call: Callable[[Client], Awaitable[T]]) -> T:
        with self._events.call(method):
            return await self.ask(method, call)

    @property
    def _checks(self) -> ToolChecks:
        return ToolChecks(self.server, self._connections.of(self._settings).listings)

    async def list_tools(self, *, cursor: str | None = None) -> types.ListToolsResult:
        """List the tools, always from the server. `next_cursor` of the result continues."""
        listings = self._connections.of(self._settings).listings
        if cursor is None:
            listings.drop()
        return await self._get("tools/list", lambda client: client.list_tools(cursor=cursor, cache_mode="refresh"))

    async def list_known_tools(self, *, cursor: str | None = None) -> types.ListToolsResult:
        """Do what `list_tools` does, from what the process knows of the server, where that is not too old."""
        return await self._get("tools/list", lambda client: client.list_tools(cursor=cursor))

    async def list_resources(self, *, cursor: str | None = None) -> types.ListResourcesResult:
        """List the resources. `next_cursor` of the result continues."""
        return await self._get("resources/list", lambda client: client.list_resources(cursor=cursor))

    async def list_resource_templates(self, *, cursor: str | None = None) -> types.ListResourceTemplatesResult:
        """List the resource templates. `next_cursor` of the result continues."""
        return await self._get("resources/templates/list", lambda client: client.list_resource_templates(cursor=cursor))

    async def read_resource(self, uri: str) -> types.ReadResourceResult:
        """Read a resource."""
        request = types.ReadResourceRequest(params=types.ReadResourceRequestParams(uri=uri))

        async def call(client: Client, metadata: ClientMessageMetadata | None) -> types.ReadResourceResult:
            if metadata is None or client.protocol_version in MODERN_PROTOCOL_VERSIONS:
                return await client.read_resource(uri)
            return await client.session.send_request(request, types.ReadResourceResult, metadata=metadata)

        return await self._put(Question(f"resource {without_secrets(uri)!r}", request, types.ReadResourceResult, call))

    async def list_prompts(self, *, cursor: str | None = None) -> types.ListPromptsResult:
        """List the prompts. `next_cursor` of the result continues."""
        return await self._get("prompts/list", lambda client: client.list_prompts(cursor=cursor))

    async def get_prompt(self, name: str, arguments: dict[str, str] | None = None) -> types.GetPromptResult:
        """Get a prompt."""
        request = types.GetPromptRequest(params=types.GetPromptRequestParams(name=name, arguments=arguments))

        async def call(client: Client, metadata: ClientMessageMetadata | None) -> types.GetPromptResult:
            if metadata is None or client.protocol_version in MODERN_PROTOCOL_VERSIONS:
                return await client.get_prompt(name, arguments)
            return await client.session.send_request(request, types.GetPromptResult, metadata=metadata)

        return await self._put(Question(f"prompt {name!r}", request, types.GetPromptResult, call))

    async def complete(
        self,
        ref: types.ResourceTemplateReference | types.PromptReference,
        argument: dict[str, str],
        context_arguments: dict[str, str] | None = None,
    ) -> types.CompleteResult:
        """Complete an argument of a prompt or resource template: `argument` is `{"name": ..., "value": ...}`."""
        return await self._get("completion/complete", lambda client: client.complete(ref, argument, context_arguments))

    async def ping(self, *, on_event_id: Callable[[str], Awaitable[None]] | None = None) -> None:
        """Ask the server for a sign of life. It counts as use of the session.

        *on_event_id* is called with each event ID of the response, which servers with an event store give.
        """
        metadata = ClientMessageMetadata(on_resumption_token_update=on_event_id)

        async def ping(client: Client) -> types.EmptyResult:
            return await client.session.send_request(types.PingRequest(), types.EmptyResult, metadata=metadata)

        await self.ask("ping", ping)


def _as_coroutine(callback: ProgressCallback | None) -> ProgressFnT | None:
    if callback is None:
        return None

    async def report(progress: float, total: float | None = None, message: str | None = None) -> None:
        call = current_call()
        if call is not None and call.failure is not None:
            return
        try:
            outcome = callback(progress, total, message)
            if inspect.isawaitable(outcome):
                await outcome
        except Exception as exc:  # noqa: BLE001 - the user's own code
            fail(call, "on_progress", exc)

    return report


async def _one_round(
    client: Client, params: types.CallToolRequestParams, report: ProgressFnT | None
) -> types.CallToolResult | types.InputRequiredResult:
    """Call a tool once, and leave it to the caller to answer what the server asks back (MCP 2026-07-28)."""

    async def send() -> types.CallToolResult | types.InputRequiredResult:
        return await client.session.call_tool(
            params.name,
            params.arguments,
            progress_callback=report,
            input_responses=params.input_responses,
            request_state=params.request_state,
            meta=params.meta,
            allow_input_required=True,
        )

    try:
        return await send()
    except MCPError as exc:
        if exc.code != types.HEADER_MISMATCH:
            raise
        # As the SDK's client does it: the listing has the schema by which the headers of the call are made.
        await client.list_tools(cache_mode="refresh")
        return await send()


def _text_of(result: types.CallToolResult) -> str:
    return "\n".join(block.text for block in result.content if isinstance(block, types.TextContent))
