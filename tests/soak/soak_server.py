"""The MCP server of the soak: the Python SDK's, with sessions and events in a Redis: `soak_server.py PORT REDIS_URL`.

It keeps nothing of a session that has ended, so what grows here is the SDK's.
"""

import sys
from pathlib import Path

import anyio
import uvicorn
from mcp.server.mcpserver import Context, MCPServer
from mcp.server.mcpserver.exceptions import ToolError

_ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(_ROOT), str(_ROOT / "tests" / "peers")]

from python_server import offer_list_of_sessions  # noqa: E402 - found by the lines above

from examples.redis_event_store import RedisEventStore  # noqa: E402 - as above

#: A session that no worker knows of, since that was killed before it could record it, is dropped after so long.
IDLE_SECONDS = 60
#: How long events are kept. A call that is continued after so long is not.
EVENTS_SECONDS = 60


def offer(server: MCPServer) -> None:
    notes: dict[str, set[int]] = {}

    def notes_of(ctx: Context) -> set[int]:
        """What the session has noted, and a look at which of the others have ended."""
        open_now = server.session_manager._server_instances
        for session_id in [session_id for session_id in notes if session_id not in open_now]:
            del notes[session_id]
        return notes.setdefault(ctx.request_context.request.headers["mcp-session-id"], set())

    @server.tool()
    async def note(number: int, seconds: float, ctx: Context) -> int:
        """Keep *number* in the session; take *seconds*, in four steps that are reported."""
        notes_of(ctx).add(number)
        for step in range(1, 5):
            await anyio.sleep(seconds / 4)
            await ctx.report_progress(step, 4, f"step {step}")
        return number

    @server.tool()
    async def noted(ctx: Context) -> list[int]:
        return sorted(notes_of(ctx))

    @server.tool()
    async def fail() -> str:
        raise ToolError("it failed")


def main() -> None:
    port, url = sys.argv[1:]
    server = MCPServer("soak", log_level="WARNING")
    offer(server)
    offer_list_of_sessions(server)
    events = RedisEventStore(url, ttl_seconds=EVENTS_SECONDS)
    app = events.around(server.streamable_http_app(event_store=events, session_idle_timeout=IDLE_SECONDS))
    uvicorn.run(app, host="127.0.0.1", port=int(port), log_level="warning")


if __name__ == "__main__":
    main()
