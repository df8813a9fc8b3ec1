"""What a check of a server shows, on real servers of both eras."""

import anyio
import mcp_types as types
import pytest
import uvicorn
from mcp.server.lowlevel import Server
from processes import free_port
from properties.quick_server import QuickServer

from mcp_celery.check import check_all
from mcp_celery.settings import ServerSettings

pytestmark = pytest.mark.anyio


async def look(url, **options):
    (check,) = await check_all([ServerSettings(name="server", url=url, **options)])
    return check


@pytest.mark.parametrize(
    ("peer", "version", "has_session", "has_event_store"),
    [
        (("python", "--event-store"), "2025-11-25", True, True),
        (("python",), "2025-11-25", True, False),
        (("python", "--json"), "2025-11-25", True, False),
        (("python", "--stateless"), "2025-11-25", False, False),
        (("python", "--event-store", "--protocol-version", "2025-06-18"), "2025-06-18", True, None),
        (("python", "--modern-only"), "2026-07-28", False, False),
        (("typescript", "--event-store"), "2025-11-25", True, True),
        (("everything",), "2025-11-25", True, True),
    ],
)
async def test_a_check_tells_the_era_sessions_event_stores_and_tools(
    recorded_peer, peer, version, has_session, has_event_store
):
    recorder = recorded_peer(*peer)
    check = await look(recorder.url)
    assert (check.error, check.protocol_version) == (None, version)
    assert check.era == ("stateless" if version == "2026-07-28" else "handshake")
    assert (check.session, check.event_store) == (has_session, has_event_store)
    assert check.tools >= 7
    assert 0 < check.latency_seconds < 10
    assert recorder.methods().count("DELETE") == has_session


async def test_a_server_that_cannot_be_reached_or_refuses_says_why(recorded_peer):
    assert "could not be reached" in (await look(f"http://127.0.0.1:{free_port()}/mcp")).error
    recorder = recorded_peer("python")
    recorder.answer(status=401, rpc_method="initialize")
    assert "HTTP 401" in (await look(recorder.url)).error
    recorder.drop(rpc_method="ping")
    assert "broke off" in (await look(recorder.url)).error
    assert recorder.methods()[-1] == "DELETE"


async def test_a_server_that_answers_to_a_ping_with_what_is_not_mcp_says_why():
    class Strange(QuickServer):
        """Answers to a ping with what no result may be, and is right in everything else."""

        def _answer(self, method, headers, body):
            status, more, answer = super()._answer(method, headers, body)
            if b'"ping"' in body:
                answer["result"] = {"_meta": "strange"}
            return status, more, answer

    journal = []
    with Strange(journal) as server:
        check = await look(server.url)
    assert check.error == "Server 'server' answered to ping with what is not MCP"
    assert journal[-1]["what"] == "deleted"


async def test_a_server_that_hangs_is_given_up_and_holds_nobody_up(recorded_peer, monkeypatch):
    monkeypatch.setattr("mcp_celery.check.CHECK_SECONDS", 0.5)
    hanging, well = recorded_peer("python"), recorded_peer("python")
    hanging.stall(rpc_method="tools/list")
    first, second = await check_all(
        [ServerSettings(name="hanging", url=hanging.url), ServerSettings(name="well", url=well.url)]
    )
    assert (first.server, first.error) == ("hanging", "did not answer within 0.5 s")
    assert second.error is None
    assert hanging.wait_for(lambda exchange: exchange.method == "DELETE").session_id == hanging.session_ids[0]


@pytest.fixture
async def paging_url():
    """The URL of a server that lists three tools on two pages."""

    async def list_tools(_, params):
        is_first = params is None or params.cursor is None
        names = ("one", "two") if is_first else ("three",)
        tools = [types.Tool(name=name, inputSchema={"type": "object"}) for name in names]
        return types.ListToolsResult(tools=tools, nextCursor="next" if is_first else None)

    app = Server("paging", on_list_tools=list_tools).streamable_http_app()
    server = uvicorn.Server(uvicorn.Config(app, port=free_port(), log_level="warning"))
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(server.serve)
        with anyio.fail_after(10):
            while not server.started:  # noqa: ASYNC110 - nothing tells of it
                await anyio.sleep(0.01)
        yield f"http://127.0.0.1:{server.config.port}/mcp"
        server.should_exit = True


async def test_the_tools_of_all_pages_are_counted(paging_url):
    assert (await look(paging_url)).tools == 3
