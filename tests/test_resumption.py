"""A response stream that breaks off is continued where the server keeps its events, and is an error elsewhere."""

from functools import partial

import anyio
import pytest
from calls import WITH_EVENT_STORE, echo, eventually, is_call, seen, slow, text_of
from mcp import Client, ClientSession, MCPError
from mcp.shared.message import ClientMessageMetadata
from mcp_types import CallToolRequest, CallToolRequestParams, CallToolResult

from mcp_celery import exchange as exchange_module
from mcp_celery.exceptions import SessionLostError, TransportError
from mcp_celery.exchange import RESUME_ATTEMPTS, read_token, write_token
from mcp_celery.transport import resumable_http

pytestmark = pytest.mark.anyio

EVERYTHING = ("everything",)
STORE = ("python", "--event-store")
#: Gives no token before the tool has said something.
OLD_STORE = ("python", "--event-store", "--protocol-version", "2025-06-18")


@pytest.fixture
def quickly(monkeypatch):
    """Attempts follow each other at once, so that all of them fit into a test."""
    monkeypatch.setattr(exchange_module, "RESUME_PAUSE_SECONDS", 0.05)


@pytest.fixture
async def open_on(recorded_peer, new_session):
    """`open_on(peer, **options)` returns a recorder before *peer* and a session that is open there."""

    async def make(peer, **options):
        recorder = recorded_peer(*peer)
        session = new_session(recorder.url, **options)
        await session.open()
        recorder.clear()
        return recorder, session

    return make


async def executions(session):
    return int(text_of(await session.call_tool("executions")))


def resumptions(recorder):
    return [exchange for exchange in recorder.exchanges if exchange.method == "GET"]


async def test_a_callback_for_tokens_that_raises_costs_no_call(recorded_peer, caplog):
    async def refuse(token):
        raise LookupError(f"no place for {token}")

    async with Client(resumable_http(recorded_peer("python", "--event-store").url)) as client:
        request = CallToolRequest(params=CallToolRequestParams(name="echo", arguments={"text": "here"}))
        metadata = ClientMessageMetadata(on_resumption_token_update=refuse)
        result = await client.session.send_request(request, CallToolResult, metadata=metadata)
    assert result.content[0].text == "here"
    assert "no place for" in caplog.text


@pytest.mark.parametrize("after_events", [1, 2, 3])
@pytest.mark.parametrize("peer", WITH_EVENT_STORE, ids=" ".join)
async def test_a_call_that_is_cut_off_returns_its_result_and_runs_once(open_on, peer, after_events):
    recorder, session = await open_on(peer)
    before = await executions(session)
    recorder.clear()
    recorder.cut(rpc_method="tools/call", after_events=after_events)
    reports = []
    result = await session.call_tool(*slow(peer, 4, 0.1), on_progress=lambda *report: reports.append(report))
    assert text_of(result) == "done"
    assert reports == [(step, 4, f"step {step}") for step in range(1, 5)], "each of them, and none of them twice"
    assert recorder.methods() == ["POST tools/call", "GET"]
    call, resumption = recorder.exchanges
    assert resumption.session_id == call.session_id
    assert resumption.headers["mcp-protocol-version"] == call.headers["mcp-protocol-version"]
    assert resumption.headers["last-event-id"]
    assert await executions(session) == before + 1


@pytest.mark.parametrize("peer", WITH_EVENT_STORE, ids=" ".join)
async def test_a_call_is_resumed_as_often_as_its_stream_brings_something_new(open_on, peer):
    recorder, session = await open_on(peer)
    recorder.cut(rpc_method="tools/call", after_events=1)
    recorder.cut(http_method="GET", after_events=1, times=3)
    reports = []
    result = await session.call_tool(*slow(peer, 5, 0.02), on_progress=lambda *report: reports.append(report[0]))
    assert text_of(result) == "done"
    assert reports == [1, 2, 3, 4, 5]
    assert len({exchange.headers["last-event-id"] for exchange in resumptions(recorder)}) == 4


async def test_an_older_server_is_resumed_once_its_tool_has_said_something(open_on):
    recorder, session = await open_on(OLD_STORE)
    recorder.cut(rpc_method="tools/call", after_events=1)
    reports = []
    result = await session.call_tool(*slow(OLD_STORE, 4, 0.05), on_progress=lambda *report: reports.append(report[0]))
    assert text_of(result) == "done"
    assert reports == [1, 2, 3, 4]
    assert recorder.methods() == ["POST tools/call", "GET", "POST tools/list"]


@pytest.mark.parametrize("after_events", [1, 2])
async def test_a_store_that_gives_the_rest_only_after_the_tool_is_asked_again(open_on, after_events):
    recorder, session = await open_on(EVERYTHING)
    recorder.cut(rpc_method="tools/call", after_events=after_events)
    reports = []
    with anyio.fail_after(20):
        result = await session.call_tool(*slow(EVERYTHING, 3, 0.5), on_progress=lambda *it: reports.append(it[0]))
    assert "completed" in text_of(result)
    assert reports == [1, 2, 3]
    assert 1 <= len(resumptions(recorder)) < RESUME_ATTEMPTS
    assert recorder.methods().count("POST tools/call") == 1


async def test_a_replay_of_all_that_happened_in_the_session_gives_each_call_its_own_answer(open_on):
    recorder, session = await open_on(EVERYTHING)
    recorder.cut(rpc_method="tools/call", after_events=1)
    results = []

    async def call():
        results.append(text_of(await session.call_tool(*slow(EVERYTHING, 2, 0.2))))

    with anyio.fail_after(20):
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(call)
            await seen(recorder, lambda exchange: is_call(exchange) and exchange.ended)
            for number in range(3):
                assert text_of(await session.call_tool(*echo(EVERYTHING, f"beside {number}"))) == f"beside {number}"
    assert "completed" in results[0]


@pytest.mark.parametrize(
    ("peer", "after_events"),
    [
        (("python",), 0),
        (("python",), 1),
        (("python1",), 1),
        (("typescript",), 1),
        (STORE, 0),
        (OLD_STORE, 0),
    ],
    ids=str,
)
async def test_a_call_that_is_cut_off_without_a_token_is_an_error_at_once(open_on, peer, after_events):
    recorder, session = await open_on(peer)
    recorder.cut(rpc_method="tools/call", after_events=after_events)
    with anyio.fail_after(8), pytest.raises(TransportError, match="broke off") as caught:
        await session.call_tool(*slow(peer, 3, 0.1), on_progress=lambda *_: None)
    assert caught.value.sent
    assert recorder.methods() == ["POST tools/call"], "it may have run, so it is not sent again"
    assert text_of(await session.call_tool(*echo(peer, "usable"))) == "usable"


@pytest.mark.parametrize("kind", ["python", "typescript", "everything"])
async def test_a_request_without_any_response_is_an_error_at_once(open_on, kind):
    recorder, session = await open_on((kind,))
    recorder.drop(rpc_method="tools/call")
    with anyio.fail_after(8), pytest.raises(TransportError, match="broke off"):
        await session.call_tool(*echo((kind,), "x"))
    assert recorder.methods() == ["POST tools/call"]
    assert text_of(await session.call_tool(*echo((kind,), "usable"))) == "usable"


@pytest.mark.parametrize("body", [b"", b": a comment\n\n", b"data:\n\n"], ids=repr)
async def test_a_stream_that_ends_without_answer_or_token_is_an_error(open_on, body):
    recorder, session = await open_on(("python",))
    recorder.answer(rpc_method="tools/call", status=200, body=body, content_type="text/event-stream")
    with pytest.raises(TransportError, match="without an answer"):
        await session.call_tool("echo", {"text": "x"})
    assert text_of(await session.call_tool("echo", {"text": "usable"})) == "usable"


@pytest.mark.parametrize(
    ("body", "content_type"),
    [
        (b"data: {not json\n\n", "text/event-stream"),
        (b"id: 1\ndata: [1, 2]\n\n", "text/event-stream"),
        (b"{not json", "application/json"),
        (b'{"jsonrpc": "2.0", "method": "notifications/progress"}', "application/json"),
        (b"<html>", "text/html"),
        (b"", ""),
    ],
    ids=repr,
)
async def test_an_answer_that_is_no_json_rpc_is_an_error(open_on, body, content_type):
    recorder, session = await open_on(("python",))
    recorder.answer(rpc_method="tools/call", status=200, body=body, content_type=content_type)
    with anyio.fail_after(8), pytest.raises(TransportError, match="JSON-RPC"):
        await session.call_tool("echo", {"text": "x"})
    assert resumptions(recorder) == []
    assert text_of(await session.call_tool("echo", {"text": "usable"})) == "usable"


async def test_an_answer_to_somebody_else_is_not_taken_for_ours(open_on):
    recorder, session = await open_on(("python",))
    body = b'data: {"jsonrpc": "2.0", "id": "another-1", "result": {"content": []}}\n\n'
    recorder.answer(rpc_method="tools/call", status=200, body=body, content_type="text/event-stream")
    with pytest.raises(TransportError, match="without an answer"):
        await session.call_tool("echo", {"text": "x"})


async def test_a_session_that_is_gone_when_its_call_is_resumed_is_lost(open_on):
    recorder, session = await open_on(STORE)
    recorder.cut(rpc_method="tools/call", after_events=1)
    recorder.answer(http_method="GET", status=404)
    with pytest.raises(SessionLostError) as caught:
        await session.call_tool(*slow(STORE, 3, 0.1))
    assert caught.value.status == 404
    assert session.session_id is None
    with pytest.raises(SessionLostError):
        await session.call_tool(*echo(STORE, "x"))
    assert recorder.methods() == ["POST tools/call", "GET"]


@pytest.mark.parametrize("status", [400, 405])
async def test_a_server_that_refuses_to_resume_is_not_asked_again(open_on, status):
    recorder, session = await open_on(STORE)
    recorder.cut(rpc_method="tools/call", after_events=1)
    recorder.answer(http_method="GET", status=status)
    with pytest.raises(TransportError, match=f"HTTP {status}") as caught:
        await session.call_tool(*slow(STORE, 3, 0.1))
    assert caught.value.status == status
    assert recorder.methods() == ["POST tools/call", "GET"]
    assert text_of(await session.call_tool(*echo(STORE, "usable"))) == "usable"


async def test_a_server_that_is_busy_for_a_while_is_asked_again(open_on):
    recorder, session = await open_on(STORE)
    recorder.cut(rpc_method="tools/call", after_events=1)
    recorder.answer(http_method="GET", status=503, times=3)
    assert text_of(await session.call_tool(*slow(STORE, 3, 0.1))) == "done"
    assert recorder.methods()[:5] == ["POST tools/call", "GET", "GET", "GET", "GET"]


@pytest.mark.usefixtures("quickly")
@pytest.mark.parametrize(("status", "content_type"), [(503, "text/plain"), (200, "text/event-stream")])
async def test_resuming_is_given_up_after_a_number_of_attempts(open_on, status, content_type):
    recorder, session = await open_on(STORE)
    recorder.cut(rpc_method="tools/call", after_events=1)
    recorder.answer(http_method="GET", status=status, content_type=content_type, times=1000)
    with anyio.fail_after(20), pytest.raises(TransportError, match="resuming it failed"):
        await session.call_tool(*slow(STORE, 3, 0.1))
    # One that a busy machine answers too late is not counted as failed, but asked again.
    assert RESUME_ATTEMPTS <= len(resumptions(recorder)) < 2 * RESUME_ATTEMPTS


@pytest.mark.usefixtures("quickly")
async def test_a_server_that_died_under_a_call_is_an_error(start_peer, record, new_session):
    server = start_peer(*STORE, fresh=True)
    recorder = record(server.url)
    session = new_session(recorder.url)
    await session.open()

    async def call():
        with pytest.raises(TransportError, match="resuming it failed"):
            await session.call_tool(*slow(STORE, 100, 1))

    with anyio.fail_after(20):
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(call)
            await seen(recorder, lambda exchange: is_call(exchange) and exchange.status)
            await anyio.to_thread.run_sync(server.stop)


async def test_a_call_under_way_when_its_server_restarts_is_lost(start_peer, record, new_session):
    server = start_peer(*STORE, fresh=True)
    recorder = record(server.url)
    session = new_session(recorder.url)
    await session.open()

    async def call():
        with pytest.raises(SessionLostError):
            await session.call_tool(*slow(STORE, 100, 1))

    with anyio.fail_after(30):
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(call)
            await seen(recorder, lambda exchange: is_call(exchange) and exchange.status)
            await anyio.to_thread.run_sync(server.restart)


def tool_request(peer, steps, seconds):
    name, arguments = slow(peer, steps, seconds)
    return CallToolRequest(params=CallToolRequestParams(name=name, arguments=arguments))


@pytest.mark.parametrize("peer", [*WITH_EVENT_STORE, EVERYTHING], ids=" ".join)
async def test_another_process_can_take_a_call_over_by_its_token(recorded_peer, peer):
    recorder = recorded_peer(*peer)
    tokens, reports = [], []

    async def report(progress, _total, _message):
        reports.append(progress)

    first = resumable_http(recorder.url)
    async with first as streams, ClientSession(*streams) as session, anyio.create_task_group() as tasks:
        await session.initialize()

        async def keep(token):
            tokens.append(token)

        async def call():
            metadata = ClientMessageMetadata(on_resumption_token_update=keep)
            await session.send_request(
                tool_request(peer, 4, 0.1), CallToolResult, metadata=metadata, progress_callback=report
            )

        tasks.start_soon(call)
        await eventually(lambda: tokens, what="a token")
        handle = first.handle
        tasks.cancel_scope.cancel()

    recorder.clear()
    async with resumable_http(recorder.url, handle=handle) as streams, ClientSession(*streams) as session:
        await session.initialize()
        metadata = ClientMessageMetadata(resumption_token=tokens[0])
        for _ in ("while the tool runs", "after it has ended"):
            reports.clear()
            with anyio.fail_after(20):
                result = await session.send_request(
                    tool_request(peer, 4, 0.1), CallToolResult, metadata=metadata, progress_callback=report
                )
            assert "done" in text_of(result) or "completed" in text_of(result)
            assert reports == [1, 2, 3, 4]
        assert text_of(await session.call_tool(*echo(peer, "usable"))) == "usable"
    assert recorder.methods()[0] == "GET"
    assert recorder.exchanges[0].headers["last-event-id"] == read_token(tokens[0])[0]
    assert recorder.methods().count("POST tools/call") == 1, "the tool is not called again"


async def test_a_token_is_of_no_use_once_the_session_is_gone(recorded_peer):
    recorder = recorded_peer(*STORE)
    async with Client(opened := resumable_http(recorder.url)):
        handle = opened.handle
        await opened.terminate()
    recorder.clear()
    async with resumable_http(recorder.url, handle=handle) as streams, ClientSession(*streams) as session:
        await session.initialize()
        metadata = ClientMessageMetadata(resumption_token="1")  # noqa: S106 - no password
        with pytest.raises(MCPError, match="no longer knows session"):
            await session.send_request(tool_request(STORE, 1, 0.1), CallToolResult, metadata=metadata)
    assert recorder.methods() == ["GET"]


@pytest.mark.parametrize("wire_id", ["0a1b2c3d4e5f-7", None])
@pytest.mark.parametrize("event_id", ["7", "c0ffee_17", "a-b:c/d=="])
def test_a_token_is_read_as_it_was_written(event_id, wire_id):
    assert read_token(write_token(event_id, wire_id)) == (event_id, wire_id)


def test_a_bare_event_id_is_a_token_that_names_no_request():
    assert read_token("c0ffee_17") == ("c0ffee_17", None)


@pytest.mark.parametrize("peer", [EVERYTHING, STORE], ids=" ".join)
async def test_of_two_calls_in_flight_another_process_continues_the_one_that_the_token_names(recorded_peer, peer):
    recorder = recorded_peer(*peer)
    tokens = {}

    def asked(steps):
        """A call in *steps* steps, by which its answer and its progress are told apart."""
        return tool_request(peer, steps, 0.2)

    def keep(steps):
        async def note(token):
            tokens.setdefault(steps, token)

        return ClientMessageMetadata(on_resumption_token_update=note)

    async def ignore(*_):
        pass

    first = resumable_http(recorder.url)
    async with first as streams, ClientSession(*streams) as session, anyio.create_task_group() as tasks:
        await session.initialize()
        for steps in (2, 5):
            tasks.start_soon(
                partial(session.send_request, metadata=keep(steps), progress_callback=ignore),
                asked(steps),
                CallToolResult,
            )
        await eventually(lambda: len(tokens) == 2, what="two tokens")
        handle = first.handle
        tasks.cancel_scope.cancel()

    recorder.clear()
    for steps in (5, 2):
        reports = []

        async def report(*progress, reports=reports):
            reports.append(progress)

        async with resumable_http(recorder.url, handle=handle) as streams, ClientSession(*streams) as session:
            await session.initialize()
            metadata = ClientMessageMetadata(resumption_token=tokens[steps])
            with anyio.fail_after(30):
                result = await session.send_request(
                    asked(steps), CallToolResult, metadata=metadata, progress_callback=report
                )
        if peer == EVERYTHING:
            assert f"Steps: {steps}" in text_of(result)
        assert [(progress, total) for progress, total, _ in reports] == [(step, steps) for step in range(1, steps + 1)]
    assert set(recorder.methods()) == {"GET"}
    named = {read_token(tokens[steps])[1] for steps in (2, 5)}
    assert len(named) == 2, "each token names its own request"
    assert None not in named
    sent = {read_token(tokens[steps])[0] for steps in (2, 5)}
    assert {exchange.headers["last-event-id"] for exchange in recorder.exchanges} >= sent, "as the server gave them"


@pytest.mark.parametrize("peer", [*WITH_EVENT_STORE, EVERYTHING], ids=" ".join)
async def test_a_bare_event_id_continues_a_call_too(recorded_peer, peer):
    recorder = recorded_peer(*peer)
    tokens = []

    async def keep(token):
        tokens.append(token)

    first = resumable_http(recorder.url)
    async with first as streams, ClientSession(*streams) as session:
        await session.initialize()
        metadata = ClientMessageMetadata(on_resumption_token_update=keep)
        await session.send_request(tool_request(peer, 2, 0.05), CallToolResult, metadata=metadata)
        handle = first.handle
    event_id, _ = read_token(tokens[0])
    async with resumable_http(recorder.url, handle=handle) as streams, ClientSession(*streams) as session:
        await session.initialize()
        metadata = ClientMessageMetadata(resumption_token=event_id)
        with anyio.fail_after(20):
            result = await session.send_request(tool_request(peer, 2, 0.05), CallToolResult, metadata=metadata)
    assert "done" in text_of(result) or "completed" in text_of(result)
    assert recorder.methods().count("POST tools/call") == 1
