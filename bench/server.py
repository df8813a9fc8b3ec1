"""An MCP server of the Python SDK over Streamable HTTP that counts what reaches it.

`python -m bench.server PORT [--event-store]`
"""

import sys
from collections import Counter

import uvicorn
from mcp.server import MCPServer
from mcp_types.version import MODERN_PROTOCOL_VERSIONS
from starlette.datastructures import Headers
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse
from starlette.types import Receive, Scope, Send
from uvicorn.protocols.http.auto import AutoHTTPProtocol

from examples.notebook.events import EventsInMemory

server = MCPServer("bench", log_level="WARNING")
counts: Counter[str] = Counter()
#: Where connections came from that have not asked for anything yet.
fresh: set[tuple[str, int]] = set()


@server.tool()
def add(a: int, b: int) -> int:
    return a + b


@server.custom_route("/counts", methods=["GET"])
async def show_counts(_: Request) -> JSONResponse:
    return JSONResponse({"requests": counts["requests"], "connections": counts["connections"]})


class NotingProtocol(AutoHTTPProtocol):
    def connection_made(self, transport):
        fresh.add(transport.get_extra_info("peername"))
        super().connection_made(transport)


class CountingApp:
    """Counts the requests to the MCP endpoint, and the connections that at least one of them came on.

    `/sessions` is the same endpoint as a server before 2026-07-28 has it: clients that prefer to do without a session
    open one there.
    """

    def __init__(self) -> None:
        self.app = server.streamable_http_app(event_store=EventsInMemory() if "--event-store" in sys.argv else None)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        app = self.app
        if scope["type"] == "http" and scope["path"] in {"/mcp", "/sessions"}:
            counts["requests"] += 1
            if scope["client"] in fresh:
                fresh.discard(scope["client"])
                counts["connections"] += 1
            if scope["path"] == "/sessions":
                version = Headers(scope=scope).get("mcp-protocol-version")
                if version in MODERN_PROTOCOL_VERSIONS:
                    app = PlainTextResponse("Bad Request: Unsupported protocol version", status_code=400)
                scope = {**scope, "path": "/mcp"}
        await app(scope, receive, send)


if __name__ == "__main__":
    uvicorn.run(
        CountingApp(), port=int(sys.argv[1]), http=NotingProtocol, log_level="warning", timeout_graceful_shutdown=1
    )
