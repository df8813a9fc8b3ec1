"""The transport starts from nothing or from a handle, says no more than it must, and leaves the session alive."""

import json

import pytest
from calls import KINDS, PEERS, echo, eventually, is_call, seen, slow, text_of, version_of
from mcp import Client, ClientSession

from mcp_celery.exceptions import SessionError, SessionHandleError, TransportError
from mcp_celery.handle import SessionHandle
from mcp_celery.http import Endpoint, new_client
from mcp_celery.listings import ToolListings
from mcp_celery.transport import ResumableHTTPTransport, resumable_http

pytestmark = pytest.mark.anyio

HANDSHAKE = ["POST initialize", "POST notifications/initialized"]


def is_answered_delete(exchange):
    return exchange.method == "DELETE" and exchange.status


@pytest.fixture
async def sharing(recorded_peer):
    """`sharing(url, handle=None)` returns a transport; all of them have one HTTP client and one tool listing."""
    client = new_client("http://127.0.0.1/")
    listings = ToolListings()

    def new(url, handle=None, **options):
        endpoint = Endpoint(url, client, name="server", cookies=handle.cookies if handle else None)
        return ResumableHTTPTransport(endpoint, handle=handle, listings=listings, **options)

    yield new
    await client.aclose()


@pytest.mark.parametrize("mode", ["auto", "legacy"])
@pytest.mark.parametrize("peer", PEERS, ids=" ".join)
async def test_a_client_opens_a_session_by_the_handshake_and_leaves_it_alive(recorded_peer, peer, mode):
    recorder = recorded_peer(*peer)
    transport = resumable_http(recorder.url)
    assert (transport.session_id, transport.handle) == (None, None)
    async with Client(transport, mode=mode) as client:
        assert [transport.session_id] == recorder.session_ids
        assert client.protocol_version == transport.handle.protocol_version == version_of(peer)
        assert text_of(await client.call_tool(*echo(peer, "hello"))) == "hello"
    assert recorder.methods() == [*HANDSHAKE, "POST tools/call", "POST tools/list"]
    assert [transport.session_id] == recorder.session_ids


@pytest.mark.parametrize("peer", PEERS, ids=" ".join)
async def test_a_handle_continues_the_session_in_one_request_a_call(recorded_peer, sharing, peer):
    recorder = recorded_peer(*peer)
    async with Client(first := sharing(recorder.url)) as client:
        await client.call_tool(*echo(peer, "listed"))
        if peer[0] != "everything":
            await client.call_tool("set_variable", {"name": "colour", "value": "red"})
        text = first.handle.dumps()
    recorder.clear()

    second = sharing(recorder.url, SessionHandle.load(text))
    async with Client(second, mode="legacy") as client:
        assert recorder.exchanges == [], "entering sends nothing"
        assert second.session_id == first.session_id
        assert client.protocol_version == version_of(peer)
        if peer[0] != "everything":
            assert text_of(await client.call_tool("get_variable", {"name": "colour"})) == "red"
        else:
            assert text_of(await client.call_tool(*echo(peer, "again"))) == "again"
    assert recorder.methods() == ["POST tools/call"]
    headers = recorder.exchanges[0].headers
    assert headers["mcp-session-id"] == first.session_id
    assert headers["mcp-protocol-version"] == version_of(peer)


@pytest.mark.parametrize("mode", ["auto", "legacy"])
@pytest.mark.parametrize("peer", KINDS, ids=" ".join)
async def test_an_sdk_client_resumes_in_either_mode_without_a_handshake(recorded_peer, peer, mode):
    recorder = recorded_peer(*peer)
    async with Client(transport := resumable_http(recorder.url)) as client:
        info = client.server_info
        handle = transport.handle
    recorder.clear()
    async with Client(resumable_http(recorder.url, handle=handle.dumps()), mode=mode) as client:
        assert client.server_info.name == info.name
        assert client.server_capabilities.tools is not None
        assert text_of(await client.call_tool(*echo(peer, "hello"))) == "hello"
    assert recorder.methods() == ["POST tools/call", "POST tools/list"]
    assert {exchange.session_id for exchange in recorder.exchanges} == {handle.session_id}


@pytest.mark.parametrize("peer", KINDS, ids=" ".join)
async def test_a_bare_client_session_opens_and_resumes_on_the_two_streams(recorded_peer, peer):
    recorder = recorded_peer(*peer)
    transport = resumable_http(recorder.url)
    async with transport as streams, ClientSession(*streams) as session:
        result = await session.initialize()
        assert result.protocol_version == version_of(peer)
        assert text_of(await session.call_tool(*echo(peer, "one"))) == "one"
    recorder.clear()
    async with resumable_http(recorder.url, handle=transport.handle) as streams, ClientSession(*streams) as session:
        await session.initialize()
        assert recorder.exchanges == []
        assert text_of(await session.call_tool(*echo(peer, "two"))) == "two"
    assert recorder.methods() == ["POST tools/call", "POST tools/list"]


@pytest.mark.parametrize("peer", PEERS, ids=" ".join)
async def test_the_end_of_a_session_is_one_delete(recorded_peer, peer):
    recorder = recorded_peer(*peer)
    async with Client(transport := resumable_http(recorder.url)):
        session_id = transport.session_id
        await transport.terminate()
        assert (transport.session_id, transport.handle) == (None, None)
        await transport.terminate()
    assert recorder.methods() == [*HANDSHAKE, "DELETE"]
    deletion = await seen(recorder, is_answered_delete)
    assert (deletion.status, deletion.session_id) == (200, session_id)
    assert deletion.headers["mcp-protocol-version"] == version_of(peer)


async def test_a_session_can_be_ended_by_its_handle_alone(recorded_peer):
    recorder = recorded_peer("python")
    async with Client(transport := resumable_http(recorder.url)):
        handle = transport.handle
    recorder.clear()
    await resumable_http(recorder.url, handle=handle).terminate()
    deletion = await seen(recorder, is_answered_delete)
    assert (deletion.status, deletion.session_id) == (200, handle.session_id)
    assert recorder.methods() == ["DELETE"]


async def test_a_transport_that_was_left_says_how_to_end_its_session(recorded_peer):
    async with Client(transport := resumable_http(recorded_peer("python").url)):
        pass
    with pytest.raises(SessionError, match="terminate\\(\\) inside the block"):
        await transport.terminate()


@pytest.mark.parametrize("peer", KINDS, ids=" ".join)
async def test_ending_a_session_that_the_server_has_dropped_is_no_error(recorded_peer, peer):
    recorder = recorded_peer(*peer)
    async with Client(transport := resumable_http(recorder.url)):
        handle = transport.handle
        await transport.terminate()
    recorder.clear()
    again = resumable_http(recorder.url, handle=handle)
    await again.terminate()
    assert again.session_id is None
    assert (await seen(recorder, is_answered_delete)).status == (400 if peer[0] == "everything" else 404)


@pytest.mark.parametrize("status", [404, 405])
async def test_a_server_may_refuse_that_clients_end_sessions(recorded_peer, status):
    recorder = recorded_peer("python")
    recorder.answer(http_method="DELETE", status=status)
    async with Client(transport := resumable_http(recorder.url)):
        await transport.terminate()
        assert transport.session_id is None


@pytest.mark.parametrize("status", [401, 500])
async def test_a_refused_end_is_an_error_and_can_be_tried_again(recorded_peer, status):
    recorder = recorded_peer("python")
    recorder.answer(http_method="DELETE", status=status)
    async with Client(transport := resumable_http(recorder.url)):
        with pytest.raises(TransportError, match="refused to end the session") as caught:
            await transport.terminate()
        assert caught.value.status == status
        await transport.terminate()
    assert recorder.methods() == [*HANDSHAKE, "DELETE", "DELETE"]


async def test_a_server_without_sessions_is_resumed_without_a_header(recorded_peer, sharing):
    recorder = recorded_peer("python", "--stateless")
    async with Client(first := sharing(recorder.url)) as client:
        await client.call_tool("echo", {"text": "listed"})
        assert first.session_id is None
        handle = SessionHandle.load(first.handle.dumps())
    recorder.clear()
    async with Client(second := sharing(recorder.url, handle), mode="legacy") as client:
        assert text_of(await client.call_tool("echo", {"text": "hello"})) == "hello"
        await second.terminate()
    assert recorder.methods() == ["POST tools/call"], "and there is nothing to end"
    assert recorder.exchanges[0].session_id is None
    assert recorder.exchanges[0].headers["mcp-protocol-version"] == "2025-11-25"


@pytest.mark.parametrize("mode", ["auto", "2026-07-28"])
async def test_a_server_of_the_stateless_era_is_found_and_carried_by_a_handle(recorded_peer, mode):
    recorder = recorded_peer("python", "--modern-only")
    async with Client(transport := resumable_http(recorder.url)) as client:
        assert client.protocol_version == "2026-07-28"
        assert transport.session_id is None
        handle = SessionHandle.load(transport.handle.dumps())
    assert recorder.methods() == ["POST initialize", "POST server/discover"]
    assert handle.is_stateless_era
    recorder.clear()
    async with Client(again := resumable_http(recorder.url, handle=handle), mode=mode) as client:
        assert recorder.exchanges == []
        assert text_of(await client.call_tool("echo", {"text": "hello"})) == "hello"
        await again.terminate()
    assert recorder.methods() == ["POST tools/call", "POST tools/list"]
    assert {exchange.headers["mcp-protocol-version"] for exchange in recorder.exchanges} == {"2026-07-28"}


@pytest.mark.parametrize("code", [-32020, -32022, -32601], ids=["missing header", "unknown version", "unknown method"])
async def test_a_server_of_the_stateless_era_is_found_however_it_refuses_the_handshake(recorded_peer, code):
    recorder = recorded_peer("python", "--modern-only")
    error = {"code": code, "message": "Refused", "data": {"supported": ["2026-07-28"], "requested": ""}}
    refusal = json.dumps({"jsonrpc": "2.0", "id": None, "error": error}).encode()
    recorder.answer(status=400, rpc_method="initialize", body=refusal, headers={"Mcp-Session-Id": "1"})
    async with Client(transport := resumable_http(recorder.url)) as client:
        assert client.protocol_version == "2026-07-28"
        assert text_of(await client.call_tool("echo", {"text": "hello"})) == "hello"
        assert transport.detach().session_id is None
    assert recorder.methods() == ["POST initialize", "POST server/discover", "POST tools/call", "POST tools/list"]
    assert {exchange.session_id for exchange in recorder.exchanges} == {None}


async def test_a_call_to_a_server_of_the_stateless_era_is_cancelled_by_leaving_it(recorded_peer):
    import anyio

    recorder = recorded_peer("python", "--modern-only")
    async with Client(resumable_http(recorder.url)) as client:
        with anyio.move_on_after(10) as scope:

            async def leave(*_):
                scope.cancel()

            await client.call_tool("slow", {"steps": 1000, "seconds": 0.05}, progress_callback=leave)
        call = await seen(recorder, lambda exchange: is_call(exchange) and exchange.ended)
        assert call.status == 200
        assert text_of(await client.call_tool("echo", {"text": "usable"})) == "usable"
    assert "POST notifications/cancelled" not in recorder.methods()


async def test_request_ids_on_the_wire_are_unique_across_transports(recorded_peer):
    recorder = recorded_peer("python")
    async with (
        Client(first := resumable_http(recorder.url)) as one,
        Client(resumable_http(recorder.url, handle=first.handle), mode="legacy") as two,
    ):
        for _ in range(3):
            await one.list_prompts(cache_mode="refresh")
            await two.list_prompts(cache_mode="refresh")
    ids = [exchange.rpc_id for exchange in recorder.exchanges if exchange.rpc_id is not None]
    assert len(ids) == 7
    assert len(set(ids)) == 7
    assert len({str(rpc_id).partition("-")[0] for rpc_id in ids}) == 2, "one prefix for each transport"


@pytest.mark.parametrize("options", [(), ("--json",)], ids=["events", "json"])
@pytest.mark.parametrize("kind", ["python", "python1", "typescript"])
async def test_ten_calls_use_no_connection_of_their_own(recorded_peer, kind, options):
    recorder = recorded_peer(kind, *options)
    async with Client(resumable_http(recorder.url)) as client:
        for number in range(10):
            assert text_of(await client.call_tool("echo", {"text": str(number)})) == str(number)
    assert recorder.methods().count("POST tools/call") == 10
    # The next request may go out while the end of an answered stream is still on its way.
    assert recorder.connections <= (1 if options else 2)


async def test_a_server_that_leaves_an_answered_stream_open_holds_nothing_up(recorded_peer):
    recorder = recorded_peer("python")
    async with Client(resumable_http(recorder.url)) as client:
        recorder.stall(rpc_method="tools/call", after_events=1)
        assert text_of(await client.call_tool("echo", {"text": "one"})) == "one"
        assert text_of(await client.call_tool("echo", {"text": "two"})) == "two"


async def test_the_standalone_stream_is_opened_only_where_it_is_asked_for(recorded_peer, sharing):
    recorder = recorded_peer("python")
    async with Client(silent := sharing(recorder.url)) as client:
        await client.call_tool("echo", {"text": "x"})
        handle = silent.handle
    assert "GET" not in recorder.methods()
    recorder.clear()
    async with Client(sharing(recorder.url, handle, listen=True), mode="legacy"):
        stream = await seen(recorder, lambda exchange: exchange.method == "GET" and exchange.status)
        assert (stream.status, stream.session_id, stream.ended) == (200, handle.session_id, None)
        assert "last-event-id" not in stream.headers
    await seen(recorder, lambda exchange: exchange.method == "GET" and exchange.ended)
    assert recorder.methods() == ["GET"]


@pytest.mark.parametrize("kind", ["python", "python1", "typescript"])
async def test_only_one_can_listen_and_the_other_goes_on(recorded_peer, sharing, kind):
    recorder = recorded_peer(kind)
    async with Client(first := sharing(recorder.url, listen=True)) as one:
        await seen(recorder, lambda exchange: exchange.method == "GET" and exchange.status == 200)
        async with Client(sharing(recorder.url, first.handle, listen=True), mode="legacy") as two:
            await seen(recorder, lambda exchange: exchange.method == "GET" and exchange.status == 409)
            assert text_of(await two.call_tool("echo", {"text": "two"})) == "two"
            assert text_of(await one.call_tool("echo", {"text": "one"})) == "one"
    assert recorder.methods().count("GET") == 2, "a refused stream is not asked for again"


@pytest.mark.parametrize("kind", ["python", "python1"])
async def test_the_standalone_stream_goes_on_where_it_broke_off(recorded_peer, sharing, kind):
    recorder = recorded_peer(kind, "--event-store")
    recorder.cut(http_method="GET", after_events=1)
    told = []

    async def note(message):
        told.append(message.method)

    async with Client(sharing(recorder.url, listen=True), message_handler=note) as client:
        await seen(recorder, lambda exchange: exchange.method == "GET" and exchange.status)
        await client.call_tool("announce", {"to_whom_it_concerns": True})
        await eventually(lambda: len(told) == 3, what="what was said after the break")
        first, again = (exchange for exchange in recorder.exchanges if exchange.method == "GET")
    assert told == [f"notifications/{what}/list_changed" for what in ("tools", "resources", "prompts")]
    assert "last-event-id" not in first.headers
    assert again.headers["last-event-id"]


async def test_a_server_of_the_stateless_era_is_not_listened_to(recorded_peer, sharing):
    recorder = recorded_peer("python", "--modern-only")
    async with Client(sharing(recorder.url, listen=True)) as client:
        assert text_of(await client.call_tool("echo", {"text": "x"})) == "x"
    assert "GET" not in recorder.methods()


async def test_listening_ends_with_the_session(recorded_peer, sharing):
    recorder = recorded_peer("python")
    async with Client(transport := sharing(recorder.url, listen=True)):
        await seen(recorder, lambda exchange: exchange.method == "GET" and exchange.status == 200)
        await transport.terminate()
        await seen(recorder, lambda exchange: exchange.method == "GET" and exchange.ended)
        with pytest.raises(TimeoutError):  # a Python server would open a session for a GET that names none
            await eventually(lambda: recorder.methods().count("GET") > 1, timeout_seconds=0.3)


async def test_a_handle_of_another_server_is_refused_before_anything_is_sent(recorded_peer):
    recorder = recorded_peer("python")
    handle = SessionHandle("http://127.0.0.1:1/mcp", "a-secret-id", {"protocolVersion": "2025-11-25"})
    with pytest.raises(SessionHandleError, match="is of server") as caught:
        resumable_http(recorder.url, handle=handle)
    assert "a-secret-id" not in repr(caught.value)
    assert recorder.exchanges == []


async def test_progress_reaches_the_callback_of_its_call(recorded_peer):
    peer = ("typescript",)
    recorder = recorded_peer(*peer)
    reports = []

    async def report(progress, total, message):
        reports.append((progress, total, message))

    async with Client(resumable_http(recorder.url)) as client:
        result = await client.call_tool(*slow(peer, 3, 0.01), progress_callback=report)
    assert text_of(result) == "done"
    assert reports == [(1, 3, "step 1"), (2, 3, "step 2"), (3, 3, "step 3")]
