"""A session that the server no longer knows is told from every other failure, and nothing is opened in its place."""

import json

import anyio
import mcp_types as types
import pytest
from calls import KINDS, PEERS, delete_behind_its_back, echo, eventually, is_call, seen, text_of
from mcp import Client, MCPError

from mcp_celery.exceptions import SessionLostError, TransportError
from mcp_celery.handle import short_hash
from mcp_celery.transport import resumable_http

pytestmark = pytest.mark.anyio

#: How the servers refuse an unknown session.
STATUS = {"python": 404, "python1": 404, "typescript": 404, "everything": 400}


def rpc_error(code, text="it says"):
    return json.dumps({"jsonrpc": "2.0", "id": None, "error": {"code": code, "message": text}}).encode()


async def notify(session):
    params = types.ProgressNotificationParams(progress_token="token", progress=1)  # noqa: S106 - no password
    await session.client.session.send_notification(types.ProgressNotification(params=params))


async def lose(session, call):
    """The SessionLostError of this call, with no secret in it."""
    secret = session.session_id
    with pytest.raises(SessionLostError) as caught:
        await call
    assert secret not in repr(caught.value)
    assert secret not in str(caught.value)
    return caught.value


@pytest.mark.parametrize("peer", PEERS, ids=" ".join)
async def test_a_deleted_session_is_lost_until_another_is_opened(recorded_peer, new_session, peer):
    recorder = recorded_peer(*peer)
    session = new_session(recorder.url)
    await session.open()
    first = session.session_id
    await delete_behind_its_back(recorder, first)

    error = await lose(session, session.call_tool(*echo(peer, "x")))
    assert (error.server, error.session, error.status) == ("server", short_hash(first), STATUS[peer[0]])
    assert "'server'" in str(error)
    assert short_hash(first) in str(error)
    assert (session.session_id, session.handle) == (None, None)
    assert recorder.methods() == ["POST tools/call"], "nothing is opened silently"

    for call in (session.call_tool(*echo(peer, "x")), session.list_tools(), session.list_prompts()):
        with pytest.raises(SessionLostError):
            await call
    assert recorder.methods() == ["POST tools/call"], "nothing more is sent"

    await session.open()
    assert session.session_id not in {None, first}
    assert not session.resumed
    assert text_of(await session.call_tool(*echo(peer, "new"))) == "new"
    assert {exchange.session_id for exchange in recorder.exchanges[2:]} == {session.session_id}


@pytest.mark.parametrize("peer", KINDS, ids=" ".join)
async def test_a_restarted_server_has_lost_the_session_of_a_handle(start_peer, record, new_session, peer):
    server = start_peer(*peer, fresh=True)
    recorder = record(server.url)
    opened = new_session(recorder.url)
    await opened.open()
    handle = await opened.detach()
    await anyio.to_thread.run_sync(server.restart)
    recorder.clear()

    resumed = new_session(recorder.url, handle)
    with pytest.raises(SessionLostError) as caught:
        await resumed.call_tool(*echo(peer, "x"))
    assert caught.value.status == STATUS[peer[0]]
    assert handle.session_id not in repr(caught.value)
    assert recorder.methods() == ["POST tools/call"]
    await resumed.close()
    assert recorder.methods() == ["POST tools/call"], "there is nothing to end"


@pytest.mark.parametrize("peer", KINDS, ids=" ".join)
async def test_all_calls_under_way_hear_of_the_loss(recorded_peer, new_session, peer):
    recorder = recorded_peer(*peer)
    session = new_session(recorder.url)
    await session.open()
    await delete_behind_its_back(recorder, session.session_id)
    errors = []

    async def call():
        try:
            await session.call_tool(*echo(peer, "x"))
        except (SessionLostError, MCPError, TransportError) as exc:
            errors.append(type(exc))

    async with anyio.create_task_group() as tasks:
        for _ in range(10):
            tasks.start_soon(call)
    assert errors == [SessionLostError] * 10


async def test_a_lost_session_is_lost_for_an_sdk_client_too(recorded_peer):
    recorder = recorded_peer("python")
    async with Client(transport := resumable_http(recorder.url)) as client:
        await delete_behind_its_back(recorder, transport.session_id)
        for _ in range(2):
            with pytest.raises(MCPError, match="no longer knows session"):
                await client.call_tool("echo", {"text": "x"})
        assert isinstance(transport.lost, SessionLostError)
        assert (transport.session_id, transport.handle) == (None, None)
    assert recorder.methods() == ["POST tools/call"]


@pytest.mark.parametrize("code", [-32001, -32600, -32000])
async def test_a_json_rpc_error_with_http_200_is_no_loss(recorded_peer, new_session, code):
    recorder = recorded_peer("python")
    session = new_session(recorder.url)
    await session.open()
    recorder.answer(rpc_method="prompts/list", status=200, body=rpc_error(code))
    with pytest.raises(MCPError, match="it says") as caught:
        await session.list_prompts()
    assert caught.value.code == code
    assert session.session_id is not None
    assert len((await session.list_prompts()).prompts) == 1


@pytest.mark.parametrize(
    ("status", "body", "is_loss"),
    [
        (404, b"", True),
        (404, b"<html>no such page</html>", True),
        (404, rpc_error(-32001), True),
        (404, rpc_error(-32600), True),
        (400, b"", True),
        (400, rpc_error(-32000), True),
        (400, rpc_error(-32600), False),
        (400, rpc_error(-32602), False),
        (401, b"", False),
        (403, b"", False),
        (410, b"", False),
        (500, b"", False),
    ],
)
async def test_the_status_tells_a_loss_from_another_refusal(recorded_peer, new_session, status, body, is_loss):
    recorder = recorded_peer("python")
    session = new_session(recorder.url)
    await session.open()
    recorder.answer(rpc_method="tools/call", status=status, body=body)
    with pytest.raises(SessionLostError if is_loss else (TransportError, MCPError)) as caught:
        await session.call_tool("echo", {"text": "x"})
    if is_loss or isinstance(caught.value, TransportError):
        assert caught.value.status == status
    assert (session.session_id is None) is is_loss
    if not is_loss:
        assert text_of(await session.call_tool("echo", {"text": "usable"})) == "usable"


@pytest.mark.parametrize("peer", KINDS, ids=" ".join)
async def test_a_notification_to_a_lost_session_shows_at_the_next_call(recorded_peer, new_session, peer):
    recorder = recorded_peer(*peer)
    session = new_session(recorder.url)
    await session.open()
    await delete_behind_its_back(recorder, session.session_id)
    await notify(session)
    await eventually(lambda: session.session_id is None, what="the loss to be seen")
    with pytest.raises(SessionLostError):
        await session.call_tool(*echo(peer, "x"))
    assert recorder.methods() == ["POST notifications/progress"]


async def test_a_notification_that_cannot_be_delivered_does_no_harm(recorded_peer, new_session):
    recorder = recorded_peer("python")
    session = new_session(recorder.url)
    await session.open()
    recorder.drop(rpc_method="notifications/progress")
    await notify(session)
    recorder.answer(rpc_method="notifications/progress", status=500)
    await notify(session)
    await seen(recorder, lambda exchange: exchange.rpc_method == "notifications/progress" and exchange.status == 500)
    assert text_of(await session.call_tool("echo", {"text": "usable"})) == "usable"


async def test_a_server_without_sessions_cannot_lose_one(recorded_peer, new_session):
    recorder = recorded_peer("python", "--stateless")
    session = new_session(recorder.url)
    await session.open()
    recorder.answer(rpc_method="tools/call", status=404)
    with pytest.raises(TransportError, match="HTTP 404") as caught:
        await session.call_tool("echo", {"text": "x"})
    assert caught.value.status == 404
    assert text_of(await session.call_tool("echo", {"text": "usable"})) == "usable"


async def test_an_idle_session_that_the_server_dropped_is_lost(recorded_peer, new_session):
    recorder = recorded_peer("python", "--idle", "0.2")
    session = new_session(recorder.url)
    await session.open()

    async def is_lost():
        try:
            await session.client.session.send_request(types.PingRequest(), types.EmptyResult)
        except MCPError as exc:
            return isinstance(exc.data, SessionLostError)
        return False

    with anyio.fail_after(20):
        pause = 0.1
        while not await is_lost():
            pause *= 2
            await anyio.sleep(pause)
    with pytest.raises(SessionLostError):
        await session.call_tool("echo", {"text": "x"})
    assert not any(is_call(exchange) for exchange in recorder.exchanges)
