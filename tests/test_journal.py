"""The journal of a durable task: finished calls are not made again, the one under way is continued, one run at a time.

A run of a task is a journal and a session here; the real processes, and how they are killed, are in
`workers/test_durable.py`.
"""

import asyncio
import json
import os
import secrets
import threading
from contextlib import asynccontextmanager
from functools import partial

import anyio
import pytest
from calls import KINDS, delete_behind_its_back, echo, eventually, is_call, is_cancellation, seen, slow, text_of
from mcp import MCPError
from processes import free_port
from redis import Redis

from mcp_celery import journal as journal_module
from mcp_celery import redis_store
from mcp_celery.connections import Connections
from mcp_celery.exceptions import (
    CallInterruptedError,
    ConfigurationError,
    JournalError,
    JournalMismatchError,
    SessionLostError,
    StoreError,
    SupersededError,
    ToolError,
    TransportError,
)
from mcp_celery.exchange import read_token, write_token
from mcp_celery.handle import SessionHandle
from mcp_celery.journal import Journal, digest_of
from mcp_celery.redis_store import RedisStore
from mcp_celery.session import AsyncMCPSession
from mcp_celery.settings import ServerSettings, StoreSettings
from mcp_celery.store import process_name

pytestmark = pytest.mark.anyio

PLAIN = ("python",)
STORE = ("python", "--event-store")
MODERN = ("python", "--modern-only")
EVERYTHING = ("everything",)
KEY = "{mcp_celery}:journal:task"
DAY = 24 * 3600
FAILURE = {"class": "TransportError", "args": ["It could not be reached", "server", None, False]}


@pytest.fixture
def client(valkey):
    with Redis.from_url(valkey, decode_responses=True) as client:
        yield client


class Reachable(RedisStore):
    """A store of one run, which may be out of its reach, and slow to take tokens."""

    def __init__(self, url, **settings):
        super().__init__(StoreSettings(url=url, **settings))
        self.is_away = False
        self.may_note_tokens = threading.Event()
        self.may_note_tokens.set()
        self.tokens = []
        self.trips = 0

    def _run(self, script, *more, **arguments):
        is_renewal = script == redis_store._WRITE_JOURNAL and not more
        self.trips += not is_renewal
        return super()._run(script, *more, **arguments)

    def _ask(self, question):
        if self.is_away:
            raise StoreError("The store is out of reach")
        return super()._ask(question)

    def write_journal(self, task_id, owner, fields, lease_seconds):
        tokens = [text for name, text in fields.items() if name.startswith("token:")]
        if tokens:
            self.may_note_tokens.wait(10)
            self.tokens += tokens
        return super().write_journal(task_id, owner, fields, lease_seconds)


@pytest.fixture
async def runs(valkey):
    """`runs(attempt=0, store=None, **options)` returns the journal of another run of the same task."""
    journals = []

    def new(attempt=0, store=None, **options):
        options = {"max_result_bytes": 1024 * 1024, **options}
        journals.append(Journal(store or Reachable(valkey), "task", attempt=attempt, **options))
        return journals[-1]

    yield new
    for journal in journals:
        await journal.end(is_done=False)


@pytest.fixture
async def running(runs):
    """`running(url, attempt=0, ...)` is entered for a session of one run, which then goes down without a word."""
    connections = Connections()

    @asynccontextmanager
    async def run(url, attempt=0, store=None, server="server", read_timeout_seconds=None, tell=None, **options):
        journal = runs(attempt, store, **options)
        await journal.begin()
        timeout = {} if read_timeout_seconds is None else {"read_timeout_seconds": read_timeout_seconds}
        settings = ServerSettings(name=server, url=url, **timeout)
        session = AsyncMCPSession(settings, connections, journal.sessions.get(server), journal=journal, tell=tell)
        try:
            yield session
        finally:
            await session.release()
            # As the main process of a worker does, or as time does.
            await journal.end(is_done=False)

    yield run
    await connections.aclose()


@pytest.fixture
def quick_lease(monkeypatch):
    """Leases lapse within a test."""
    monkeypatch.setattr(journal_module, "LEASE_SECONDS", 0.6)
    monkeypatch.setattr(journal_module, "POLL_SECONDS", 0.05)


@pytest.fixture
def quick_outage(monkeypatch):
    """A store that is away is noticed, and asked again, within a test."""
    monkeypatch.setattr(redis_store, "TIMEOUT_SECONDS", 0.2)
    monkeypatch.setattr(redis_store, "PAUSE_SECONDS", 0.1)
    monkeypatch.setattr(journal_module, "POLL_SECONDS", 0.05)


async def add(session, a, b):
    return (await session.call_tool("add", {"a": a, "b": b})).structured_content["result"]


def calls_in(recorder):
    """The tools that were called."""
    return [exchange.rpc_params["name"] for exchange in recorder.exchanges if is_call(exchange)]


async def test_a_call_is_known_again_whatever_metadata_it_carries(recorded_peer, running):
    recorder = recorded_peer(*PLAIN)
    for trace in ("1", "2"):
        async with running(recorder.url) as session:
            answer = await session.call_tool("echo", {"text": "x"}, meta={"trace": trace})
            assert text_of(answer) == "x"
    (call,) = [exchange for exchange in recorder.exchanges if is_call(exchange)]
    assert call.rpc_params["_meta"]["trace"] == "1"


def everything_in(client):
    """All that is stored, keys included, as one text."""
    texts = []
    for key in client.keys("*"):
        texts.append(key)
        match client.type(key):
            case "hash":
                texts += [text for pair in client.hgetall(key).items() for text in pair]
            case "string":
                texts.append(client.get(key))
            case "list":
                texts += client.lrange(key, 0, -1)
            case "set":
                texts += client.smembers(key)
            case "zset":
                texts += client.zrange(key, 0, -1)
    return "\n".join(texts)


# What is written


async def test_calls_are_written_in_their_order_with_what_came_of_them(recorded_peer, running, client):
    recorder = recorded_peer(*PLAIN)
    async with running(recorder.url, attempt=2) as session:
        await add(session, 1, 2)
        await session.read_resource("note://hello")
        await session.get_prompt("greet", {"name": "Ada"})
        with pytest.raises(ToolError):
            await session.call_tool("fail")
        stored = client.hgetall(KEY)
    whats = [json.loads(stored[f"call:{number}"])[::2] for number in range(4)]
    assert whats == [["tool 'add'", 2], ["resource 'note://hello'", 2], ["prompt 'greet'", 2], ["tool 'fail'", 2]]
    ends = [json.loads(stored[f"end:{number}"]) for number in range(4)]
    assert [end["kind"] for end in ends] == ["result", "result", "result", "failed"]
    assert ends[0]["value"]["structuredContent"] == {"result": 3}
    assert SessionHandle.load(stored["session:server"]).server == "server"
    known = {"v", "owner", "until", "session:server"}
    assert {name for name in stored if not name.startswith(("call:", "end:"))} == known


async def test_a_call_is_written_before_it_is_sent(recorded_peer, running, client):
    recorder = recorded_peer(*PLAIN)
    recorder.stall(rpc_method="tools/call")
    async with running(recorder.url) as session, anyio.create_task_group() as tasks:
        tasks.start_soon(add, session, 1, 2)
        await seen(recorder, is_call)
        assert json.loads(client.hget(KEY, "call:0"))[0] == "tool 'add'"
        assert client.hexists(KEY, "session:server"), "the session too"
        tasks.cancel_scope.cancel()


async def test_a_call_is_not_written_before_its_session_is_open(recorded_peer, running, client):
    recorder = recorded_peer(*PLAIN)
    recorder.stall(rpc_method="initialize")
    async with running(recorder.url) as session, anyio.create_task_group() as tasks:
        tasks.start_soon(add, session, 1, 2)
        await seen(recorder, lambda exchange: exchange.rpc_method == "initialize")
        assert not client.hexists(KEY, "call:0"), "of one that was, nobody could say that it was not sent"
        tasks.cancel_scope.cancel()


async def test_arguments_are_stored_nowhere(recorded_peer, running, client):
    secret = "t0p-s3cret"  # noqa: S105 - looked for in what is stored
    recorder = recorded_peer(*STORE)
    async with running(recorder.url) as session:
        await session.call_tool("set_variable", {"name": "password", "value": secret})
        with pytest.raises(ToolError):
            await session.call_tool("fail", {"key": secret})
        recorder.drop(rpc_method="tools/call")
        with pytest.raises(TransportError):
            await session.call_tool("echo", {"text": secret})
        stored = everything_in(client)
    assert "tool 'echo'" in stored
    assert secret not in stored


def test_a_call_is_known_again_by_its_server_method_and_arguments():
    call = {"name": "add", "arguments": {"a": 1, "b": {"x": None, "y": "é"}}}
    same = {"arguments": {"b": {"y": "é", "x": None}, "a": 1}, "name": "add", "_meta": {"progressToken": 7}}
    assert digest_of("server", "tools/call", call) == digest_of("server", "tools/call", same)
    others = [{**call, "name": "sub"}, {**call, "arguments": {"a": 1}}, {**call, "arguments": None}, {}]
    digests = {digest_of("server", "tools/call", params) for params in (call, *others)}
    assert len(digests | {digest_of("server", "other", call), digest_of("other", "tools/call", call)}) == 7


async def test_a_journal_lives_no_longer_than_it_may(recorded_peer, running, valkey, client):
    recorder = recorded_peer(*STORE)
    store = Reachable(valkey, session_ttl_seconds=60)
    longest = 60 + redis_store.KEPT_SECONDS
    async with running(recorder.url, store=store) as session:
        assert longest - 10 < client.ttl(KEY) <= longest, "from its first moment on"
        client.persist(KEY)
        await add(session, 1, 2)
        assert longest - 10 < client.ttl(KEY) <= longest, "and from each call on"
    assert longest - 20 < client.ttl(KEY) <= longest, "and when nobody has it"


async def test_the_journal_of_a_task_that_has_ended_holds_nothing_but_that(recorded_peer, runs, running, client):
    recorder = recorded_peer(*STORE)
    async with running(recorder.url) as session:
        await add(session, 1, 2)
        await session._journal.end(is_done=True)
    assert set(client.hgetall(KEY)) == {"v", "done"}
    assert client.ttl(KEY) > DAY
    later = runs()
    await later.begin()
    assert (later.is_done, later.is_continued) == (True, False)
    await later.end(is_done=True)
    assert set(client.hgetall(KEY)) == {"v", "done"}


# What it costs


@pytest.mark.parametrize("peer", [PLAIN, STORE], ids=" ".join)
async def test_a_call_takes_two_round_trips_to_the_store_beside_its_tokens(
    recorded_peer, running, client, valkey, peer
):
    recorder, store = recorded_peer(*peer), Reachable(valkey)
    async with running(recorder.url, store=store) as session:
        await add(session, 0, 0)  # the first one records the session
        before = store.trips
        for number in range(10):
            await add(session, number, 1)
        if peer == STORE:
            await eventually(lambda: client.hexists(KEY, "token:10"), what="the last token")
        tokens = 10 if peer == STORE else 0
        assert store.trips - before == 20 + tokens
    before = store.trips
    async with running(recorder.url, store=store) as session:
        for number in range(10):
            await add(session, *((0, 0) if number == 0 else (number - 1, 1)))
    assert store.trips - before == 2, "calls that have finished cost none: one to begin, one to end"


async def test_a_call_does_not_wait_for_its_token_to_be_noted(recorded_peer, running, valkey, client):
    recorder = recorded_peer(*STORE)
    store = Reachable(valkey)
    store.may_note_tokens.clear()
    async with running(recorder.url, store=store) as session:
        with anyio.fail_after(5):
            assert await add(session, 1, 2) == 3
        assert not client.hexists(KEY, "token:0")
        store.may_note_tokens.set()
        await eventually(lambda: client.hexists(KEY, "token:0"), what="the token")


@pytest.mark.parametrize("peer", [STORE, ("typescript", "--event-store"), EVERYTHING], ids=" ".join)
async def test_a_token_is_noted_while_the_tool_runs(recorded_peer, running, client, peer):
    recorder = recorded_peer(*peer)
    async with running(recorder.url) as session, anyio.create_task_group() as tasks:
        tasks.start_soon(partial(session.call_tool, on_progress=print), *slow(peer, 100, 0.1))
        token = await eventually(lambda: client.hget(KEY, "token:0"), what="a token")
        tasks.cancel_scope.cancel()
    event_id, request_id = read_token(token)
    assert event_id
    assert request_id == next(exchange.rpc_id for exchange in recorder.exchanges if is_call(exchange))


async def test_tokens_are_noted_in_their_order_and_the_last_one_stays(recorded_peer, running, valkey, client):
    recorder = recorded_peer(*STORE)
    store = Reachable(valkey)
    async with running(recorder.url, store=store) as session:
        await session.call_tool(*slow(STORE, 100, 0.001), on_progress=lambda *_: None)
    event_ids = [int(read_token(token)[0]) for token in store.tokens]
    assert event_ids == sorted(event_ids)
    assert len(event_ids) > 1
    assert client.hget(KEY, "token:0") == store.tokens[-1]


# What has finished


@pytest.mark.parametrize("peer", [*KINDS, STORE, MODERN, ("python", "--json"), ("python", "--stateless")], ids=" ".join)
async def test_a_call_that_has_finished_gives_its_result_without_a_request(recorded_peer, running, peer):
    recorder = recorded_peer(*peer)
    tool = echo(peer, "x" * 10_000)
    async with running(recorder.url) as session:
        live = await session.call_tool(*tool), (await session.call_tool(*echo(peer, "ä\n\0\u2028"))).content
        recorder.clear()
    async with running(recorder.url) as session:
        replayed = await session.call_tool(*tool), (await session.call_tool(*echo(peer, "ä\n\0\u2028"))).content
        assert replayed == live
        assert recorder.exchanges == []
        assert text_of(await session.call_tool(*echo(peer, "live again"))) == "live again"
    assert recorder.methods()[0] in {"POST tools/call", "POST tools/list"}, "in the session that was opened before"
    assert len(calls_in(recorder)) == 1


@pytest.mark.parametrize("peer", [PLAIN, ("typescript",), MODERN], ids=" ".join)
async def test_resources_and_prompts_are_journaled_too(recorded_peer, running, peer):
    recorder = recorded_peer(*peer)

    async def read(session):
        return [
            await session.read_resource("note://hello"),
            await session.read_resource("note://people/Ada"),
            await session.get_prompt("greet", {"name": "Ada"}),
        ]

    async with running(recorder.url) as session:
        live = await read(session)
        recorder.clear()
    async with running(recorder.url) as session:
        assert await read(session) == live
    assert recorder.exchanges == []


KINDS_OF_CONTENT = [
    ("get-tiny-image", {}),
    ("get-structured-content", {"location": "New York"}),
    ("get-resource-links", {"count": 3}),
    ("get-resource-reference", {"resourceType": "Text", "resourceId": 1}),
    ("get-resource-reference", {"resourceType": "Blob", "resourceId": 2}),
    ("get-annotated-message", {"messageType": "error", "includeImage": True}),
    ("get-sum", {"a": 1, "b": 2.5}),
]


async def test_results_of_all_kinds_are_read_as_they_were_answered(recorded_peer, running):
    recorder = recorded_peer(*EVERYTHING)

    async def ask(session):
        results = [await session.call_tool(name, arguments) for name, arguments in KINDS_OF_CONTENT]
        results += [
            await session.read_resource("demo://resource/dynamic/text/1"),
            await session.read_resource("demo://resource/dynamic/blob/2"),
            await session.get_prompt("simple-prompt"),
            await session.get_prompt("args-prompt", {"city": "Oslo"}),
            await session.get_prompt("resource-prompt", {"resourceType": "Blob", "resourceId": "1"}),
        ]
        return results

    async with running(recorder.url) as session:
        live = await ask(session)
        recorder.clear()
    async with running(recorder.url) as session:
        replayed = await ask(session)
    assert recorder.exchanges == []
    assert replayed == live
    assert [type(result) for result in replayed] == [type(result) for result in live]
    assert [result.model_dump() for result in replayed] == [result.model_dump() for result in live]
    blocks = {type(block).__name__ for result in replayed[: len(KINDS_OF_CONTENT)] for block in result.content}
    assert blocks == {"TextContent", "ImageContent", "ResourceLink", "EmbeddedResource"}
    assert replayed[1].structured_content


@pytest.mark.parametrize("peer", [PLAIN, ("typescript",), MODERN], ids=" ".join)
async def test_a_failure_is_the_same_again_in_the_same_attempt_and_tried_again_in_the_next(
    recorded_peer, running, peer
):
    recorder = recorded_peer(*peer)

    async def fail(session):
        errors = []
        for call in (
            partial(session.call_tool, "fail"),
            partial(session.read_resource, "note://nowhere"),
            partial(session.get_prompt, "no_such_prompt"),
        ):
            with pytest.raises((ToolError, MCPError)) as caught:
                await call()
            errors.append((type(caught.value), str(caught.value), caught.value.args))
        return errors

    async with running(recorder.url) as session:
        live = await fail(session)
    assert {kind for kind, *_ in live} == {ToolError, MCPError}
    recorder.clear()
    async with running(recorder.url) as session:
        assert await fail(session) == live
    assert recorder.exchanges == []
    async with running(recorder.url, attempt=1) as session:
        assert await fail(session) == live
    assert recorder.methods() == ["POST tools/call", "POST resources/read", "POST prompts/get"]


async def test_a_retry_keeps_what_came_before_the_failure_and_forgets_what_came_after(recorded_peer, running, client):
    recorder = recorded_peer(*PLAIN)
    async with running(recorder.url) as session:
        await add(session, 1, 1)
        with pytest.raises(ToolError):
            await session.call_tool("fail")
        await add(session, 2, 2)
    recorder.clear()
    async with running(recorder.url, attempt=1) as session:
        await add(session, 1, 1)
        with pytest.raises(ToolError):
            await session.call_tool("fail")
        assert not client.hexists(KEY, "call:2")
        await add(session, 3, 3)
    assert calls_in(recorder) == ["fail", "add"]


async def test_a_call_that_was_not_answered_in_time_is_the_same_error_again(recorded_peer, running):
    recorder = recorded_peer(*PLAIN)

    async def wait(session):
        with pytest.raises(TransportError, match="did not answer") as caught:
            await session.call_tool(*slow(PLAIN, 100, 0.1), timeout=0.3)
        return str(caught.value), caught.value.args

    async with running(recorder.url) as session:
        live = await wait(session)
    recorder.clear()
    async with running(recorder.url) as session:
        assert await wait(session) == live
    assert recorder.exchanges == []
    async with running(recorder.url, attempt=1) as session:
        with pytest.raises(CallInterruptedError):
            await wait(session)
    assert calls_in(recorder) == [], "it may have run"


@pytest.mark.parametrize(("first", "then"), [(False, False), (False, True), (True, False), (True, True)])
async def test_a_failure_is_raised_or_returned_as_the_run_asks(recorded_peer, running, first, then):
    recorder = recorded_peer(*PLAIN)

    async def fail(session, raise_on_error):
        try:
            return await session.call_tool("fail", raise_on_error=raise_on_error)
        except ToolError as exc:
            return str(exc)

    outcomes = []
    for raise_on_error in (first, then):
        async with running(recorder.url) as session:
            outcomes.append(await fail(session, raise_on_error))
    assert calls_in(recorder) == ["fail"]
    for outcome, raise_on_error in zip(outcomes, (first, then), strict=True):
        if raise_on_error:
            assert "it failed" in outcome
        else:
            assert outcome.is_error
            assert "it failed" in text_of(outcome)


# The call that was under way

#: How servers refuse an event ID, as JSON-RPC.
NO_SUCH_EVENT = b'{"jsonrpc": "2.0", "id": null, "error": {"code": -32602, "message": "No such event"}}'


async def break_off(recorder, session, call, *, token=True):
    """Have *call* break off under way, as if the run had ended; with a *token*, or before the server gave one."""
    if token:
        recorder.cut(rpc_method="tools/call", after_events=1)
        recorder.answer(http_method="GET", status=405)
    else:
        recorder.drop()
    with pytest.raises(TransportError) as caught:
        await call(session)
    assert caught.value.sent


@pytest.mark.parametrize("peer", [STORE, ("typescript", "--event-store"), EVERYTHING], ids=" ".join)
async def test_a_call_that_was_under_way_is_continued_and_runs_once(recorded_peer, running, peer):
    recorder = recorded_peer(*peer)
    reports = []

    async def work(session):
        name, arguments = slow(peer, 4, 0.3)
        return await session.call_tool(name, arguments, on_progress=lambda *report: reports.append(report[:2]))

    async with running(recorder.url) as session:
        await break_off(recorder, session, work)
    recorder.clear()
    reports.clear()
    async with running(recorder.url) as session:
        result = await work(session)
        assert reports[-1] == (4, 4)
        assert recorder.methods()[0] == "GET"
        recorder.clear()
    async with running(recorder.url) as session:
        assert await work(session) == result
    assert recorder.exchanges == []


async def test_a_call_whose_tool_has_finished_meanwhile_is_continued_too(recorded_peer, running):
    recorder = recorded_peer(*STORE)
    work = partial(add, a=1, b=2)
    async with running(recorder.url) as session:
        await break_off(recorder, session, work)
    recorder.clear()
    for _ in range(2):
        async with running(recorder.url) as session:
            assert await work(session) == 3
    assert calls_in(recorder) == []
    assert recorder.methods().count("GET") == 1


async def test_a_call_that_breaks_off_again_while_it_is_continued_can_still_be_continued(recorded_peer, running):
    recorder = recorded_peer(*STORE)
    work = partial(add, a=1, b=2)
    async with running(recorder.url) as session:
        await break_off(recorder, session, work)
    recorder.answer(http_method="GET", status=200, content_type="text/event-stream", body=b"data: no JSON-RPC\n\n")
    async with running(recorder.url) as session:
        with pytest.raises(TransportError):
            await work(session)
    async with running(recorder.url, attempt=1) as session:
        assert await work(session) == 3
    assert calls_in(recorder) == ["add"]


async def test_a_run_does_not_end_before_the_last_token_is_noted(recorded_peer, running, valkey, client):
    recorder = recorded_peer(*STORE)
    store = Reachable(valkey)
    work = partial(add, a=1, b=2)
    async with running(recorder.url, store=store) as session:
        store.may_note_tokens.clear()
        await break_off(recorder, session, work)
        with anyio.move_on_after(0.3) as waiting:
            await session._journal.end(is_done=False)
        store.may_note_tokens.set()
        assert waiting.cancelled_caught
    assert client.hexists(KEY, "token:0")
    async with running(recorder.url, attempt=1) as session:
        assert await work(session) == 3
    assert calls_in(recorder) == ["add"]


@pytest.mark.parametrize("peer", [PLAIN, ("typescript",), MODERN, ("python", "--json")], ids=" ".join)
async def test_a_call_that_cannot_be_continued_is_an_error_and_not_sent(recorded_peer, running, peer):
    recorder = recorded_peer(*peer)
    async with running(recorder.url) as session:
        await add(session, 0, 0)
        await break_off(recorder, session, partial(add, a=1, b=2), token=False)
    recorder.clear()
    for attempt in (0, 1):
        async with running(recorder.url, attempt) as session:
            assert await add(session, 0, 0) == 0
            with pytest.raises(CallInterruptedError, match="tool 'add' was under way") as caught:
                await add(session, 1, 2)
        assert caught.value.tool == "add"
        assert "may or may not have run" in str(caught.value)
        assert "call-again" in str(caught.value)
    assert calls_in(recorder) == []


@pytest.mark.parametrize("tool", ["slow_look", "slow_put"])
async def test_a_tool_that_may_run_twice_by_its_own_word_is_called_again(recorded_peer, running, tool):
    recorder = recorded_peer(*PLAIN)

    async def work(session):
        return text_of(await session.call_tool(tool, {"steps": 1, "seconds": 0.01}))

    async with running(recorder.url) as session:
        await session.open()
        await break_off(recorder, session, work, token=False)
    for _ in range(2):
        async with running(recorder.url) as session:
            assert await work(session) == "done"
    assert calls_in(recorder) == [tool, tool]


@pytest.mark.parametrize("tool", ["slow", "slow_put"])
async def test_a_call_that_cannot_be_made_again_since_its_session_is_lost_may_have_run(recorded_peer, running, tool):
    recorder = recorded_peer(*PLAIN)
    work = (tool, {"steps": 1, "seconds": 0.01})
    async with running(recorder.url) as session:
        await session.open()
        session_id = session.session_id
        await break_off(recorder, session, lambda session: session.call_tool(*work), token=False)
    await delete_behind_its_back(recorder, session_id)
    async with running(recorder.url) as session:
        with pytest.raises(CallInterruptedError):
            await session.call_tool(*work)
    assert calls_in(recorder) == []


#: Answers to a GET by which a server refuses to continue a response, while the session lives.
REFUSALS = [400, 405, 410]


@pytest.mark.parametrize("status", REFUSALS)
async def test_a_call_whose_token_is_refused_is_an_error_and_not_sent(recorded_peer, running, status):
    recorder = recorded_peer(*STORE)
    work = partial(add, a=1, b=2)
    async with running(recorder.url) as session:
        await add(session, 0, 0)
        await break_off(recorder, session, work)
    recorder.clear()
    recorder.answer(http_method="GET", status=status, body=NO_SUCH_EVENT)
    async with running(recorder.url) as session:
        await add(session, 0, 0)
        with pytest.raises(CallInterruptedError, match="tool 'add' was under way"):
            await work(session)
    assert (calls_in(recorder), recorder.methods().count("GET")) == ([], 1)


@pytest.mark.parametrize("status", REFUSALS)
@pytest.mark.parametrize("tool", ["slow_look", "slow_put"])
async def test_a_call_whose_token_is_refused_is_made_again_where_its_tool_says_that_it_may(
    recorded_peer, running, tool, status
):
    recorder = recorded_peer(*STORE)

    async def work(session):
        return text_of(await session.call_tool(tool, {"steps": 1, "seconds": 0.01}))

    async with running(recorder.url) as session:
        await break_off(recorder, session, work)
    recorder.clear()
    recorder.answer(http_method="GET", status=status, body=NO_SUCH_EVENT)
    for _ in range(2):
        async with running(recorder.url) as session:
            assert await work(session) == "done"
    assert calls_in(recorder) == [tool]


async def test_a_call_whose_token_is_refused_is_made_again_where_the_task_says_so(recorded_peer, running):
    recorder = recorded_peer(*STORE)
    work = partial(add, a=1, b=2)
    async with running(recorder.url) as session:
        await break_off(recorder, session, work)
    recorder.answer(http_method="GET", status=405)
    for _ in range(2):
        async with running(recorder.url, calls_again=True) as session:
            assert await work(session) == 3
    assert calls_in(recorder) == ["add", "add"]


async def test_a_token_that_nobody_knows_any_more_is_refused_too_where_there_is_no_session_to_be_lost(
    recorded_peer, running, client
):
    recorder = recorded_peer("python", "--stateless")
    work = partial(add, a=1, b=2)
    async with running(recorder.url) as session:
        await session.open()
        await break_off(recorder, session, work, token=False)
    client.hset(KEY, "token:0", write_token("7", "another"))
    recorder.clear()
    recorder.answer(http_method="GET", status=404)
    async with running(recorder.url) as session:
        with pytest.raises(CallInterruptedError):
            await work(session)
    assert (calls_in(recorder), recorder.methods().count("GET")) == ([], 1)


async def test_what_only_reads_is_asked_again(recorded_peer, running):
    recorder = recorded_peer(*PLAIN)
    asks = [
        lambda session: session.read_resource("note://hello"),
        lambda session: session.get_prompt("greet", {"name": "Ada"}),
    ]
    async with running(recorder.url) as session:
        await session.open()
    for number, ask in enumerate(asks):
        async with running(recorder.url) as session:
            if number:
                await asks[0](session)
            await break_off(recorder, session, ask, token=False)
        async with running(recorder.url) as session:
            for earlier in asks[:number]:
                await earlier(session)
            await ask(session)
    assert recorder.methods()[2:] == ["POST resources/read"] * 2 + ["POST prompts/get"] * 2


async def test_any_tool_is_called_again_where_the_task_says_so(recorded_peer, running):
    recorder = recorded_peer(*PLAIN)
    work = partial(add, a=1, b=2)
    async with running(recorder.url) as session:
        await session.open()
        await break_off(recorder, session, work, token=False)
    async with running(recorder.url, calls_again=True) as session:
        assert await work(session) == 3
    assert calls_in(recorder) == ["add", "add"]


async def test_a_call_for_which_no_session_was_opened_yet_was_not_sent_and_is_made(recorded_peer, running):
    recorder = recorded_peer(*PLAIN)
    recorder.drop(rpc_method="initialize")
    async with running(recorder.url) as session:
        with pytest.raises(TransportError):
            await add(session, 1, 2)
    async with running(recorder.url) as session:
        assert await add(session, 1, 2) == 3
    assert calls_in(recorder) == ["add"]


@pytest.fixture
def nowhere():
    """The URL of a server that is down."""
    return f"http://127.0.0.1:{free_port()}/mcp"


@pytest.mark.parametrize("is_open", [True, False])
async def test_a_call_that_was_not_sent_is_forgotten_unless_another_follows(
    recorded_peer, running, client, nowhere, is_open
):
    if is_open:
        async with running(recorded_peer(*PLAIN).url) as session:
            await session.open()
    async with running(nowhere) as session:
        with pytest.raises(TransportError) as caught:
            await add(session, 1, 2)
        assert not caught.value.sent
        assert not client.hexists(KEY, "call:0")
        with pytest.raises(TransportError):
            await session.read_resource("note://hello")
    assert client.hexists(KEY, "session:server") == is_open
    noted = [name for name in client.hkeys(KEY) if name.startswith(("call:", "end:"))]
    assert sorted(noted) == (["call:0", "end:0"] if is_open else [])


@pytest.mark.parametrize("calls_again", [False, True])
async def test_a_call_that_may_have_run_is_not_forgotten_when_the_server_is_away(
    recorded_peer, running, client, nowhere, calls_again
):
    recorder = recorded_peer(*PLAIN)
    async with running(recorder.url) as session:
        await session.open()
        await break_off(recorder, session, partial(add, a=1, b=2), token=False)
    async with running(nowhere, calls_again=calls_again) as session:
        with pytest.raises(TransportError) as caught:
            await add(session, 1, 2)
        assert not caught.value.sent
    assert client.hexists(KEY, "call:0"), "it may have run before"


# A call that broke off, where the task went on


async def caught(call):
    """The error of a call, as far as it can be compared; the task goes on."""
    with pytest.raises((TransportError, SessionLostError)) as error:
        await call
    return type(error.value), str(error.value), error.value.args


@pytest.mark.parametrize("token", [True, False])
async def test_a_call_that_broke_off_is_the_same_error_again_where_the_task_went_on(recorded_peer, running, token):
    recorder = recorded_peer(*STORE)

    async def work(session):
        await add(session, 0, 0)
        failure = await caught(add(session, 1, 2))
        return failure, text_of(await session.call_tool("echo", {"text": "instead"}))

    async with running(recorder.url) as session:
        await add(session, 0, 0)
        if token:
            recorder.cut(rpc_method="tools/call", after_events=1)
            recorder.answer(http_method="GET", status=405)
        else:
            recorder.drop(rpc_method="tools/call")
        live = await caught(add(session, 1, 2)), text_of(await session.call_tool("echo", {"text": "instead"}))
    recorder.clear()
    for _ in range(2):
        async with running(recorder.url) as session:
            assert await work(session) == live
    assert recorder.exchanges == []
    async with running(recorder.url) as session:
        await work(session)
        assert await add(session, 3, 4) == 7
    assert calls_in(recorder) == ["add"]


async def test_a_call_that_broke_off_last_is_not_yet_a_failure(recorded_peer, running, client):
    recorder = recorded_peer(*STORE)
    async with running(recorder.url) as session:
        await break_off(recorder, session, partial(add, a=1, b=2))
        assert not client.hexists(KEY, "end:0"), "it can be continued"
        await session.call_tool("echo", {"text": "instead"})
        assert client.hexists(KEY, "end:0"), "the task has gone on without it"


async def test_its_failure_and_the_next_call_take_one_round_trip(recorded_peer, running, valkey):
    recorder, store = recorded_peer(*PLAIN), Reachable(valkey)
    async with running(recorder.url, store=store) as session:
        await session.open()
        await break_off(recorder, session, partial(add, a=1, b=2), token=False)
        before = store.trips
        await session.call_tool("echo", {"text": "instead"})
        assert store.trips - before == 2


async def test_a_lost_session_is_lost_again_where_the_task_went_on_in_another(recorded_peer, running):
    recorder = recorded_peer(*PLAIN)

    async def work(session, before_loss=None):
        await add(session, 1, 1)
        if before_loss is not None:
            await before_loss(session)
        failure = await caught(session.call_tool("echo", {"text": "lost"}))
        await session.open()
        return failure, text_of(await session.call_tool("echo", {"text": "anew"}))

    async with running(recorder.url) as session:
        live = await work(session, lambda session: delete_behind_its_back(recorder, session.session_id))
        second = session.session_id
    assert live[0][0] is SessionLostError
    recorder.clear()
    async with running(recorder.url) as session:
        assert await work(session) == live
        assert recorder.exchanges == []
        assert await add(session, 3, 4) == 7
    assert {exchange.session_id for exchange in recorder.exchanges if is_call(exchange)} == {second}
    assert calls_in(recorder) == ["add"]


async def test_a_lost_session_that_ended_the_run_is_not_a_second_execution(recorded_peer, running):
    recorder = recorded_peer(*PLAIN)
    async with running(recorder.url) as session:
        await add(session, 1, 1)
        await delete_behind_its_back(recorder, session.session_id)
        with pytest.raises(SessionLostError):
            await session.call_tool("echo", {"text": "lost"})
    recorder.clear()
    async with running(recorder.url, attempt=1) as session:
        await add(session, 1, 1)
        with pytest.raises(CallInterruptedError, match="An earlier run of the task ended while tool 'echo'"):
            await session.call_tool("echo", {"text": "lost"})
    assert calls_in(recorder) == []


async def test_a_later_attempt_does_not_silently_make_a_call_again_that_broke_off(recorded_peer, running):
    recorder = recorded_peer(*PLAIN)
    async with running(recorder.url) as session:
        await session.open()
        await break_off(recorder, session, partial(add, a=1, b=2), token=False)
        await session.call_tool("echo", {"text": "instead"})
    async with running(recorder.url, attempt=1) as session:
        with pytest.raises(CallInterruptedError):
            await add(session, 1, 2)
    assert calls_in(recorder) == ["add", "echo"]


async def test_a_later_attempt_continues_a_call_that_broke_off_and_forgets_what_came_after(
    recorded_peer, running, client
):
    recorder = recorded_peer(*STORE)
    async with running(recorder.url) as session:
        await break_off(recorder, session, partial(add, a=1, b=2))
        await session.call_tool("echo", {"text": "instead"})
    for _ in range(2):
        async with running(recorder.url, attempt=1) as session:
            assert await add(session, 1, 2) == 3
            assert not client.hexists(KEY, "call:1")
    assert calls_in(recorder) == ["add", "echo"]


async def test_a_failure_that_a_later_attempt_came_to_know_is_the_same_again_in_that_attempt(recorded_peer, running):
    recorder = recorded_peer(*STORE)
    async with running(recorder.url) as session:
        await break_off(recorder, session, lambda session: session.call_tool("fail"))
    for _ in range(2):
        async with running(recorder.url, attempt=1) as session:
            with pytest.raises(ToolError):
                await session.call_tool("fail")
            assert await add(session, 1, 2) == 3
    assert calls_in(recorder) == ["fail", "add"]


@pytest.mark.usefixtures("quick_outage")
async def test_how_a_call_broke_off_is_not_forgotten_where_the_store_was_away(
    recorded_peer, running, valkey, monkeypatch
):
    monkeypatch.setattr(journal_module, "PATIENCE_SECONDS", 0.5)
    recorder = recorded_peer(*PLAIN)
    store = Reachable(valkey)
    async with running(recorder.url, store=store) as session:
        await session.open()
        recorder.drop(rpc_method="tools/call")
        live = await caught(add(session, 1, 2))
        store.is_away = True
        with pytest.raises(StoreError):
            await add(session, 3, 4)
        store.is_away = False
        assert await add(session, 3, 4) == 7
    recorder.clear()
    async with running(recorder.url) as session:
        assert await caught(add(session, 1, 2)) == live
        assert await add(session, 3, 4) == 7
    assert recorder.exchanges == []


# A call that was cancelled


async def cancel_at_server(session, tool, *, by):
    """Have a call cancelled at the server, after it gave a token."""
    timeout = 0.3 if by == "timeout" else None
    return await caught(session.call_tool(tool, {"steps": 3, "seconds": 5}, timeout=timeout))


def limits(by):
    """The settings of a server by which *by* cancels a call."""
    return {"read_timeout_seconds": 0.5} if by == "read timeout" else {}


@pytest.mark.parametrize("peer", [PLAIN, STORE, ("typescript",), ("typescript", "--event-store")], ids=" ".join)
async def test_a_call_that_is_not_answered_in_time_is_cancelled_at_the_server_and_no_other_is(
    recorded_peer, running, peer
):
    recorder = recorded_peer(*peer)
    async with running(recorder.url) as session:
        await session.open()
        interrupted = asyncio.create_task(session.call_tool(*slow(peer, 100, 0.1)))
        await seen(recorder, is_call)
        interrupted.cancel()
        tool, arguments = slow(peer, 101, 0.1)
        late = caught(session.call_tool(tool, arguments, timeout=0.4))
        error, other = await asyncio.gather(late, session.call_tool(*slow(peer, 8, 0.1)))
        assert error[1] == "Server 'server' did not answer to tool 'slow' within 0.4 s; it was cancelled"
        assert text_of(other) == "done"
        calls = filter(is_call, recorder.exchanges)
        (cancelled,) = (each for each in calls if each.rpc_params["arguments"] == arguments)
        cancellations = [each.rpc_params["requestId"] for each in recorder.exchanges if is_cancellation(each)]
        assert cancellations == [cancelled.rpc_id]
        await eventually(lambda: cancelled.ended, what="the end of the response")


async def test_a_continued_call_that_is_not_answered_in_time_is_cancelled_by_the_id_it_was_sent_with(
    recorded_peer, running
):
    recorder = recorded_peer(*STORE)
    tool = slow(STORE, 100, 0.1)
    async with running(recorder.url) as session:
        await break_off(recorder, session, lambda session: session.call_tool(*tool))
    async with running(recorder.url) as session:
        await caught(session.call_tool(*tool, timeout=0.4))
    (call,) = filter(is_call, recorder.exchanges)
    (cancellation,) = filter(is_cancellation, recorder.exchanges)
    assert cancellation.rpc_params["requestId"] == call.rpc_id


@pytest.mark.parametrize("by", ["timeout", "read timeout"])
async def test_a_call_that_was_cancelled_is_the_same_error_again_where_the_task_went_on(recorded_peer, running, by):
    recorder = recorded_peer(*STORE)

    async def work(session):
        return await cancel_at_server(session, "slow", by=by), await add(session, 1, 2)

    async with running(recorder.url, **limits(by)) as session:
        live = await work(session)
    recorder.clear()
    async with running(recorder.url, **limits(by)) as session:
        assert await work(session) == live
    assert recorder.exchanges == []


@pytest.mark.parametrize("by", ["timeout", "read timeout"])
@pytest.mark.parametrize("goes_on", [True, False])
async def test_a_call_that_was_cancelled_is_not_continued_by_a_later_attempt(
    recorded_peer, running, client, by, goes_on
):
    recorder = recorded_peer(*STORE)
    async with running(recorder.url, **limits(by)) as session:
        await cancel_at_server(session, "slow", by=by)
        if goes_on:
            await add(session, 1, 2)
    assert client.hexists(KEY, "token:0")
    recorder.clear()
    async with running(recorder.url, attempt=1, **limits(by)) as session:
        with pytest.raises(CallInterruptedError):
            await session.call_tool("slow", {"steps": 3, "seconds": 5})
    assert (calls_in(recorder), recorder.methods().count("GET")) == ([], 0)


@pytest.mark.parametrize("by", ["timeout", "read timeout"])
async def test_a_call_that_was_cancelled_is_made_again_by_a_later_attempt_where_its_tool_says_that_it_may(
    recorded_peer, running, by
):
    recorder = recorded_peer(*STORE)
    async with running(recorder.url, **limits(by)) as session:
        await cancel_at_server(session, "slow_put", by=by)
    recorder.clear()
    async with running(recorder.url, attempt=1, **limits(by)) as session, anyio.create_task_group() as tasks:
        tasks.start_soon(session.call_tool, "slow_put", {"steps": 3, "seconds": 5})
        await seen(recorder, is_call)
        tasks.cancel_scope.cancel()
    assert recorder.methods().count("GET") == 0


# Sessions that the task itself opens and ends


async def test_a_session_that_the_task_opened_is_resumed_without_a_word(recorded_peer, running):
    recorder = recorded_peer(*PLAIN)

    async def work(session):
        await session.open()
        return await add(session, 1, 2), session.handle

    async with running(recorder.url) as session:
        live = await work(session)
    recorder.clear()
    async with running(recorder.url) as session:
        assert await work(session) == live
        assert recorder.exchanges == []
        assert await add(session, 3, 4) == 7
    assert recorder.methods()[-1] == "POST tools/call"
    assert "POST initialize" not in recorder.methods()


async def close_and_open(session):
    await add(session, 1, 1)
    await session.close()
    await session.open()
    return await add(session, 2, 2), session.handle


async def test_a_session_that_the_task_closed_is_closed_once(recorded_peer, running):
    recorder = recorded_peer(*PLAIN)
    async with running(recorder.url) as session:
        live = await close_and_open(session)
        first, second = recorder.session_ids
        assert session.session_id == second
    recorder.clear()
    for number in range(2):
        async with running(recorder.url) as session:
            assert await close_and_open(session) == live
            assert recorder.exchanges == [] or number
            assert await add(session, 3, 3) == 6
    assert first != second
    assert {exchange.session_id for exchange in recorder.exchanges} == {second}
    assert calls_in(recorder) == ["add"]


async def test_a_session_that_the_task_closed_is_not_ended_again_where_it_opens_no_other(recorded_peer, running):
    recorder = recorded_peer(*PLAIN)
    async with running(recorder.url) as session:
        await add(session, 1, 1)
        await session.close()
    recorder.clear()
    async with running(recorder.url) as session:
        assert await add(session, 1, 1) == 2
        await session.close()
        assert session.handle is None
    assert recorder.exchanges == []


async def test_a_session_that_the_task_detached_gives_the_same_handle_again(recorded_peer, running):
    recorder = recorded_peer(*PLAIN)

    async def work(session):
        await add(session, 1, 1)
        return await session.detach()

    async with running(recorder.url) as session:
        handle = await work(session)
    recorder.clear()
    async with running(recorder.url) as session:
        assert await work(session) == handle
        assert session.handle is None, "it was disowned"
        assert recorder.exchanges == []
        await session.open()
        assert session.session_id not in {None, handle.session_id}
        other = session.handle
    recorder.clear()
    async with running(recorder.url) as session:
        assert await work(session) == handle
        await session.open()
        assert session.handle == other
    assert recorder.exchanges == []


async def test_a_call_in_the_second_session_of_a_task_is_continued_there_and_runs_once(recorded_peer, running):
    recorder = recorded_peer(*STORE)

    async def work(session):
        return text_of(await session.call_tool("slow", {"steps": 3, "seconds": 0.2}))

    async with running(recorder.url) as session:
        await close_and_open(session)
        await break_off(recorder, session, work)
        second = session.session_id
    recorder.clear()
    async with running(recorder.url) as session:
        await close_and_open(session)
        assert await work(session) == "done"
    assert recorder.methods() == ["GET"]
    assert {exchange.session_id for exchange in recorder.exchanges} == {second}


async def test_a_session_that_was_to_be_closed_when_the_run_ended_is_closed_by_the_next(recorded_peer, running):
    recorder = recorded_peer(*PLAIN)
    recorder.stall(http_method="DELETE")
    async with running(recorder.url) as session, anyio.create_task_group() as tasks:
        await add(session, 1, 1)
        tasks.start_soon(session.close)
        await seen(recorder, lambda exchange: exchange.method == "DELETE")
        tasks.cancel_scope.cancel()
    recorder.clear()
    async with running(recorder.url) as session:
        await close_and_open(session)
    assert recorder.methods()[:2] == ["DELETE", "POST initialize"]
    assert calls_in(recorder) == ["add"]


@pytest.mark.parametrize("what", ["close", "open"])
async def test_what_failed_where_the_task_went_on_does_no_harm_to_its_second_session(recorded_peer, running, what):
    recorder = recorded_peer(*PLAIN)

    async def work(session):
        await add(session, 1, 1)
        for step in (session.close, session.open):
            try:
                await step()
            except TransportError:
                await session.open()
        return await add(session, 2, 2), session.handle

    async with running(recorder.url) as session:
        await session.open()
        if what == "close":
            recorder.answer(http_method="DELETE", status=500)
        else:
            recorder.answer(rpc_method="initialize", status=500)
        live = await work(session)
    recorder.clear()
    async with running(recorder.url) as session:
        assert await work(session) == live
        assert await add(session, 3, 4) == 7
        second = session.session_id
    assert {exchange.session_id for exchange in recorder.exchanges if is_call(exchange)} == {second}
    assert second not in {exchange.session_id for exchange in recorder.exchanges if exchange.method == "DELETE"}


@pytest.mark.parametrize("end", ["close", "detach"])
async def test_another_end_of_a_session_than_before_is_another_path(recorded_peer, running, end):
    recorder = recorded_peer(*PLAIN)
    async with running(recorder.url) as session:
        await add(session, 1, 1)
        await getattr(session, end)()
        await session.open()
        await add(session, 2, 2)
    recorder.clear()
    async with running(recorder.url) as session:
        await add(session, 1, 1)
        with pytest.raises(JournalMismatchError):
            await add(session, 2, 2)
    async with running(recorder.url) as session:
        await add(session, 1, 1)
        with pytest.raises(JournalMismatchError):
            await getattr(session, "detach" if end == "close" else "close")()
    assert recorder.exchanges == []


# What a server asks


async def test_a_question_is_read_with_its_call_and_cut_with_it(runs, client):
    first, second = runs(), runs()
    await first.begin()
    await first.enter("tool 'add'", "server", "tools/call", {})
    await first.end(is_done=False)
    question = {"method": "elicitation/create", "params": {"message": "Which one?"}}
    client.hset(KEY, "question:0", json.dumps(question))
    await second.begin()
    entry, was_made = await second.enter("tool 'add'", "server", "tools/call", {})
    assert (entry.question, was_made) == (question, True)
    await second.withdraw(entry, FAILURE)
    assert not {"call:0", "question:0"} & set(client.hgetall(KEY))


# Another path


@pytest.mark.parametrize(
    ("call", "now"),
    [
        (lambda session: session.call_tool("echo", {"text": "x"}), "tool 'echo'"),
        (lambda session: session.read_resource("note://hello"), "resource 'note://hello'"),
        (lambda session: session.get_prompt("greet", {"name": "Ada"}), "prompt 'greet'"),
    ],
)
async def test_another_call_than_before_is_an_error_that_shows_both(recorded_peer, running, call, now):
    recorder = recorded_peer(*PLAIN)
    async with running(recorder.url) as session:
        await add(session, 1, 1)
        await add(session, 2, 2)
    recorder.clear()
    async with running(recorder.url) as session:
        await add(session, 1, 1)
        with pytest.raises(JournalMismatchError) as caught:
            await call(session)
    assert (caught.value.number, caught.value.before, caught.value.now) == (2, "tool 'add'", now)
    assert f"Call 2 of the task was tool 'add' when it ran before, and is {now} now" in str(caught.value)
    assert recorder.exchanges == []
    async with running(recorder.url) as session:
        assert (await add(session, 1, 1), await add(session, 2, 2)) == (2, 4), "the journal is as it was"
    assert recorder.exchanges == []


async def test_other_arguments_are_another_path_and_not_shown(recorded_peer, running):
    recorder = recorded_peer(*PLAIN)
    async with running(recorder.url) as session:
        await session.call_tool("echo", {"text": "t0p-s3cret"})
    recorder.clear()
    async with running(recorder.url) as session:
        with pytest.raises(JournalMismatchError, match="with other arguments") as caught:
            await session.call_tool("echo", {"text": "an0ther-s3cret"})
    assert "s3cret" not in repr(caught.value)
    assert recorder.exchanges == []


async def test_secrets_in_the_uri_of_a_resource_are_not_noted(recorded_peer, running, client):
    recorder = recorded_peer(*PLAIN)
    async with running(recorder.url) as session:
        with pytest.raises(MCPError):
            await session.read_resource("note://me:t0p-s3cret@other?token=an0ther-s3cret")
    noted = client.hget(KEY, "call:0")
    assert "resource 'note://other'" in noted
    assert "s3cret" not in noted


async def test_the_same_call_to_another_server_is_another_path(recorded_peer, running):
    recorder = recorded_peer(*PLAIN)
    async with running(recorder.url, server="one") as session:
        await add(session, 1, 2)
    recorder.clear()
    async with running(recorder.url, server="other") as session:
        with pytest.raises(JournalMismatchError) as caught:
            await add(session, 1, 2)
    assert "other" in str(caught.value)
    assert recorder.exchanges == []


async def test_a_run_may_make_fewer_calls_than_the_one_before(recorded_peer, running):
    recorder = recorded_peer(*PLAIN)
    async with running(recorder.url) as session:
        await add(session, 1, 1)
        await add(session, 2, 2)
    async with running(recorder.url) as session:
        assert await add(session, 1, 1) == 2


# Retries


async def test_a_retry_repeats_no_finished_call(recorded_peer, running):
    recorder = recorded_peer(*PLAIN)
    for attempt in range(3):
        async with running(recorder.url, attempt) as session:
            assert await add(session, 1, 2) == 3
    assert calls_in(recorder) == ["add"]


async def test_a_journal_for_redeliveries_only_is_not_for_retries(recorded_peer, running):
    recorder = recorded_peer(*PLAIN)
    made = []
    for attempt, is_retried in [(0, False), (0, True), (1, False), (1, True), (2, True)]:
        async with running(recorder.url, attempt, keeps_over_retries=False) as session:
            assert await add(session, 1, 2) == 3
            await session._journal.end(is_done=False, is_retried=is_retried)
        made.append(len(calls_in(recorder)))
    assert made == [1, 1, 2, 2, 3]


async def test_a_journal_for_redeliveries_only_goes_on_where_a_killed_process_was_counted_as_an_attempt(
    recorded_peer, running
):
    recorder = recorded_peer(*PLAIN)
    for attempt in range(3):
        async with running(recorder.url, attempt, keeps_over_retries=False) as session:
            assert await add(session, 1, 2) == 3
    assert calls_in(recorder) == ["add"]


# Large results


async def test_a_large_result_is_compressed(recorded_peer, running, client):
    recorder = recorded_peer(*PLAIN)
    text = "".join(f"line {number} of an answer\n" for number in range(10_000))
    async with running(recorder.url) as session:
        live = await session.call_tool("echo", {"text": text})
        await session.call_tool("echo", {"text": "small"})
    assert client.hget(KEY, "end:0").startswith("z")
    assert client.hstrlen(KEY, "end:0") < len(text) / 2
    assert client.hget(KEY, "end:1").startswith("{")
    recorder.clear()
    async with running(recorder.url) as session:
        assert await session.call_tool("echo", {"text": text}) == live
        assert live.structured_content == {"result": text}
    assert recorder.exchanges == []


async def test_a_result_that_is_too_large_is_an_error_that_says_what_to_do(recorded_peer, running, client):
    recorder = recorded_peer(*PLAIN)
    noise = secrets.token_hex(50_000)
    async with running(recorder.url, max_result_bytes=10_000) as session:
        assert (await session.call_tool("echo", {"text": "x" * 50_000})).content, "compressed, it is small"
        with pytest.raises(JournalError, match="The result of tool 'echo' takes") as caught:
            await session.call_tool("echo", {"text": noise})
        assert "10000 may be kept (mcp_journal_max_result_bytes)" in str(caught.value)
        assert noise[:20] not in str(caught.value)
        assert not client.hexists(KEY, "end:1")
    recorder.clear()
    async with running(recorder.url, max_result_bytes=10_000) as session:
        await session.call_tool("echo", {"text": "x" * 50_000})
        with pytest.raises(CallInterruptedError):
            await session.call_tool("echo", {"text": noise})
    assert calls_in(recorder) == [], "it has run"


# The lease


@pytest.mark.usefixtures("quick_lease")
async def test_a_second_run_waits_as_long_as_the_first_one_lives(runs, caplog):
    caplog.set_level("INFO")
    first, second = runs(), runs()
    await first.begin()
    with anyio.move_on_after(4 * journal_module.LEASE_SECONDS) as waiting:
        await second.begin()
    assert waiting.cancelled_caught
    assert "waiting for its lease" in caplog.text
    assert not first.is_superseded
    await first.end(is_done=False)
    with anyio.fail_after(5):
        await second.begin()
    assert not second.is_done


@pytest.mark.usefixtures("quick_lease")
async def test_a_second_run_takes_over_where_the_first_one_is_out_of_touch(recorded_peer, runs, running, valkey):
    recorder = recorded_peer(*PLAIN)
    store = Reachable(valkey)
    async with running(recorder.url, store=store) as session:
        await add(session, 1, 2)
        recorder.clear()
        store.is_away = True
        with anyio.fail_after(10):
            async with running(recorder.url) as other:
                assert await add(other, 1, 2) == 3
                assert await add(other, 3, 4) == 7
        assert calls_in(recorder) == ["add"]


@pytest.mark.usefixtures("quick_lease")
@pytest.mark.parametrize("step", ["enter", "finish", "withdraw", "note_session", "renew"])
async def test_who_was_out_of_touch_for_too_long_can_write_no_more(runs, valkey, client, step):
    store = Reachable(valkey)
    first, second = runs(store=store), runs()
    await first.begin()
    entry, _ = await first.enter("tool 'add'", "server", "tools/call", {})
    store.is_away = True
    with anyio.fail_after(10):
        await second.begin()
    store.is_away = False
    stored = {**client.hgetall(KEY), "until": None}
    if step == "renew":
        await eventually(lambda: first.is_superseded, what="the loss of the lease to be noticed")
    else:
        steps = {
            "enter": lambda: first.enter("tool 'echo'", "server", "tools/call", {}),
            "finish": lambda: first.finish(entry, {"content": []}),
            "withdraw": lambda: first.withdraw(entry, FAILURE),
            "note_session": lambda: first.note_session(SessionHandle("server", "id", {"protocolVersion": "1"})),
        }
        with pytest.raises(SupersededError, match="has taken over"):
            await steps[step]()
        assert first.is_superseded
    await first.end(is_done=True)
    assert {**client.hgetall(KEY), "until": None} == stored, "nor give back what it has lost"
    assert not second.is_superseded
    await second.finish(entry, {"content": []})


@pytest.mark.usefixtures("quick_lease")
async def test_a_second_run_that_finds_the_task_done_has_nothing_to_do(runs):
    first, second = runs(), runs()
    await first.begin()
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(second.begin)
        await anyio.lowlevel.checkpoint()
        await first.end(is_done=True)
    assert second.is_done


async def test_a_lease_of_an_execution_that_is_known_to_be_dead_is_given_to_the_next_at_once(runs, valkey):
    first, second = runs(), runs()
    await first.begin()
    await first.enter("tool 'add'", "server", "tools/call", {})
    Reachable(valkey).release_journal("task", process_name(os.getpid()))
    with anyio.fail_after(5):
        await second.begin()
    assert second.is_continued


async def test_a_lease_is_not_taken_from_an_execution_that_has_followed_the_dead_one(runs, valkey):
    journal = runs()
    await journal.begin()
    Reachable(valkey).release_journal("task", process_name(os.getppid()))
    await journal.enter("tool 'add'", "server", "tools/call", {})
    assert not journal.is_superseded


async def test_a_journal_that_the_store_has_lost_is_an_error(runs, client):
    journal = runs()
    await journal.begin()
    entry, _ = await journal.enter("tool 'add'", "server", "tools/call", {})
    client.flushall()
    for step in (
        lambda: journal.enter("tool 'echo'", "server", "tools/call", {}),
        lambda: journal.finish(entry, {"content": []}),
        lambda: journal.withdraw(entry, FAILURE),
    ):
        with pytest.raises(JournalError, match="The store has lost the journal") as caught:
            await step()
        assert not isinstance(caught.value, SupersededError)
    assert not journal.is_superseded


@pytest.mark.usefixtures("quick_lease")
async def test_who_follows_on_a_journal_that_the_store_has_lost_is_noticed(runs, client, caplog):
    caplog.set_level("DEBUG", journal_module.logger.name)
    first, second = runs(), runs()
    await first.begin()
    client.flushall()
    await eventually(lambda: "A lease could not be renewed" in caplog.text, what="an attempt to renew the lease")
    await second.begin()
    await eventually(lambda: first.is_superseded, what="the loss of the lease to be noticed")
    assert not second.is_superseded


async def test_a_journal_of_another_version_is_left_alone(runs, client):
    first, second = runs(), runs()
    await first.begin()
    await first.enter("tool 'add'", "server", "tools/call", {})
    await first.end(is_done=False)
    client.hset(KEY, "v", redis_store.VERSION + 1)
    stored = client.hgetall(KEY)
    with pytest.raises(JournalError, match="another version"):
        await second.begin()
    assert client.hgetall(KEY) == stored


# The store goes away


@pytest.mark.usefixtures("quick_outage")
async def test_a_store_that_is_away_for_a_while_is_waited_for(recorded_peer, running, client):
    recorder = recorded_peer(*PLAIN)
    async with running(recorder.url) as session:
        await add(session, 0, 0)
        client.client_pause(1000)
        assert await add(session, 1, 2) == 3
    client.client_pause(1000)
    async with running(recorder.url) as session:
        assert await add(session, 0, 0) == 0
        assert await add(session, 1, 2) == 3
    assert calls_in(recorder) == ["add", "add"]


@pytest.mark.usefixtures("quick_outage")
async def test_without_the_store_no_call_is_made(recorded_peer, running, valkey, monkeypatch):
    monkeypatch.setattr(journal_module, "PATIENCE_SECONDS", 0.5)
    recorder = recorded_peer(*PLAIN)
    store = Reachable(valkey)
    async with running(recorder.url, store=store) as session:
        await add(session, 0, 0)
        store.is_away = True
        recorder.clear()
        with pytest.raises(StoreError, match="out of reach"):
            await add(session, 1, 2)
        assert recorder.exchanges == []
        store.is_away = False
        assert await add(session, 1, 2) == 3


@pytest.mark.usefixtures("quick_outage")
async def test_without_the_store_no_durable_task_begins(runs, valkey, monkeypatch):
    monkeypatch.setattr(journal_module, "PATIENCE_SECONDS", 0.5)
    store = Reachable(valkey)
    store.is_away = True
    with pytest.raises(StoreError, match="out of reach"):
        await runs(store=store).begin()


async def test_a_call_that_is_found_in_the_journal_is_told_once_and_its_arguments_are_not_checked_again(
    running, recorded_peer
):
    recorder, told = recorded_peer(*PLAIN), []
    for _ in range(2):
        async with running(recorder.url, tell=told.append) as session:
            result = await session.call_tool("add", {"a": 1, "b": 2}, check_arguments=True)
            assert result.structured_content == {"result": 3}
    assert [event.name for event in told] == ["session_opened", "call_finished"]
    assert [recorder.methods().count(f"POST tools/{what}") for what in ("call", "list")] == [1, 1]


async def test_a_call_with_wrong_arguments_was_not_made_so_the_next_run_says_the_same(running, recorded_peer):
    recorder = recorded_peer(*PLAIN)
    for _ in range(2):
        async with running(recorder.url) as session:
            with pytest.raises(ConfigurationError, match="takes no argument c"):
                await session.call_tool("add", {"a": 1, "b": 2, "c": 3}, check_arguments=True)
            # What comes after an error that the task has caught is another call than the journal would have.
            assert (await add(session, 1, 2)) == 3
    assert recorder.methods().count("POST tools/call") == 1


# Calls that are made at once


async def test_calls_that_are_made_at_once_are_known_again_in_the_order_of_their_beginnings(recorded_peer, running):
    recorder = recorded_peer(*PLAIN)
    calls = [(number, 1) for number in range(10)]
    async with running(recorder.url) as session:
        first = await asyncio.gather(*[add(session, *call) for call in calls])
    async with running(recorder.url) as session:
        again = await asyncio.gather(*[add(session, *call) for call in calls])
    assert first == again == list(range(1, 11))
    assert len(calls_in(recorder)) == 10


async def test_calls_to_two_servers_are_known_again_though_one_of_them_had_to_be_opened_first(recorded_peer, runs):
    urls = [recorded_peer("python").url, recorded_peer("python").url]
    connections, results = Connections(), []
    for _ in range(2):
        journal = runs(0)
        await journal.begin()
        late, early = (
            AsyncMCPSession(ServerSettings(name=url, url=url), connections, journal.sessions.get(url), journal=journal)
            for url in urls
        )
        results.append([await add(early, 1, 1), *await asyncio.gather(add(late, 1, 2), add(early, 1, 3))])
        await late.release()
        await early.release()
        await journal.end(is_done=False)
    await connections.aclose()
    assert results == [[2, 3, 4]] * 2


async def test_of_calls_that_are_made_at_once_those_that_have_not_finished_are_made_again(recorded_peer, running):
    recorder = recorded_peer(*PLAIN)
    async with running(recorder.url) as session, asyncio.TaskGroup() as tasks:
        waiting = tasks.create_task(session.call_tool("slow_look", {"steps": 100, "seconds": 0.1}))
        assert await tasks.create_task(add(session, 1, 2)) == 3
        waiting.cancel()
    assert calls_in(recorder) == ["slow_look", "add"]
    async with running(recorder.url) as session:
        steps = session.call_tool("slow_look", {"steps": 100, "seconds": 0.1}, timeout=0.2)
        looked, added = await asyncio.gather(steps, add(session, 1, 2), return_exceptions=True)
    assert isinstance(looked, TransportError)
    assert added == 3
    assert calls_in(recorder) == ["slow_look", "add", "slow_look"]


async def test_calls_that_cannot_be_sent_at_once_fail_and_a_retry_makes_them(recorded_peer, running, nowhere):
    recorder = recorded_peer(*PLAIN)
    calls = [(number, 1) for number in range(3)]
    async with running(recorder.url) as session:
        await session.open()
    async with running(nowhere) as session:
        outcomes = await asyncio.gather(*[add(session, *call) for call in calls], return_exceptions=True)
    assert [outcome.sent for outcome in outcomes] == [False, False, False]
    async with running(recorder.url, attempt=1) as session:
        assert await asyncio.gather(*[add(session, *call) for call in calls]) == [1, 2, 3]
    assert len(calls_in(recorder)) == 3
