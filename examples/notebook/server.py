"""A notebook behind MCP: each session has variables of its own, and they go when the session goes."""

import ast
import hashlib
import json
import operator
import os
import time
from collections import deque
from http import HTTPStatus

import anyio
import uvicorn
from mcp.server import MCPServer
from mcp.server.mcpserver import Context
from mcp.server.mcpserver.exceptions import ToolError
from starlette.datastructures import Headers
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from examples.notebook.events import EventsInMemory
from examples.redis_event_store import RedisEventStore

OPERATORS = {ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.Div: operator.truediv}
variables: dict[str, dict[str, float]] = {}  # of each open session
deletes: deque[str] = deque(maxlen=1000)  # the session that each DELETE named, as a short hash
log: deque[dict] = deque(maxlen=1000)  # what was asked for and what was run, in which session
server = MCPServer("notebook", log_level="WARNING")  # at INFO the SDK logs raw session IDs


def names(ctx: Context) -> dict[str, float]:
    try:
        return variables[(ctx.headers or {})["mcp-session-id"]]
    except KeyError:
        raise ToolError("variables live in a session: start with initialize") from None


def compute(node: ast.AST, known: dict[str, float]) -> float:
    match node:
        case ast.Constant(value=int() | float() as number):
            return float(number)
        case ast.Name(id=name) if name in known:
            return known[name]
        case ast.BinOp(left=left, op=op, right=right) if type(op) in OPERATORS:
            return OPERATORS[type(op)](compute(left, known), compute(right, known))
    raise ToolError(f"neither arithmetic nor a variable of this session: {ast.unparse(node)}")


@server.tool()
def evaluate(expression: str, ctx: Context) -> float:
    try:
        return compute(ast.parse(expression, mode="eval").body, names(ctx))
    except (SyntaxError, ValueError, ArithmeticError) as exc:
        raise ToolError(f"{expression}: {exc}") from exc


@server.tool()
def assign(name: str, expression: str, ctx: Context) -> float:
    note_run(ctx, "assign runs")
    names(ctx)[name] = value = evaluate(expression, ctx)
    return value


@server.tool(name="variables")
def list_variables(ctx: Context) -> dict[str, float]:
    return names(ctx)


@server.tool()
async def simulate(name: str, expression: str, steps: int, seconds: float, ctx: Context) -> float:
    """Assign *expression* to *name* again and again, *steps* times in *seconds*, and report progress."""
    note_run(ctx, "simulate runs")
    for step in range(1, steps + 1):
        await anyio.sleep(seconds / steps)
        names(ctx)[name] = evaluate(expression, ctx)
        note_run(ctx, f"simulate: step {step} of {steps}")
        await ctx.report_progress(step, steps)
    note_run(ctx, "simulate has run")
    return names(ctx)[name]


@server.custom_route("/sessions", methods=["GET"])
async def sessions(_: Request) -> JSONResponse:
    return JSONResponse({"open": [short_id(session_id) for session_id in variables], "deletes": list(deletes)})


@server.custom_route("/log", methods=["GET"])
async def show_log(_: Request) -> JSONResponse:
    return JSONResponse(list(log))


def short_id(session_id: str) -> str:
    return hashlib.sha256(session_id.encode()).hexdigest()[:8]


def write_log(what: str, session_id: str) -> None:
    entry = {"at": time.time(), "session": short_id(session_id) if session_id else "-", "what": what}
    log.append(entry)
    print(what, entry["session"], flush=True)


def note_run(ctx: Context, what: str) -> None:
    write_log(what, (ctx.headers or {}).get("mcp-session-id", ""))


def note(method: str, rpc: str, status: int, session_id: str) -> None:
    """Log an answered request, and keep variables for just the sessions that the server has open."""
    write_log(f"{method} {rpc} {status}", session_id)
    if method == "DELETE":
        deletes.append(short_id(session_id))
    if rpc == "initialize" and session_id not in variables:
        variables[session_id] = {}
        print("session opened", short_id(session_id), flush=True)
    elif (method == "DELETE" or status == HTTPStatus.NOT_FOUND) and variables.pop(session_id, None) is not None:
        print("session closed", short_id(session_id), flush=True)


def watched(app: ASGIApp) -> ASGIApp:
    async def serve(scope: Scope, receive: Receive, send: Send) -> None:
        body = bytearray()

        async def read() -> Message:
            message = await receive()
            body.extend(message.get("body", b""))
            return message

        async def answer(message: Message) -> None:
            if message["type"] == "http.response.start" and scope["path"] == "/mcp":
                asked, given = Headers(scope=scope), Headers(raw=message["headers"])
                session_id = asked.get("mcp-session-id") or given.get("mcp-session-id", "")
                accepted = body and message["status"] < HTTPStatus.BAD_REQUEST
                rpc = json.loads(body).get("method", "response") if accepted else "-"
                note(scope["method"], rpc, message["status"], session_id)
            await send(message)

        await app(scope, read, answer)

    return serve


if __name__ == "__main__":
    host, port = os.environ.get("NOTEBOOK_HOST", "127.0.0.1"), int(os.environ.get("NOTEBOOK_PORT", "8000"))
    if redis_url := os.environ.get("REDIS_URL"):
        events = RedisEventStore(redis_url)
        app = events.around(server.streamable_http_app(host=host, event_store=events))
    else:
        app = server.streamable_http_app(host=host, event_store=EventsInMemory())
    uvicorn.run(watched(app), host=host, port=port, log_level="warning", timeout_graceful_shutdown=2)
