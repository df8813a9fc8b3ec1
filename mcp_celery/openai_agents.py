"""Agents of openai-agents in a task: an MCP server for them whose calls go over the session of the task.

Needs the extra `openai-agents`. No other module imports `agents`.
"""

import asyncio
import inspect
import logging
import math
from collections.abc import Callable, Coroutine, Sequence
from functools import partial
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self, TypedDict, TypeVar, Unpack, cast

import mcp_types as types
from agents import RunContextWrapper, ToolInputGuardrail, ToolOutputGuardrail, UserError, default_tool_error_function
from agents.mcp import (
    MCPServer,
    MCPToolCustomDataExtractor,
    MCPToolMetaResolver,
    ToolFilter,
    ToolFilterCallable,
    ToolFilterContext,
)
from agents.mcp.server import RequireApprovalSetting
from agents.tool import ToolErrorFunction
from billiard.exceptions import SoftTimeLimitExceeded
from mcp import MCPError

from .exceptions import MCPCeleryError, ToolError, TransportError

if TYPE_CHECKING:
    from agents import AgentBase

    from .session import AsyncMCPSession
    from .sync_session import MCPSession
    from .task import MCPTask

T = TypeVar("T")
P = TypeVar("P", bound=types.PaginatedResult)

logger = logging.getLogger(__name__)


class Policies(TypedDict, total=False):
    """What openai-agents itself does around the calls; see `agents.mcp.MCPServer`."""

    use_structured_content: bool
    require_approval: RequireApprovalSetting
    failure_error_function: ToolErrorFunction | None
    tool_meta_resolver: MCPToolMetaResolver | None
    custom_data_extractor: MCPToolCustomDataExtractor | None
    tool_input_guardrails: list[ToolInputGuardrail[Any]] | None
    tool_output_guardrails: list[ToolOutputGuardrail[Any]] | None


class ServerOptions(Policies, total=False):
    """The options of `agents_server`; see `TaskServer`."""

    name: str | None
    cache_tools_list: bool
    client_session_timeout_seconds: float | None
    tool_filter: ToolFilter
    max_retry_attempts: int
    retry_backoff_seconds_base: float
    retry_backoff_seconds_max: float | None
    max_list_pages: int | None


def agents_server(task: "MCPTask", server: str | None = None, **options: Unpack[ServerOptions]) -> "TaskServer":
    """Return the MCP server of *task* for its agents, which are to run while the task does.

        @app.task(base=BrowserTask, bind=True)
        def look(self, question):
            agent = Agent("reader", mcp_servers=[agents_server(self)])
            return Runner.run_sync(agent, question).final_output

    In an `async def` task, `await Runner.run(...)`.

    Args:
        task: `self`.
        server: Which one, in a task with several.
        options: Those of `agents.mcp.MCPServerStreamableHttp`; see `TaskServer`.

    Raises:
        ConfigurationError: The task does not run, or has no such server.
    """
    session = task.mcp
    return TaskServer(session if server is None else session[server], **options)


class TaskServer(MCPServer):
    """The MCP server of a task for its agents.

    Opens or resumes the session of the task at its first use, and never ends it: that is for the task. It may be
    connected and cleaned up, as agents' servers are, and need not.

    What an agent cannot repair ends its run, and the task, with the error as it is: a `SessionLostError`, for instance.
    A `TransportError` is told to the model, without asking it to try again what may have run; with
    `failure_error_function=None` it ends the run as well.

    Args:
        session: `self.mcp` of the task.
        name: For people, and in the names of tools where the agent asks for that. By default that of the server.
        cache_tools_list: List the tools only where this process does not know them yet, from any task, or the server
            has said that they changed, or they are 5 minutes old, or `invalidate_tools_cache` was called.
        client_session_timeout_seconds: For a tool call; then it is cancelled. None or 0: as the server's options say.
        tool_filter: Which tools the agent sees: names, or a function.
        max_retry_attempts: How often a request is made again that a `TransportError` has ended, in the same session:
            one that surely did not run, or one that may run twice (anything that reads, and tools with `readOnlyHint`
            or `idempotentHint`). -1 for without end.
        retry_backoff_seconds_base: The pause before the first retry; it doubles with each.
        retry_backoff_seconds_max: The longest pause.
        max_list_pages: Of tools or prompts; a server that has more is refused.
        policies: Passed on to `agents.mcp.MCPServer`.
    """

    def __init__(
        self,
        session: "MCPSession",
        *,
        name: str | None = None,
        cache_tools_list: bool = False,
        client_session_timeout_seconds: float | None = None,
        tool_filter: ToolFilter = None,
        max_retry_attempts: int = 0,
        retry_backoff_seconds_base: float = 1.0,
        retry_backoff_seconds_max: float | None = None,
        max_list_pages: int | None = None,
        **policies: Unpack[Policies],
    ) -> None:
        super().__init__(**policies)
        if max_list_pages is not None and max_list_pages < 1:
            raise ValueError("max_list_pages must be a positive integer or None")
        self._session = session
        self._name = name or session.server
        self.cache_tools_list = cache_tools_list
        self.client_session_timeout_seconds = client_session_timeout_seconds
        self.tool_filter = tool_filter
        self.max_retry_attempts = max_retry_attempts
        self.retry_backoff_seconds_base = retry_backoff_seconds_base
        self.retry_backoff_seconds_max = retry_backoff_seconds_max
        self.max_list_pages = max_list_pages
        #: What was listed last; None where it is not to be relied on.
        self._tools: list[types.Tool] | None = None
        self._must_ask = False

    # -- Life

    async def connect(self) -> None:
        """Open the session of the task, or resume it, which sends nothing. Not needed: the first use does it.

        Raises:
            TransportError: The server could not be reached.
        """
        if self._session.is_untouched:  # never a new one in the place of one that has ended
            await self._ask(lambda session: session.open())

    async def cleanup(self) -> None:
        """Do nothing: the session is the task's, and goes on."""

    async def __aenter__(self) -> Self:
        await self.connect()
        return self

    async def __aexit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None
    ) -> None:
        await self.cleanup()

    @property
    def name(self) -> str:
        """What people call the server."""
        return self._name

    @property
    def session_id(self) -> str | None:
        """The server's `Mcp-Session-Id`. A secret; to go on elsewhere, leave the session to the workflow."""
        return self._session.session_id

    # -- Tools

    @property
    def cached_tools(self) -> list[types.Tool] | None:
        """Copies of the tools that were listed last."""
        return None if self._tools is None else _copies(self._tools)

    def invalidate_tools_cache(self) -> None:
        """Have the tools listed anew by the server the next time."""
        self._tools, self._must_ask = None, True

    async def list_tools(
        self, run_context: RunContextWrapper[Any] | None = None, agent: "AgentBase[Any] | None" = None
    ) -> list[types.Tool]:
        """List the tools that the agent may see.

        Raises:
            UserError: There are too many pages, or a filter lacks what it is to look at.
        """
        asks, self._must_ask = self._must_ask or not self.cache_tools_list, False

        def page(cursor: str | None, session: "AsyncMCPSession") -> Coroutine[Any, Any, types.ListToolsResult]:
            return session.list_tools(cursor=cursor) if asks else session.list_known_tools(cursor=cursor)

        try:
            pages = await self._pages(page, "tools")
        except BaseException:
            self._must_ask = self._must_ask or asks
            raise
        self._tools = [tool for page in pages for tool in page.tools]
        return await self._filtered(self._tools, run_context, agent)

    async def call_tool(
        self, tool_name: str, arguments: dict[str, Any] | None, meta: dict[str, Any] | None = None
    ) -> types.CallToolResult:
        """Call a tool.

        Raises:
            UserError: A parameter is missing that the tool requires, by the last listing. Nothing was sent.
            MCPCeleryError: As `MCPSession.call_tool`, and a `UserError` as well; but an answer of the tool that says
                `isError` is returned, for the model to read.
            Exception: What a method of the task has raised (`on_elicitation`), and a `UserError` as well.
        """
        tool = next((tool for tool in self._tools or () if tool.name == tool_name), None)
        self._check_required(tool, tool_name, arguments)
        hints = tool.annotations if tool is not None else None
        may_run_twice = hints is not None and bool(hints.read_only_hint or hints.idempotent_hint)

        def call(session: "AsyncMCPSession") -> Coroutine[Any, Any, types.CallToolResult]:
            timeout = self.client_session_timeout_seconds or None
            return session.call_tool(tool_name, arguments, meta=meta, timeout=timeout, raise_on_error=False)

        try:
            return await self._ask(call, may_run_twice=may_run_twice)
        except MCPCeleryError as exc:
            raise _for_runner(exc) from exc
        except (MCPError, UserError):
            raise
        except Exception as exc:
            # Of a method of the task that was asked meanwhile: as without an agent, it ends the call and the task.
            raise _final(exc) from exc

    def _check_required(self, tool: types.Tool | None, name: str, arguments: dict[str, Any] | None) -> None:
        required = tool.input_schema.get("required") if tool is not None else None
        missing = [key for key in required if key not in (arguments or {})] if isinstance(required, list) else []
        if missing:
            raise UserError(
                f"Tool {name!r} of MCP server {self.name!r} was not called: required parameters are missing: "
                f"{', '.join(map(str, missing))}"
            )

    async def _filtered(
        self, tools: Sequence[types.Tool], run_context: RunContextWrapper[Any] | None, agent: "AgentBase[Any] | None"
    ) -> list[types.Tool]:
        """Return copies, so that nobody changes what is kept."""
        if self.tool_filter is None:
            return _copies(tools)
        if isinstance(self.tool_filter, dict):
            allowed = self.tool_filter.get("allowed_tool_names")
            blocked = self.tool_filter.get("blocked_tool_names", ())
            passing = [tool for tool in tools if allowed is None or tool.name in allowed]
            return _copies([tool for tool in passing if tool.name not in blocked])
        if run_context is None or agent is None:
            raise UserError("A tool filter that is a function needs the run_context and the agent")
        seen_by = ToolFilterContext(run_context=run_context, agent=agent, server_name=self.name)
        passed = [await self._passes(self.tool_filter, seen_by, tool) for tool in tools]
        return _copies([tool for tool, passes in zip(tools, passed, strict=True) if passes])

    async def _passes(self, tool_filter: ToolFilterCallable, seen_by: ToolFilterContext, tool: types.Tool) -> bool:
        try:
            outcome = tool_filter(seen_by, tool.model_copy(deep=True))
            return bool(await outcome if inspect.isawaitable(outcome) else outcome)
        except SoftTimeLimitExceeded:
            raise
        except Exception:
            logger.exception("The filter of tools has failed for %r of server %r: it is left out", tool.name, self.name)
            return False

    # -- Prompts and resources

    async def list_prompts(self) -> types.ListPromptsResult:
        """List the prompts, of all pages.

        Raises:
            UserError: There are too many pages.
        """
        pages = await self._pages(lambda cursor, session: session.list_prompts(cursor=cursor), "prompts")
        prompts = [prompt for page in pages for prompt in page.prompts]
        return pages[0].model_copy(update={"prompts": prompts, "next_cursor": None})

    async def get_prompt(self, name: str, arguments: dict[str, Any] | None = None) -> types.GetPromptResult:
        """Get a prompt."""
        return await self._ask(lambda session: session.get_prompt(name, arguments))

    async def list_resources(self, cursor: str | None = None) -> types.ListResourcesResult:
        """List one page of the resources."""
        return await self._ask(lambda session: session.list_resources(cursor=cursor))

    async def list_resource_templates(self, cursor: str | None = None) -> types.ListResourceTemplatesResult:
        """List one page of the resource templates."""
        return await self._ask(lambda session: session.list_resource_templates(cursor=cursor))

    async def read_resource(self, uri: str) -> types.ReadResourceResult:
        """Read a resource."""
        return await self._ask(lambda session: session.read_resource(uri))

    # -- Within

    async def _pages(
        self, page: "Callable[[str | None, AsyncMCPSession], Coroutine[Any, Any, P]]", what: str
    ) -> list[P]:
        pages: list[P] = []
        cursors: list[str | None] = [None]
        while True:
            if self.max_list_pages is not None and len(pages) == self.max_list_pages:
                raise UserError(f"MCP server {self.name!r} has more pages of {what} than max_list_pages")
            pages.append(await self._ask(partial(page, cursors[-1])))
            cursor = pages[-1].next_cursor
            if cursor is None:
                return pages
            if cursor in cursors:
                raise UserError(f"MCP server {self.name!r} has given a cursor of its {what} twice")
            cursors.append(cursor)

    async def _ask(
        self, call: "Callable[[AsyncMCPSession], Coroutine[Any, Any, T]]", *, may_run_twice: bool = True
    ) -> T:
        """Make a request, and again as `max_retry_attempts` says."""
        retries = 0
        while True:
            try:
                return await self._session.on_loop(call)
            except TransportError as exc:
                # Where the session is still not open, nothing was called in it.
                is_safe = may_run_twice or not exc.sent or self._session.is_untouched
                if not is_safe or retries == self.max_retry_attempts:
                    raise
            await asyncio.sleep(self._pause_seconds(retries))
            retries += 1

    def _pause_seconds(self, retries: int) -> float:
        longest = math.inf if self.retry_backoff_seconds_max is None else self.retry_backoff_seconds_max
        return min(self.retry_backoff_seconds_base * 2.0 ** min(retries, 1000), longest)

    def _get_failure_error_function(
        self, agent_failure_error_function: ToolErrorFunction | None
    ) -> ToolErrorFunction | None:
        """Return what turns a failed call into a text for the model: what was chosen, for what the model can act on."""
        # Of the SDK's own, private: no other place sees the choice of the agent.
        function = super()._get_failure_error_function(agent_failure_error_function)
        return None if function is None else partial(_tell_or_raise, function)


def _tell_or_raise(function: ToolErrorFunction, context: RunContextWrapper[Any], error: Exception) -> Any:
    if (limit := _limit_in(error)) is not None:
        raise _for_runner(limit)
    if isinstance(error, _TaskMethodError):
        raise error
    if isinstance(error, TransportError):
        if function is default_tool_error_function:  # it asks for another try
            known = "may or may not have run: find out before you call it again" if error.sent else "did not run"
            return f"{error}. The tool {known}."
    elif isinstance(error, MCPCeleryError) and not isinstance(error, ToolError):
        raise error
    return function(context, error)


def _limit_in(error: BaseException | None) -> SoftTimeLimitExceeded | None:
    """Return the soft time limit that *error* comes from: `Runner.run_sync` may meet it in whatever it does."""
    while error is not None and not isinstance(error, SoftTimeLimitExceeded):
        error = error.__cause__
    return error


class _TaskMethodError(UserError):
    """What a method of the task has raised: nothing for a model to act on."""


def _final(exc: Exception) -> Exception:
    """Return *exc* as an error that ends the run."""
    try:
        return _for_runner(exc, _TaskMethodError)
    except TypeError:  # of a class that may have no subclasses, or whose objects are made otherwise
        return _TaskMethodError(f"A method of the task has failed: {type(exc).__name__}")


def _for_runner(exc: Exception, base: type[UserError] = UserError) -> Exception:
    """Return *exc* as an error that agents' runner lets through: it wraps all but its own."""
    kind = _passing(type(exc), base)
    error = kind.__new__(kind, *exc.args)  # constructors of the two differ
    vars(error).update(vars(exc), run_data=None)
    return error


def _passing(kind: type[Exception], base: type[UserError]) -> type[Exception]:
    """Return a class that is *kind* by its name, by `except` and in result backends, and *base* as well."""

    def reduce(self: Exception) -> tuple[type[Exception], tuple[Any, ...]]:
        return kind, self.args

    names = {"__module__": kind.__module__, "__doc__": kind.__doc__, "__reduce__": reduce}
    return cast("type[Exception]", type(kind.__name__, (kind, base), names))


def _copies(tools: Sequence[types.Tool]) -> list[types.Tool]:
    return [tool.model_copy(deep=True) for tool in tools]
