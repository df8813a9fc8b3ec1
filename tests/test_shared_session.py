"""Several clients on one session at once: each gets its own answers and its own progress, and cancels its own calls."""

import threading
from concurrent.futures import ThreadPoolExecutor

import anyio
import httpx2
import pytest
from calls import KINDS, PEERS, WITH_EVENT_STORE, echo, is_call, is_cancellation, seen, slow, text_of
from mcp import Client
from mcp.shared.message import ClientMessageMetadata, SessionMessage
from mcp_types import JSONRPCNotification, JSONRPCRequest

from mcp_celery.exchange import read_token
from mcp_celery.transport import resumable_http

CALLS = 100
AT_ONCE = 40


@pytest.fixture
def handle_of():
    """`handle_of(url)` opens a session there and leaves it alive."""

    def open_session(url):
        async def run():
            async with Client(transport := resumable_http(url)):
                return transport.handle

        return anyio.run(run)

    return open_session


async def call_often(url, handle, peer, name, start):
    """Make many overlapping calls, each with a text of its own, and return what did not come back as it went."""
    wrong = []
    limit = anyio.CapacityLimiter(AT_ONCE)
    async with Client(resumable_http(url, handle=handle), mode="legacy") as client, anyio.create_task_group() as tasks:
        await anyio.to_thread.run_sync(start.wait, 20)

        async def call(number):
            async with limit:
                text = f"{name}-{number}"
                answer = text_of(await client.call_tool(*echo(peer, text)))
                if answer != text:
                    wrong.append((text, answer))

        tasks.cancel_scope.deadline = anyio.current_time() + 30
        for number in range(CALLS):
            tasks.start_soon(call, number)
    if tasks.cancel_scope.cancelled_caught:
        wrong.append("not all of them came back")
    return wrong


@pytest.mark.parametrize("peer", [*KINDS, ("python", "--json"), ("typescript", "--event-store")], ids=" ".join)
def test_hundreds_of_overlapping_calls_of_two_clients_get_their_own_answers(recorded_peer, handle_of, peer):
    recorder = recorded_peer(*peer)
    handle = handle_of(recorder.url)
    start = threading.Barrier(2)
    with ThreadPoolExecutor(2) as pool:
        wrong = list(
            pool.map(lambda name: anyio.run(call_often, recorder.url, handle, peer, name, start), ["one", "two"])
        )
    assert wrong == [[], []]
    calls = [exchange for exchange in recorder.exchanges if is_call(exchange)]
    assert len(calls) == 2 * CALLS
    assert len({exchange.rpc_id for exchange in calls}) == 2 * CALLS
    assert {exchange.session_id for exchange in calls} == {handle.session_id}


@pytest.mark.anyio
@pytest.mark.parametrize("peer", [peer for peer in PEERS if "--json" not in peer], ids=" ".join)
async def test_progress_goes_to_the_call_that_asked_for_it(recorded_peer, peer):
    url = recorded_peer(*peer).url
    reports = {}

    async def call(client, name, steps):
        async def report(progress, total, _message):
            reports.setdefault(name, []).append((progress, total))

        await client.call_tool(*slow(peer, steps, 0.02), progress_callback=report)

    async with (
        Client(transport := resumable_http(url)) as one,
        Client(resumable_http(url, handle=transport.handle), mode="legacy") as two,
        anyio.create_task_group() as tasks,
    ):
        for steps in (2, 3, 4):
            tasks.start_soon(call, one, f"one-{steps}", steps)
            tasks.start_soon(call, two, f"two-{steps + 3}", steps + 3)
    assert reports == {
        f"{name}-{steps}": [(step, steps) for step in range(1, steps + 1)]
        for name, all_steps in (("one", (2, 3, 4)), ("two", (5, 6, 7)))
        for steps in all_steps
    }


@pytest.mark.anyio
@pytest.mark.parametrize("peer", PEERS, ids=" ".join)
async def test_a_cancellation_names_the_request_as_the_server_knows_it(recorded_peer, peer):
    recorder = recorded_peer(*peer)
    async with (
        Client(transport := resumable_http(recorder.url)) as one,
        Client(resumable_http(recorder.url, handle=transport.handle), mode="legacy") as two,
        anyio.create_task_group() as tasks,
    ):
        results = []

        async def call_beside():
            results.append(text_of(await two.call_tool(*slow(peer, 4, 0.1))))

        tasks.start_soon(call_beside)
        beside = await seen(recorder, is_call)
        with anyio.CancelScope() as scope:
            async with anyio.create_task_group() as calls:
                calls.start_soon(one.call_tool, *slow(peer, 100, 0.1))
                mine = await seen(recorder, lambda exchange: is_call(exchange) and exchange.number != beside.number)
                scope.cancel()
        cancellation = await seen(recorder, lambda exchange: is_cancellation(exchange) and exchange.status)
        assert cancellation.rpc_params["requestId"] == mine.rpc_id
        assert cancellation.status == 202
        assert text_of(await one.call_tool(*echo(peer, "usable"))) == "usable"
    assert "done" in results[0] or "completed" in results[0], "the call of the other client goes on"


async def rest_of(url, handle, last_event_id, seconds):
    """What the server still gives of a response, for longer than its tool would take."""
    headers = {
        "accept": "text/event-stream",
        "mcp-session-id": handle.session_id,
        "mcp-protocol-version": handle.protocol_version,
        "last-event-id": last_event_id,
    }
    text = ""
    async with httpx2.AsyncClient() as client:
        with anyio.move_on_after(seconds):
            async with client.stream("GET", url, headers=headers) as response:
                async for part in response.aiter_text():
                    text += part
                    if "done" in text:
                        return text
    return text


@pytest.mark.anyio
@pytest.mark.parametrize("is_cancelled", [True, False], ids=["cancelled", "left"])
@pytest.mark.parametrize("peer", WITH_EVENT_STORE, ids=" ".join)
async def test_a_call_goes_on_without_its_client_unless_it_is_cancelled(recorded_peer, peer, is_cancelled):
    recorder = recorded_peer(*peer)
    async with Client(opened := resumable_http(recorder.url)):
        handle = opened.handle
    tokens = []

    async def keep(token):
        tokens.append(token)

    name, arguments = slow(peer, 6, 0.1)
    params = {"name": name, "arguments": arguments, "_meta": {"progressToken": "mine"}}
    async with resumable_http(recorder.url, handle=handle) as (read, write):
        request = JSONRPCRequest(jsonrpc="2.0", id=7, method="tools/call", params=params)
        await write.send(SessionMessage(request, ClientMessageMetadata(on_resumption_token_update=keep)))
        progress = await read.receive()
        assert progress.message.params["progressToken"] == "mine"
        if is_cancelled:
            cancellation = JSONRPCNotification(
                jsonrpc="2.0", method="notifications/cancelled", params={"requestId": 7, "reason": "enough"}
            )
            await write.send(SessionMessage(cancellation))
            sent = await seen(recorder, is_cancellation)
            assert sent.rpc_params == {"requestId": (await seen(recorder, is_call)).rpc_id, "reason": "enough"}
    event_id, _ = read_token(tokens[0])
    rest = await rest_of(recorder.url, handle, event_id, 1.2)
    assert "step 1" in rest
    assert ("done" in rest) is not is_cancelled
