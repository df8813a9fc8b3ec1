"""An MCP session as a coroutine uses it: opened or resumed at the first use, called, detached, closed."""

import json

import anyio
import anyio.lowlevel
import pytest
from calls import KINDS, PEERS, echo, eventually, is_call, seen, slow, text_of, version_of
from mcp import MCPError
from mcp_types import PromptReference

from mcp_celery.connections import Connections
from mcp_celery.exceptions import SessionError, SessionHandleError, SessionLostError, ToolError, TransportError
from mcp_celery.handle import SessionHandle, short_hash
from mcp_celery.session import AsyncMCPSession
from mcp_celery.settings import ServerSettings

pytestmark = pytest.mark.anyio

ECHO = echo(("python",), "x")
HANDSHAKE = ["POST initialize", "POST notifications/initialized"]
MODERN = ("python", "--modern-only")


# Life


async def test_a_session_that_is_not_used_sends_nothing(recorded_peer, new_session):
    recorder = recorded_peer("python")
    session = new_session(recorder.url)
    assert (session.server, session.is_open, session.resumed) == ("server", False, False)
    assert (session.session_id, session.handle, session.protocol_version) == (None, None, None)
    assert (session.server_info, session.server_capabilities, session.requests_sent) == (None, None, 0)
    await session.close()
    await session.release()
    assert recorder.exchanges == []


@pytest.mark.parametrize("peer", PEERS, ids=" ".join)
async def test_the_first_call_opens_the_session_and_close_ends_it(recorded_peer, new_session, peer):
    recorder = recorded_peer(*peer)
    session = new_session(recorder.url)
    assert text_of(await session.call_tool(*echo(peer, "x"))) == "x"
    assert session.is_open
    assert session.protocol_version == version_of(peer)
    assert session.server_info.name
    assert session.server_capabilities.tools is not None
    session_id = session.session_id
    assert [session_id] == recorder.session_ids
    await session.close()
    assert (session.is_open, session.session_id, session.handle) == (False, None, None)
    await session.close()
    assert recorder.methods() == [*HANDSHAKE, "POST tools/call", "POST tools/list", "DELETE"]
    assert session.requests_sent == 5
    assert recorder.exchanges[-1].session_id == session_id


@pytest.mark.parametrize("peer", PEERS, ids=" ".join)
async def test_detach_leaves_the_session_alive_for_whoever_has_the_handle(recorded_peer, new_session, peer):
    recorder = recorded_peer(*peer)
    first = new_session(recorder.url)
    await first.call_tool(*echo(peer, "x"))
    handle = await first.detach()
    assert (first.session_id, first.handle, first.is_open) == (None, None, False)
    await first.close()
    recorder.clear()

    second = new_session(recorder.url, SessionHandle.load(handle.dumps()))
    assert (second.resumed, second.handle, second.session_id) == (True, handle, None)
    await second.open()
    assert second.session_id == handle.session_id
    assert recorder.exchanges == [], "resuming sends nothing"
    assert text_of(await second.call_tool(*echo(peer, "again"))) == "again"
    assert recorder.methods() == ["POST tools/call"]
    assert second.requests_sent == 1
    await second.close()
    assert recorder.methods() == ["POST tools/call", "DELETE"]


async def test_a_session_that_was_given_can_be_detached_and_closed_without_being_used(recorded_peer, new_session):
    recorder = recorded_peer("python")
    opened = new_session(recorder.url)
    await opened.open()
    handle = await opened.detach()
    recorder.clear()
    assert await new_session(recorder.url, handle).detach() == handle
    assert recorder.exchanges == []
    given = new_session(recorder.url, handle)
    await given.close()
    assert recorder.methods() == ["DELETE"]
    assert recorder.exchanges[0].session_id == handle.session_id
    assert given.requests_sent == 1


@pytest.mark.parametrize("end", ["close", "detach", "release"])
async def test_after_its_end_a_session_refuses_calls_until_it_is_opened_anew(recorded_peer, new_session, end):
    recorder = recorded_peer("python")
    session = new_session(recorder.url)
    await session.open()
    first = session.session_id
    await getattr(session, end)()
    recorder.clear()
    for call in (session.call_tool(*ECHO), session.list_tools(), session.read_resource("note://hello")):
        with pytest.raises(SessionError, match=r"open\(\) starts a new one"):
            await call
    with pytest.raises(SessionError):
        _ = session.client
    with pytest.raises(SessionError, match="no session"):
        await session.detach()
    assert recorder.exchanges == []
    await session.open()
    assert session.session_id not in {None, first}
    assert text_of(await session.call_tool(*ECHO)) == "x"


async def test_release_says_nothing_to_the_server(recorded_peer, new_session):
    recorder = recorded_peer("python")
    session = new_session(recorder.url)
    await session.open()
    handle = session.handle
    await session.release()
    assert recorder.methods() == HANDSHAKE
    assert text_of(await new_session(recorder.url, handle).call_tool(*ECHO)) == "x"


async def test_there_is_nothing_to_detach_before_a_session_is_open(new_session):
    with pytest.raises(SessionError, match=r"open\(\) one first"):
        await new_session("http://127.0.0.1:1/mcp").detach()


async def test_opening_twice_opens_once(recorded_peer, new_session):
    recorder = recorded_peer("python")
    session = new_session(recorder.url)
    async with anyio.create_task_group() as tasks:
        for _ in range(5):
            tasks.start_soon(session.open)
            tasks.start_soon(session.call_tool, *ECHO)
    assert recorder.methods().count("POST initialize") == 1


async def test_a_session_can_be_opened_in_one_task_and_closed_in_another(recorded_peer, new_session):
    recorder = recorded_peer("python")
    session = new_session(recorder.url)
    for step in (session.open, session.list_prompts, session.close):
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(step)
    assert recorder.methods() == [*HANDSHAKE, "POST prompts/list", "DELETE"]


async def test_an_interrupted_opening_can_be_tried_again(recorded_peer, new_session):
    recorder = recorded_peer("python")
    recorder.stall(rpc_method="initialize")
    session = new_session(recorder.url)
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(session.open)
        await seen(recorder, lambda exchange: exchange.rpc_method == "initialize")
        tasks.cancel_scope.cancel()
    assert not session.is_open
    assert text_of(await session.call_tool(*ECHO)) == "x"


async def test_a_session_whose_opening_is_broken_off_is_ended_at_the_server(recorded_peer, new_session):
    recorder = recorded_peer("python")
    recorder.stall(rpc_method="notifications/initialized")
    session = new_session(recorder.url)
    with pytest.raises(TransportError, match=r"did not answer to tool 'add' within 0\.5 s"):
        await session.call_tool("add", {"a": 1, "b": 2}, timeout=0.5)
    assert recorder.methods() == ["POST initialize", "POST notifications/initialized", "DELETE"]
    assert recorder.exchanges[-1].session_id == recorder.session_ids[0]
    assert (session.session_id, session.handle) == (None, None)


async def test_a_handle_of_another_server_is_refused(new_session):
    handle = SessionHandle("another", "a-secret-id", {"protocolVersion": "2025-11-25"})
    with pytest.raises(SessionHandleError, match="'another'") as caught:
        new_session("http://127.0.0.1:1/mcp", handle)
    assert "a-secret-id" not in repr(caught.value)


async def test_a_session_shows_its_state_and_a_short_hash(recorded_peer, new_session):
    session = new_session(recorded_peer("python").url)
    assert repr(session) == "<AsyncMCPSession server None not open yet>"
    await session.open()
    secret = session.session_id
    assert repr(session) == f"<AsyncMCPSession server {short_hash(secret)} open>"
    await session.close()
    assert repr(session) == "<AsyncMCPSession server None closed>"


async def test_a_server_without_sessions_is_used_alike(recorded_peer, new_session):
    recorder = recorded_peer("python", "--stateless")
    session = new_session(recorder.url)
    assert text_of(await session.call_tool(*ECHO)) == "x"
    handle = await session.detach()
    assert handle.session_id is None
    resumed = new_session(recorder.url, handle)
    recorder.clear()
    assert text_of(await resumed.call_tool(*ECHO)) == "x"
    await resumed.close()
    assert recorder.methods() == ["POST tools/call"]


async def test_a_server_of_the_stateless_era_is_resumed_without_asking_it_again(recorded_peer, new_session):
    recorder = recorded_peer(*MODERN)
    session = new_session(recorder.url)
    assert text_of(await session.call_tool(*ECHO)) == "x"
    assert recorder.methods()[:2] == ["POST initialize", "POST server/discover"]
    assert (session.protocol_version, session.session_id) == ("2026-07-28", None)
    handle = SessionHandle.load((await session.detach()).dumps())
    recorder.clear()
    resumed = new_session(recorder.url, handle)
    assert text_of(await resumed.call_tool(*ECHO)) == "x"
    assert resumed.server_info.name == "python"
    assert (resumed.protocol_version, resumed.resumed) == ("2026-07-28", True)
    await resumed.close()
    assert recorder.methods() == ["POST tools/call"]


async def test_a_server_of_both_eras_is_asked_for_a_session(recorded_peer, new_session):
    recorder = recorded_peer("python")
    session = new_session(recorder.url)
    await session.open()
    assert recorder.methods() == HANDSHAKE
    assert session.session_id is not None


# Calls


@pytest.mark.parametrize("peer", [peer for peer in PEERS if peer[0] != "everything"] + [MODERN], ids=" ".join)
async def test_every_method_of_a_session_works(recorded_peer, new_session, peer):
    session = new_session(recorded_peer(*peer).url)
    tools = {tool.name: tool for tool in (await session.list_tools()).tools}
    assert {"echo", "add", "slow"} <= tools.keys()
    assert (await session.call_tool("add", {"a": 2, "b": 3})).structured_content == {"result": 5}
    assert [str(resource.uri) for resource in (await session.list_resources()).resources] == ["note://hello"]
    templates = (await session.list_resource_templates()).resource_templates
    assert [template.uri_template for template in templates] == ["note://people/{name}"]
    assert (await session.read_resource("note://people/Ada")).contents[0].text == "a note on Ada"
    assert [prompt.name for prompt in (await session.list_prompts()).prompts] == ["greet"]
    assert (await session.get_prompt("greet", {"name": "Ada"})).messages[0].content.text == "Greet Ada."
    ref = PromptReference(type="ref/prompt", name="greet")
    assert (await session.complete(ref, {"name": "name", "value": "A"})).completion.values == ["Ada", "Alan"]


@pytest.mark.parametrize("kind", ["python", "python1", "typescript"])
async def test_a_tool_that_fails_is_an_error_unless_its_answer_is_wanted(recorded_peer, new_session, kind):
    session = new_session(recorded_peer(kind).url)
    with pytest.raises(ToolError, match="it failed") as caught:
        await session.call_tool("fail")
    assert caught.value.tool == "fail"
    result = await session.call_tool("fail", raise_on_error=False)
    assert result.is_error
    assert "it failed" in text_of(result)


@pytest.mark.parametrize("peer", KINDS, ids=" ".join)
async def test_a_json_rpc_error_passes_through(recorded_peer, new_session, peer):
    session = new_session(recorded_peer(*peer).url)
    with pytest.raises(MCPError):
        await session.get_prompt("no such prompt")
    assert session.is_open
    assert text_of(await session.call_tool(*echo(peer, "x"))) == "x"


@pytest.mark.parametrize("is_coroutine", [True, False], ids=["coroutine", "function"])
async def test_progress_is_reported_in_order(recorded_peer, new_session, is_coroutine):
    session = new_session(recorded_peer("python").url)
    reports = []

    async def report(*progress):
        await anyio.lowlevel.checkpoint()
        reports.append(progress)

    await session.call_tool(
        "slow",
        {"steps": 3, "seconds": 0.02},
        on_progress=report if is_coroutine else lambda *progress: reports.append(progress),
    )
    assert reports == [(1, 3, "step 1"), (2, 3, "step 2"), (3, 3, "step 3")]


@pytest.mark.parametrize("peer", KINDS, ids=" ".join)
async def test_a_cancelled_call_is_cancelled_at_the_server_and_the_session_stays(recorded_peer, new_session, peer):
    recorder = recorded_peer(*peer)
    session = new_session(recorder.url)
    await session.open()
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(session.call_tool, *slow(peer, 100, 0.1))
        call = await seen(recorder, is_call)
        tasks.cancel_scope.cancel()
    cancellation = await seen(recorder, lambda exchange: exchange.rpc_method == "notifications/cancelled")
    assert cancellation.rpc_params["requestId"] == call.rpc_id
    assert text_of(await session.call_tool(*echo(peer, "usable"))) == "usable"


async def test_release_ends_calls_under_way(recorded_peer, new_session):
    recorder = recorded_peer("python")
    session = new_session(recorder.url)
    await session.open()
    errors = []

    async def call():
        try:
            await session.call_tool("slow", {"steps": 100, "seconds": 0.1})
        except (TransportError, SessionError) as exc:
            errors.append(exc)

    with anyio.fail_after(10):
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(call)
            await seen(recorder, is_call)
            await session.release()
    assert len(errors) == 1


async def test_a_session_listens_where_its_settings_say_so(recorded_peer, new_session):
    recorder = recorded_peer("python")
    session = new_session(recorder.url, listen=True)
    await session.open()
    await seen(recorder, lambda exchange: exchange.method == "GET" and exchange.status == 200)
    assert text_of(await session.call_tool(*ECHO)) == "x"
    await session.close()
    assert recorder.methods().count("GET") == 1


# The tool listing


def listings(recorder):
    return recorder.methods().count("POST tools/list")


async def test_the_tools_are_listed_once_for_all_sessions_of_a_process(recorded_peer, new_session):
    recorder = recorded_peer("python")
    handles = []
    for _ in range(3):
        session = new_session(recorder.url)
        await session.call_tool("add", {"a": 1, "b": 1})
        handles.append(await session.detach())
    for handle in handles:
        await new_session(recorder.url, handle).call_tool("add", {"a": 1, "b": 1})
    assert listings(recorder) == 1


async def test_a_tool_that_the_listing_lacks_is_looked_for_once(recorded_peer, new_session):
    recorder = recorded_peer("python")
    session = new_session(recorder.url)
    await session.open()
    for ahead in (1, 3):  # the second time after the id of the first call
        answer_next(recorder, "tools/list", {"tools": []}, ahead)
    assert (await session.list_tools()).tools == []
    for _ in range(3):
        assert text_of(await session.call_tool(*ECHO)) == "x"
    assert listings(recorder) == 2


async def test_list_tools_always_asks_the_server(recorded_peer, new_session):
    recorder = recorded_peer("python")
    session = new_session(recorder.url)
    for _ in range(3):
        await session.list_tools()
    await session.call_tool(*ECHO)
    assert listings(recorder) == 3


async def test_a_result_at_odds_with_its_output_schema_is_a_tool_error(recorded_peer, new_session):
    recorder = recorded_peer("python")
    session = new_session(recorder.url)
    await session.list_tools()
    answer_next(recorder, "tools/call", {"content": [], "structuredContent": {"result": "no number"}})
    with pytest.raises(ToolError, match="has run, but its structured content does not fit") as caught:
        await session.call_tool("add", {"a": 1, "b": 1})
    assert caught.value.structured_content == {"result": "no number"}
    assert listings(recorder) == 2
    answer_next(recorder, "tools/call", {"content": []})
    with pytest.raises(ToolError, match="gave no structured content"):
        await session.call_tool("add", {"a": 1, "b": 1})
    answer_next(recorder, "tools/call", {"content": []})
    assert (await session.call_tool("add", {"a": 1, "b": 1}, raise_on_error=False)).structured_content is None


async def test_an_old_listing_fails_no_call(recorded_peer, new_session):
    recorder = recorded_peer("python")
    session = new_session(recorder.url)
    await session.open()
    schema = {"type": "object", "properties": {"result": {"type": "string"}}}
    tool = {"name": "add", "inputSchema": {"type": "object"}, "outputSchema": schema}
    answer_next(recorder, "tools/list", {"tools": [tool]})
    await session.list_tools()
    assert (await session.call_tool("add", {"a": 1, "b": 1})).structured_content == {"result": 2}
    assert listings(recorder) == 2


async def test_a_listing_that_fails_costs_no_result(recorded_peer, new_session):
    recorder = recorded_peer("python")
    recorder.answer(rpc_method="tools/list", status=500)
    session = new_session(recorder.url)
    for _ in range(3):
        assert (await session.call_tool("add", {"a": 1, "b": 1})).structured_content == {"result": 2}
    assert listings(recorder) == 1


def answer_next(recorder, rpc_method, result, ahead=1):
    """Have the recorder answer a request, the *ahead*-th from now: its JSON-RPC id is a prefix and a number."""
    last_id = next(exchange.rpc_id for exchange in reversed(recorder.exchanges) if exchange.rpc_id is not None)
    prefix, _, number = last_id.rpartition("-")
    message = {"jsonrpc": "2.0", "id": f"{prefix}-{int(number) + ahead}", "result": result}
    recorder.answer(rpc_method=rpc_method, status=200, body=json.dumps(message).encode())


# What a process shares


async def test_sessions_share_connections_and_closing_them_leaves_none(recorded_peer):
    recorder = recorded_peer("python", "--json")
    connections = Connections()
    settings = ServerSettings(name="server", url=recorder.url)
    for _ in range(3):
        session = AsyncMCPSession(settings, connections)
        await session.call_tool(*ECHO)
        await session.close()
    assert recorder.connections == 1
    await connections.aclose()
    again = AsyncMCPSession(settings, connections)
    await again.call_tool(*ECHO)
    assert recorder.connections == 2
    await again.close()
    await connections.aclose()


async def test_a_lost_session_can_be_detached_no_more(recorded_peer, new_session):
    recorder = recorded_peer("python")
    session = new_session(recorder.url)
    await session.open()
    recorder.answer(rpc_method="tools/call", status=404)
    with pytest.raises(SessionLostError):
        await session.call_tool(*ECHO)
    with pytest.raises(SessionError, match="no session"):
        await session.detach()
    await session.close()
    await eventually(lambda: recorder.exchanges[-1].status, what="the last answer")
    assert "DELETE" not in recorder.methods()


@pytest.mark.parametrize(
    "peer", [("python",), ("python", "--modern-only"), ("python1",), ("typescript",)], ids=" ".join
)
async def test_an_error_of_the_progress_callback_ends_the_call_and_is_raised_once(recorded_peer, new_session, peer):
    session, reports = new_session(recorded_peer(*peer).url), []

    async def fail(*report):
        reports.append(report)
        raise LookupError("in the callback")

    with pytest.raises(LookupError, match="in the callback"):
        await session.call_tool("slow", {"steps": 100, "seconds": 0.1}, on_progress=fail)
    assert len(reports) == 1
    assert text_of(await session.call_tool("echo", {"text": "usable"})) == "usable"
    await session.close()
