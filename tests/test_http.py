"""What HTTP does to a session: redirects, cookies, refusals, and servers that are away or silent."""

import base64
import socket
from contextlib import ExitStack, contextmanager

import anyio
import pytest
from calls import echo, is_call, is_cancellation, seen, slow, text_of
from mcp import Client
from processes import free_port

from mcp_celery.exceptions import ConfigurationError, TransportError
from mcp_celery.http import shown, split_credentials
from mcp_celery.transport import resumable_http

pytestmark = pytest.mark.anyio

SECRET = "t0p-s3cret"  # noqa: S105 - looked for in what is shown
ECHO = echo(("python",), "x")


def shown_by(error):
    """All that a log could show of *error*, without the secret."""
    text = f"{error} {error!r} {error.__cause__!r} {error.__context__!r}"
    assert SECRET not in text
    return text


# Redirects


async def test_a_redirect_at_the_same_origin_is_followed_and_remembered(recorded_peer, new_session):
    recorder = recorded_peer("python")
    recorder.answer(rpc_method="initialize", status=307, headers={"Location": "/mcp?moved=1"})
    session = new_session(recorder.url)
    assert text_of(await session.call_tool(*ECHO)) == "x"
    await session.close()
    assert recorder.methods()[:2] == ["POST initialize", "POST initialize"]
    paths = [exchange.path for exchange in recorder.exchanges]
    assert paths == ["/mcp"] + ["/mcp?moved=1"] * (len(paths) - 1)
    assert recorder.exchanges[1].body == recorder.exchanges[0].body


async def test_a_redirect_to_another_origin_is_refused_and_gets_nothing(recorded_peer, new_session):
    recorder, other = recorded_peer("python"), recorded_peer("python", "--json")
    session = new_session(recorder.url, headers=(("x-key", SECRET),))
    await session.open()
    target = other.url.replace("http://", f"http://user:{SECRET}@") + f"?key={SECRET}#{SECRET}"
    recorder.answer(rpc_method="tools/call", status=307, headers={"Location": target})
    with pytest.raises(TransportError, match="another origin") as caught:
        await session.call_tool(*ECHO)
    assert other.url in shown_by(caught.value)
    assert (caught.value.status, caught.value.sent) == (307, False)
    assert other.exchanges == []
    assert text_of(await session.call_tool(*ECHO)) == "x"


@pytest.mark.parametrize("status", [301, 302, 303])
async def test_a_redirect_that_would_lose_the_request_is_refused(recorded_peer, new_session, status):
    recorder = recorded_peer("python")
    recorder.answer(rpc_method="initialize", status=status, headers={"Location": "/login"})
    with pytest.raises(TransportError, match="changes the method") as caught:
        await new_session(recorder.url).open()
    assert caught.value.status == status
    assert recorder.methods() == ["POST initialize"]


async def test_redirects_without_end_are_refused(recorded_peer, new_session):
    recorder = recorded_peer("python")
    recorder.answer(http_method="POST", status=308, headers={"Location": "/mcp"}, times=100)
    with pytest.raises(TransportError, match="without end"):
        await new_session(recorder.url).open()
    assert len(recorder.exchanges) < 20


# Cookies


async def test_cookies_of_the_session_are_sent_with_each_of_its_requests(recorded_peer, new_session):
    recorder = recorded_peer("python")
    recorder.set_cookie("route=node-7; Path=/; HttpOnly")
    recorder.set_cookie("lb=b; Path=/mcp")
    session = new_session(recorder.url)
    await session.call_tool(*ECHO)
    first, *others = recorder.exchanges
    assert first.cookies == {}
    assert [exchange.cookies for exchange in others] == [{"route": "node-7", "lb": "b"}] * len(others)


async def test_cookies_travel_in_the_handle(recorded_peer, new_session):
    recorder = recorded_peer("python")
    recorder.set_cookie("route=node-7; Path=/")
    async with Client(transport := resumable_http(recorder.url)):
        text = transport.handle.dumps()
        assert "node-7" not in repr(transport.handle)
    recorder.clear()
    async with Client(again := resumable_http(recorder.url, handle=text), mode="legacy") as client:
        await client.call_tool(*ECHO)
        await again.terminate()
    assert {exchange.method for exchange in recorder.exchanges} == {"POST", "DELETE"}
    assert all(exchange.cookies == {"route": "node-7"} for exchange in recorder.exchanges)


async def test_a_cookie_that_the_server_deletes_is_sent_no_more(recorded_peer, new_session):
    recorder = recorded_peer("python")
    recorder.set_cookie("route=node-7; Path=/")
    session = new_session(recorder.url)
    await session.open()
    recorder.answer(
        rpc_method="tools/call", status=200, body=b"{}", headers={"Set-Cookie": "route=; Path=/; Max-Age=0"}
    )
    with pytest.raises(TransportError):
        await session.call_tool("executions")
    assert session.handle.cookies == {}
    await session.call_tool("executions")
    assert [exchange.cookies for exchange in recorder.exchanges if is_call(exchange)] == [{"route": "node-7"}, {}]


async def test_a_configured_cookie_is_sent_beside_those_of_the_session(recorded_peer, new_session):
    recorder = recorded_peer("python")
    recorder.set_cookie("route=node-7; Path=/")
    session = new_session(recorder.url, headers=(("Cookie", "tenant=a"),))
    await session.call_tool("executions")
    call = next(exchange for exchange in recorder.exchanges if is_call(exchange))
    assert call.cookies == {"tenant": "a", "route": "node-7"}


async def test_cookies_of_one_session_are_not_sent_by_another_on_the_same_client(recorded_peer, new_session):
    recorder = recorded_peer("python")
    plain = new_session(recorder.url)
    await plain.open()
    recorder.set_cookie("route=node-7; Path=/")
    pinned = new_session(recorder.url)
    await pinned.open()
    assert pinned.handle.cookies == {"route": "node-7"}
    assert plain.handle.cookies == {}
    recorder.clear()
    await plain.call_tool(*ECHO)
    await pinned.call_tool(*ECHO)
    cookies = {exchange.session_id: exchange.cookies for exchange in recorder.exchanges if is_call(exchange)}
    assert cookies == {plain.session_id: {}, pinned.session_id: {"route": "node-7"}}


# Credentials


async def test_headers_and_credentials_of_the_url_are_sent_with_each_request(recorded_peer, new_session):
    recorder = recorded_peer("python")
    url = recorder.url.replace("http://", f"http://user:{SECRET}@")
    session = new_session(url, headers=(("x-key", "k"),))
    await session.call_tool(*ECHO)
    await session.close()
    expected = "Basic " + base64.b64encode(f"user:{SECRET}".encode()).decode()
    assert {exchange.headers["authorization"] for exchange in recorder.exchanges} == {expected}
    assert {exchange.headers["x-key"] for exchange in recorder.exchanges} == {"k"}


def test_a_url_is_shown_without_the_parts_where_secrets_stand():
    url = f"https://user:{SECRET}@mcp.example:8443/mcp?key={SECRET}#{SECRET}"
    assert shown(url) == "https://mcp.example:8443/mcp"
    assert split_credentials(url) == (f"https://mcp.example:8443/mcp?key={SECRET}#{SECRET}", ("user", SECRET))
    assert split_credentials("http://mcp.example/mcp") == ("http://mcp.example/mcp", None)


@pytest.mark.parametrize("url", ["", "mcp", f"ftp://u:{SECRET}@host/", f"http://u:{SECRET}@[::1", f"http:///{SECRET}"])
def test_what_is_no_http_url_is_refused(url):
    with pytest.raises(ConfigurationError, match="http:// or https://") as caught:
        resumable_http(url)
    shown_by(caught.value)


# Refusals


@pytest.mark.parametrize("status", [401, 403, 429, 500, 503])
@pytest.mark.parametrize("method", ["initialize", "tools/call"])
async def test_a_refusal_is_an_error_with_its_status(recorded_peer, new_session, method, status):
    recorder = recorded_peer("python")
    session = new_session(recorder.url, headers=(("authorization", SECRET),))
    recorder.answer(rpc_method=method, status=status, body=SECRET.encode(), content_type="text/plain")
    with pytest.raises(TransportError, match=f"HTTP {status}") as caught:
        await session.call_tool(*ECHO)
    shown_by(caught.value)
    assert (caught.value.server, caught.value.status) == ("server", status)
    assert text_of(await session.call_tool(*ECHO)) == "x", "the next call may go better"


async def test_a_refused_notification_leaves_the_session_open(recorded_peer, new_session):
    recorder = recorded_peer("python")
    recorder.answer(rpc_method="notifications/initialized", status=500)
    session = new_session(recorder.url)
    await session.open()
    assert session.session_id is not None


# Servers that are away


async def test_a_server_that_is_not_there_was_not_reached(new_session):
    session = new_session(f"http://127.0.0.1:{free_port()}/mcp", headers=(("x-key", SECRET),))
    with anyio.fail_after(10), pytest.raises(TransportError, match="could not be reached") as caught:
        await session.call_tool(*ECHO)
    shown_by(caught.value)
    assert (caught.value.server, caught.value.status, caught.value.sent) == ("server", None, False)


@contextmanager
def full_backlog():
    """The port of a socket that takes no more connections and refuses none."""
    with ExitStack() as stack:
        listener = stack.enter_context(socket.socket())
        listener.bind(("127.0.0.1", 0))
        listener.listen(0)
        for _ in range(4):
            client = stack.enter_context(socket.socket())
            client.setblocking(False)
            client.connect_ex(listener.getsockname())
        yield listener.getsockname()[1]


async def test_a_server_that_takes_no_connection_is_given_up_after_the_connect_timeout(new_session):
    with full_backlog() as port:
        session = new_session(f"http://127.0.0.1:{port}/mcp", connect_timeout_seconds=0.2)
        with anyio.fail_after(10), pytest.raises(TransportError, match="ConnectTimeout") as caught:
            await session.call_tool(*ECHO)
    assert not caught.value.sent


async def test_a_server_that_stops_between_two_calls_is_an_error_and_may_come_back(start_peer, record, new_session):
    server = start_peer("python", fresh=True)
    session = new_session(server.url)
    assert text_of(await session.call_tool(*ECHO)) == "x"
    await anyio.to_thread.run_sync(server.stop)
    for _ in range(2):
        with anyio.fail_after(10), pytest.raises(TransportError):
            await session.call_tool(*ECHO)
    await anyio.to_thread.run_sync(server.restart)
    await session.close()


async def test_a_text_that_cannot_be_sent_is_the_error_of_its_call_alone(recorded_peer, new_session):
    recorder = recorded_peer("python")
    session = new_session(recorder.url)
    await session.open()
    recorder.clear()
    with pytest.raises(TransportError, match="cannot be written") as caught:
        await session.call_tool("echo", {"text": f"{SECRET} \ud800"})
    shown_by(caught.value)
    assert not caught.value.sent
    assert recorder.exchanges == []
    assert text_of(await session.call_tool(*ECHO)) == "x"


# Servers that are silent


@pytest.mark.parametrize("after_events", [None, 0, 1])
@pytest.mark.parametrize("peer", [("python",), ("typescript",)], ids=" ".join)
async def test_a_silent_server_is_given_up_after_the_read_timeout_and_told(
    recorded_peer, new_session, peer, after_events
):
    recorder = recorded_peer(*peer)
    session = new_session(recorder.url, read_timeout_seconds=0.5)
    await session.open()
    recorder.stall(rpc_method="tools/call", after_events=after_events)
    with anyio.fail_after(10), pytest.raises(TransportError, match=r"silent for 0.5 s") as caught:
        await session.call_tool(*slow(peer, 50, 0.1), on_progress=lambda *_: None)
    assert caught.value.sent
    cancellation = await seen(recorder, is_cancellation)
    assert cancellation.rpc_params["requestId"] == (await seen(recorder, is_call)).rpc_id
    await seen(recorder, lambda exchange: is_call(exchange) and exchange.ended)
    assert text_of(await session.call_tool(*echo(peer, "usable"))) == "usable"


async def test_a_server_that_is_silent_to_the_handshake_is_given_up(recorded_peer, new_session):
    recorder = recorded_peer("python")
    recorder.stall(rpc_method="initialize")
    session = new_session(recorder.url, read_timeout_seconds=0.3)
    with anyio.fail_after(10), pytest.raises(TransportError, match=r"silent for 0.3 s"):
        await session.open()
    assert not session.is_open
    await session.open()
    assert text_of(await session.call_tool(*ECHO)) == "x"


async def test_progress_keeps_a_call_from_being_given_up(recorded_peer, new_session):
    recorder = recorded_peer("python")
    session = new_session(recorder.url, read_timeout_seconds=1)
    result = await session.call_tool("slow", {"steps": 6, "seconds": 0.4}, on_progress=lambda *_: None)
    assert text_of(result) == "done"


@pytest.mark.parametrize(
    "peer", [("python",), ("python", "--json"), ("python1",), ("typescript",), ("everything",)], ids=" ".join
)
async def test_a_call_that_takes_too_long_is_cancelled_and_the_session_stays(recorded_peer, new_session, peer):
    recorder = recorded_peer(*peer)
    session = new_session(recorder.url)
    await session.open()
    with anyio.fail_after(10), pytest.raises(TransportError, match=r"within 0.3 s; it was cancelled") as caught:
        await session.call_tool(*slow(peer, 100, 0.1), timeout=0.3)
    assert caught.value.sent
    call = await seen(recorder, is_call)
    assert (await seen(recorder, is_cancellation)).rpc_params["requestId"] == call.rpc_id
    assert text_of(await session.call_tool(*echo(peer, "usable"))) == "usable"
    assert recorder.methods().count("POST initialize") == 1


async def test_a_timeout_counts_the_opening_too(recorded_peer, new_session):
    recorder = recorded_peer("python")
    recorder.stall(rpc_method="initialize")
    session = new_session(recorder.url)
    with anyio.fail_after(10), pytest.raises(TransportError, match=r"within 0.2 s"):
        await session.call_tool(*ECHO, timeout=0.2)
    assert text_of(await session.call_tool(*ECHO, timeout=10)) == "x"
