"""A test server on the Python SDK 2.x: `python_server.py PORT [options]`, on 127.0.0.1."""

import argparse
import hashlib
import json
import sys
from pathlib import Path
from typing import Annotated

import mcp.server.runner
import mcp.server.streamable_http_manager
import uvicorn
from mcp.server.elicitation import ElicitationResult
from mcp.server.mcpserver import MCPServer
from mcp.server.mcpserver.resolve import Elicit, Resolve
from mcp.server.streamable_http import EventStore
from mcp.types import INVALID_REQUEST, UNSUPPORTED_PROTOCOL_VERSION
from mcp_types.version import HANDSHAKE_PROTOCOL_VERSIONS, MODERN_PROTOCOL_VERSIONS
from offer import Answer, Replay, offer, offer_log
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.types import ASGIApp, Receive, Scope, Send


def negotiate_at_most(version: str) -> None:
    """Make the SDK, which has no switch for it, a server from before the versions after *version*."""
    served = HANDSHAKE_PROTOCOL_VERSIONS[: HANDSHAKE_PROTOCOL_VERSIONS.index(version) + 1]
    mcp.server.runner.HANDSHAKE_PROTOCOL_VERSIONS = served
    mcp.server.runner.LATEST_HANDSHAKE_VERSION = version


class VersionGate:
    """Turns requests away whose `MCP-Protocol-Version` is not served, as servers of one era do."""

    def __init__(self, app: ASGIApp, served: tuple[str, ...]) -> None:
        self._app = app
        self._served = served

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and (refusal := await self._refusal(Request(scope, receive))):
            await refusal(scope, receive, send)
        else:
            await self._app(scope, receive, send)

    async def _refusal(self, request: Request) -> Response | None:
        version = request.headers.get("mcp-protocol-version")
        if version in self._served:
            return None
        if self._served == MODERN_PROTOCOL_VERSIONS:
            return await self._modern_refusal(request, version)
        if version is None:
            return None
        error = {"code": INVALID_REQUEST, "message": f"Bad Request: Unsupported protocol version: {version}"}
        return JSONResponse({"jsonrpc": "2.0", "id": "server-error", "error": error}, status_code=400)

    async def _modern_refusal(self, request: Request, version: str | None) -> Response:
        """MCP 2026-07-28, Versioning: a request of another version gets UnsupportedProtocolVersionError."""
        if request.method != "POST":
            return Response(status_code=405, headers={"Allow": "POST"})
        message = json.loads(await request.body())
        requested = (message.get("params") or {}).get("protocolVersion", version)
        error = {
            "code": UNSUPPORTED_PROTOCOL_VERSION,
            "message": "Unsupported protocol version",
            "data": {"supported": list(self._served), "requested": requested},
        }
        return JSONResponse({"jsonrpc": "2.0", "id": message.get("id"), "error": error}, status_code=400)


def offer_list_of_sessions(server: MCPServer) -> None:
    """`GET /sessions`: the sessions that are open now, as `SessionHandle.key` has them."""

    @server.custom_route("/sessions", methods=["GET"])
    async def sessions(_: Request) -> Response:
        open_now = list(server.session_manager._server_instances)
        return JSONResponse([hashlib.sha256(session_id.encode()).hexdigest()[:24] for session_id in open_now])


def offer_confirmation(server: MCPServer) -> None:
    """Register tools that ask back by an `InputRequiredResult`, where the client speaks 2026-07-28."""

    async def confirm(item: str) -> Elicit[Answer]:
        return Elicit(f"Delete {item}?", Answer)

    @server.tool()
    async def delete(item: str, confirmed: Annotated[ElicitationResult[Answer], Resolve(confirm)]) -> str:
        answer = confirmed.data.answer if confirmed.action == "accept" else ""
        return f"{item}: {confirmed.action} {answer}".strip()


def event_store(arguments: argparse.Namespace) -> EventStore | None:
    if arguments.event_store_url:
        sys.path.append(str(Path(__file__).parents[2]))
        from examples.redis_event_store import RedisEventStore

        return RedisEventStore(arguments.event_store_url)
    return Replay() if arguments.event_store else None


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("port", type=int)
    parser.add_argument("--json", action="store_true", help="answer with JSON bodies, not event streams")
    parser.add_argument("--event-store", action="store_true", help="give events IDs and replay them")
    parser.add_argument("--event-store-url", help="the same, with the events in this Redis")
    parser.add_argument("--executions", type=Path, help="offer `mark` and `marks`, and log each execution there")
    parser.add_argument("--stateless", action="store_true", help="hand out no session IDs")
    parser.add_argument("--idle", type=float, default=1800, help="seconds until an idle session is dropped")
    era = parser.add_mutually_exclusive_group()
    era.add_argument("--protocol-version", choices=HANDSHAKE_PROTOCOL_VERSIONS, help="the newest version served")
    era.add_argument("--modern-only", action="store_true", help="serve 2026-07-28 and nothing else")
    return parser.parse_args()


def main() -> None:
    arguments = parse_arguments()
    server = MCPServer("python", log_level="WARNING")
    offer(server)
    if arguments.executions:
        offer_log(server, arguments.executions)
    offer_list_of_sessions(server)
    offer_confirmation(server)
    events = event_store(arguments)
    app: ASGIApp = server.streamable_http_app(
        json_response=arguments.json,
        stateless_http=arguments.stateless,
        event_store=events,
        session_idle_timeout=arguments.idle,
    )
    if arguments.event_store_url:
        app = events.around(app)
    if arguments.protocol_version:
        negotiate_at_most(arguments.protocol_version)
        app = VersionGate(app, mcp.server.runner.HANDSHAKE_PROTOCOL_VERSIONS)
    if arguments.modern_only:
        app = VersionGate(app, MODERN_PROTOCOL_VERSIONS)
    uvicorn.run(app, host="127.0.0.1", port=arguments.port, log_level="warning")


if __name__ == "__main__":
    main()
