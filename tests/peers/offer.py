"""What the Python test servers offer: the same on both generations of the SDK, which this module runs on."""

import json
import os
import secrets
from collections import defaultdict
from pathlib import Path
from typing import Any

import anyio
from mcp.server.streamable_http import EventCallback, EventMessage, EventStore
from mcp.shared.message import ServerMessageMetadata
from mcp.types import (
    Completion,
    JSONRPCMessage,
    ListRootsRequest,
    ListRootsResult,
    PromptListChangedNotification,
    ResourceListChangedNotification,
    SamplingMessage,
    ServerNotification,
    ServerRequest,
    TextContent,
    ToolAnnotations,
    ToolListChangedNotification,
)
from pydantic import BaseModel

try:
    from mcp.server.mcpserver import Context
    from mcp.server.mcpserver.exceptions import ToolError
except ImportError:  # mcp 1.x
    from mcp.server.fastmcp import Context
    from mcp.server.fastmcp.exceptions import ToolError


class Replay(EventStore):
    """Keeps every event in memory, as an example server does: one store for all sessions.

    The SDK names a stream after its JSON-RPC request ID alone, so sessions that use the same IDs share streams.
    """

    def __init__(self) -> None:
        self._events: list[tuple[str, JSONRPCMessage | None]] = []

    async def store_event(self, stream_id: str, message: JSONRPCMessage | None) -> str:
        self._events.append((stream_id, message))
        return str(len(self._events))

    async def replay_events_after(self, last_event_id: str, send_callback: EventCallback) -> str | None:
        """Send what came after *last_event_id* on its stream; the SDK then attaches the caller to what is to come."""
        if not (last_event_id.isdecimal() and 0 < int(last_event_id) <= len(self._events)):
            return None
        position = int(last_event_id)
        stream_id = self._events[position - 1][0]
        while position < len(self._events):
            stream, message = self._events[position]
            position += 1
            if stream == stream_id and message is not None:
                await send_callback(EventMessage(message, str(position)))
        return stream_id


class Answer(BaseModel):
    answer: str


def offer(server: Any) -> None:
    """Register the tools, resources, prompt and completion that every test server has."""
    _offer_state(server)
    _offer_work(server)
    _offer_questions(server)
    _offer_elicitation(server)
    _offer_notifications(server)
    _offer_texts(server)


def _offer_state(server: Any) -> None:
    sessions: dict[str, dict[str, str]] = defaultdict(dict)

    def variables(ctx: Context) -> dict[str, str]:
        session_id = ctx.request_context.request.headers.get("mcp-session-id")
        return sessions[session_id] if session_id else {}

    @server.tool()
    async def set_variable(name: str, value: str, ctx: Context) -> str:
        variables(ctx)[name] = value
        return "set"

    @server.tool()
    async def get_variable(name: str, ctx: Context) -> str:
        try:
            return variables(ctx)[name]
        except KeyError:
            raise ToolError(f"{name} is not set in this session") from None


def _offer_work(server: Any) -> None:
    executed = 0

    @server.tool()
    async def echo(text: str) -> str:
        """Return *text* after up to 20 ms, so that calls that overlap end out of order."""
        await anyio.sleep(secrets.randbelow(20) / 1000)
        return text

    @server.tool()
    async def add(a: int, b: int) -> int:
        return a + b

    async def work(steps: int, seconds: float, ctx: Context) -> str:
        for step in range(1, steps + 1):
            await anyio.sleep(seconds)
            await ctx.report_progress(step, steps, f"step {step}")
        return "done"

    @server.tool()
    async def slow(steps: int, seconds: float, ctx: Context) -> str:
        """Take *steps* steps of *seconds* each and report progress after each."""
        nonlocal executed
        executed += 1
        return await work(steps, seconds, ctx)

    @server.tool(annotations=ToolAnnotations.model_validate({"readOnlyHint": True}))
    async def slow_look(steps: int, seconds: float, ctx: Context) -> str:
        """The same, and it changes nothing."""
        return await work(steps, seconds, ctx)

    @server.tool(annotations=ToolAnnotations.model_validate({"idempotentHint": True}))
    async def slow_put(steps: int, seconds: float, ctx: Context) -> str:
        """The same, and it changes nothing the second time."""
        return await work(steps, seconds, ctx)

    @server.tool()
    async def executions() -> int:
        """How many times `slow` was started in this process."""
        return executed

    @server.tool()
    async def fail() -> str:
        raise ToolError("it failed")


def _offer_questions(server: Any) -> None:
    """Register tools that ask the client for a model and for roots."""

    @server.tool()
    async def ask_model(prompt: str, ctx: Context) -> str:
        message = SamplingMessage(role="user", content=TextContent(type="text", text=prompt))
        try:
            result = await ctx.session.create_message(
                [message], max_tokens=10, related_request_id=ctx.request_context.request_id
            )
        except Exception as exc:  # noqa: BLE001 - the answer was an error
            return f"refused: {exc}"
        return f"{result.model}: {result.content.text}"

    @server.tool()
    async def ask_roots(ctx: Context) -> str:
        metadata = ServerMessageMetadata(related_request_id=ctx.request_context.request_id)
        request = ListRootsRequest(method="roots/list")
        if isinstance(ServerRequest, type):  # mcp 1.x
            request = ServerRequest(request)
        try:
            result = await ctx.session.send_request(request, ListRootsResult, metadata=metadata)
        except Exception as exc:  # noqa: BLE001 - as above
            return f"refused: {exc}"
        return " ".join(str(root.uri) for root in result.roots)


def _offer_elicitation(server: Any) -> None:
    @server.tool()
    async def ask_user(question: str, ctx: Context) -> str:
        try:
            result = await ctx.elicit(question, Answer)
        except Exception as exc:  # noqa: BLE001 - as above
            return f"refused: {exc}"
        return f"{result.action}: {result.data.answer}" if result.action == "accept" else result.action

    @server.tool()
    async def ask_to_visit(url: str, ctx: Context) -> str:
        return (await ctx.elicit_url("Please visit", url, "visit-1")).action

    @server.tool()
    async def ask_twice(ctx: Context) -> str:
        """Ask, report, and ask again: what a broken response has to be continued through."""
        first = await ctx.elicit("first", Answer)
        await ctx.report_progress(1, 2, "asked once")
        second = await ctx.elicit("second", Answer)
        return f"{first.data.answer} {second.data.answer}"


def _offer_notifications(server: Any) -> None:
    @server.tool()
    async def burst(reports: int, seconds: float, ctx: Context) -> str:
        """Report *reports* times at once, then take *seconds*."""
        for report in range(1, reports + 1):
            await ctx.report_progress(report, reports)
        await anyio.sleep(seconds)
        return "done"

    @server.tool()
    async def say(level: str, text: str, ctx: Context) -> str:
        """Log *text*, in which {session} stands for the session's own ID, and report it as progress."""
        text = text.replace("{session}", ctx.request_context.request.headers.get("mcp-session-id") or "")
        await ctx.log(level, text)
        await ctx.report_progress(1, 1, text)
        return "said"

    @server.tool()
    async def log_and_wait(seconds: float, ctx: Context) -> str:
        """Log at once, then take *seconds*."""
        await ctx.log("info", "about to wait")
        await anyio.sleep(seconds)
        return "waited"

    @server.tool()
    async def announce(ctx: Context, to_whom_it_concerns: bool = False) -> str:
        """Say that the tools, resources and prompts have changed: to the caller, or on the standalone stream."""
        related = None if to_whom_it_concerns else ctx.request_context.request_id
        for kind, what in (
            (ToolListChangedNotification, "tools"),
            (ResourceListChangedNotification, "resources"),
            (PromptListChangedNotification, "prompts"),
        ):
            notification = kind(method=f"notifications/{what}/list_changed")
            if isinstance(ServerNotification, type):  # mcp 1.x
                notification = ServerNotification(notification)
            await ctx.session.send_notification(notification, related_request_id=related)
        return "announced"


def offer_log(server: Any, path: Path) -> None:
    """Register tools that must not run twice, and the log that tells whether they did.

    The log is a line of JSON for the start and for the end of each execution; it goes on when the server is restarted.
    """
    sessions: dict[str | None, list[str]] = defaultdict(list)

    def note(what: str, marker: str) -> None:
        line = json.dumps({"what": what, "marker": marker, "server": os.getpid()})
        with path.open("a") as log:
            log.write(line + "\n")

    @server.tool()
    async def mark(marker: str, seconds: float, steps: int, ctx: Context) -> str:
        """Take *seconds* in *steps* steps, reporting progress; return *marker*, which is to be given once."""
        note("start", marker)
        sessions[ctx.request_context.request.headers.get("mcp-session-id")].append(marker)
        for step in range(1, steps + 1):
            await anyio.sleep(seconds / steps)
            await ctx.report_progress(step, steps, marker)
        note("end", marker)
        return marker

    @server.tool(annotations=ToolAnnotations(readOnlyHint=True))
    async def marks(ctx: Context) -> list[str]:
        """The markers that this session was given, in order."""
        return sessions[ctx.request_context.request.headers.get("mcp-session-id")]


def _offer_texts(server: Any) -> None:
    @server.resource("note://hello")
    async def hello() -> str:
        return "hello"

    @server.resource("note://people/{name}")
    async def person(name: str) -> str:
        return f"a note on {name}"

    @server.prompt()
    async def greet(name: str) -> str:
        return f"Greet {name}."

    @server.completion()
    async def complete(_ref: Any, argument: Any, _context: Any) -> Completion:
        return Completion(values=[name for name in ("Ada", "Alan", "Grace") if name.startswith(argument.value)])
