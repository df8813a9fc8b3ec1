"""The MCP server of these tests, on port 8000. What is asked of it goes into a file, and outlives a restart there."""

import json
from pathlib import Path

import anyio
import uvicorn
from mcp.server.mcpserver import Context, MCPServer
from offer import Replay, offer
from starlette.types import ASGIApp, Message, Receive, Scope, Send

#: A line of JSON for each request, once it is answered, and for each execution of a tool that must not run twice.
LOG = Path("/tmp/log.jsonl")  # noqa: S108 - of a container
#: A folder; `hold` goes on until it has a file of the marker's name.
GATES = Path("/tmp/gates")  # noqa: S108 - as above


def note(**what: object) -> None:
    with LOG.open("a") as log:
        log.write(json.dumps(what) + "\n")


class Recorded:
    """Notes each request when its answer begins: method, JSON-RPC method, tool, session ID and status."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self._app(scope, receive, send)
        body = bytearray()

        async def received() -> Message:
            message = await receive()
            body.extend(message.get("body", b""))
            return message

        async def answered(message: Message) -> None:
            if message["type"] == "http.response.start":
                rpc = json.loads(body) if body else {}
                headers = dict([*message["headers"], *scope["headers"]])
                note(
                    request=" ".join(filter(None, [scope["method"], rpc.get("method")])),
                    tool=rpc.get("params", {}).get("name"),
                    session=headers.get(b"mcp-session-id", b"").decode(),
                    status=message["status"],
                )
            await send(message)

        return await self._app(scope, received, answered)


def main() -> None:
    server = MCPServer("server", log_level="WARNING")  # at INFO, the SDK logs session IDs
    offer(server)

    @server.tool()
    async def mark(marker: str) -> str:
        note(executed=marker)
        return marker

    @server.tool()
    async def hold(marker: str, ctx: Context) -> str:
        """Report progress until the gate is open."""
        note(executed=marker)
        step = 0
        while not (GATES / marker).exists():
            step += 1
            await ctx.report_progress(step)
            await anyio.sleep(0.2)
        return marker

    GATES.mkdir(exist_ok=True)
    LOG.touch()
    app = server.streamable_http_app(host="0.0.0.0", event_store=Replay())  # noqa: S104 - in a container
    # Who stops the container waits for no stream.
    uvicorn.run(Recorded(app), host="0.0.0.0", port=8000, log_level="warning", timeout_graceful_shutdown=1)  # noqa: S104


if __name__ == "__main__":
    main()
