"""`tool`: workflows of tools, with no task function of one's own."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from celery import shared_task, signature

from .exceptions import ConfigurationError
from .execution import execution_of
from .handle import SessionHandle, server_name
from .task import MCPTask
from .workflow import KEY

if TYPE_CHECKING:
    from celery.canvas import Signature
    from mcp_types import CallToolResult

NAME = "mcp_celery.tool"


def tool(
    server: str,
    name: str,
    arguments: Mapping[str, Any] | None = None,
    /,
    *,
    into: str | None = None,
    timeout: float | None = None,
    mcp_session: SessionHandle | None = None,
    **more_arguments: Any,
) -> "Signature":
    """Return a Celery signature that calls a tool: a step of a workflow, like that of any MCP task.

        chain(
            tool("browser", "browser_navigate", url="https://example.com"),
            tool("browser", "browser_snapshot"),
            tool("notebook", "add_page", title="Example", into="content"),
        )()

    Its result is the structured content of the tool's answer where there is any, else the text. Where there are
    images or other content besides, it is the list of all content blocks, as the protocol writes them in JSON.

    Args:
        server: A name in `app.conf.mcp_servers`, where the step runs.
        name: The tool.
        arguments: Arguments of the tool, for those that cannot be written as keyword arguments here.
        into: The argument of the tool that is to be the result of the previous step. Else that result is dropped.
            Where that is `{"result": x}` and no more, as servers of the Python SDK wrap plain values, it is x.
        timeout: Seconds for the whole call; then it is cancelled at the server.
        mcp_session: A session that you keep, to continue it.
        more_arguments: Arguments of the tool.

    Raises:
        ConfigurationError: *server* is a URL: those may hold credentials, and signatures show their arguments. Or an
            argument is given twice, or is of the wrong type.
    """
    if "://" in server:
        raise ConfigurationError("tool() takes the name of a server in mcp_servers: put the URL there")
    if not isinstance(arguments, Mapping | None):
        raise ConfigurationError(f"The arguments of tool {name!r} are a mapping of names to values")
    if timeout is not None and (isinstance(timeout, bool) or not isinstance(timeout, int | float)):
        raise ConfigurationError(
            f"timeout is a number of seconds; an argument of tool {name!r} by that name goes into the mapping"
        )
    twice = sorted((arguments or {}).keys() & more_arguments.keys())
    if twice:
        raise ConfigurationError(f"Given twice to tool {name!r}: {', '.join(twice)}")
    arguments = {**(arguments or {}), **more_arguments}
    if into in arguments:
        raise ConfigurationError(f"The argument {into!r} of tool {name!r} is given, and is to be the previous result")
    kwargs: dict[str, Any] = {"server": server, "tool": name, "arguments": arguments}
    options = {"into": into, "timeout": timeout, KEY: mcp_session}
    kwargs |= {option: value for option, value in options.items() if value is not None}
    return signature(NAME, kwargs=kwargs)


class ToolTask(MCPTask):
    """The ready-made task behind `tool`, one in each app. Its server is among its arguments."""

    abstract = True

    def server_names(self) -> tuple[str, ...]:
        """Return all servers of the app."""
        servers = self.app.conf.get("mcp_servers") or {}
        return tuple(servers) if isinstance(servers, Mapping) else ()

    def _servers_for(self, kwargs: dict[str, Any]) -> tuple[str, ...]:
        return (str(kwargs.get("server")),)


@shared_task(base=ToolTask, bind=True, name=NAME)  # type: ignore[untyped-decorator]  # Celery has no types
def call_tool(
    self: ToolTask,
    *previous: Any,
    server: str,
    tool: str,
    arguments: Mapping[str, Any],
    into: str | None = None,
    timeout: float | None = None,
) -> Any:
    """Call a tool; *previous* is the result of the step before, if one came.

    Raises:
        ConfigurationError: There is no such server or tool, the tool takes other arguments, or there is no result for
            *into*. The tool was not called.
    """
    execution = execution_of(self.request)
    if execution is None or server not in self.server_names():
        known = ", ".join(sorted(map(str, self.server_names()))) or "none"
        raise ConfigurationError(f"MCP server {server_name(server)!r} is not in mcp_servers (configured: {known})")
    if into is not None:
        if len(previous) != 1:
            raise ConfigurationError(
                f"Tool {tool!r} takes the previous result into {into!r}, and {len(previous) or 'no'} results came: it "
                "is for a step that follows another one, and not for .si() or set(immutable=True)"
            )
        arguments = {**arguments, into: unwrapped(previous[0])}
    session = execution.session(server)
    return result_of(session.call_tool(tool, dict(arguments), timeout=timeout, check_arguments=True))


def unwrapped(result: Any) -> Any:
    """Return x for `{"result": x}`, in which servers of the Python SDK wrap plain values; also within a list."""
    if isinstance(result, list):
        return [unwrapped(item) for item in result]
    return result["result"] if isinstance(result, dict) and result.keys() == {"result"} else result


def result_of(answer: "CallToolResult") -> Any:
    """Return what fits into a message of the answer of a tool."""
    if answer.structured_content is not None:
        return answer.structured_content
    if all(block.type == "text" for block in answer.content):
        return "\n".join(block.text for block in answer.content if block.type == "text")
    return [block.model_dump(mode="json", by_alias=True, exclude_none=True) for block in answer.content]
