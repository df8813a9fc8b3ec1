"""What servers ask and tell a task meanwhile: answered by its methods, in its thread, or declined at once."""

import asyncio
import json
import logging
import threading
from contextlib import asynccontextmanager
from pathlib import Path

import anyio
import anyio.lowlevel
import pytest
from calls import echo, eventually, is_call, is_cancellation, seen, text_of
from celery import Celery
from celery.exceptions import SoftTimeLimitExceeded
from mcp import Client, MCPError
from mcp.shared.message import ClientMessageMetadata
from mcp_types import (
    CONNECTION_CLOSED,
    HEADER_MISMATCH,
    CallToolRequest,
    CallToolRequestParams,
    CallToolResult,
    CreateMessageResult,
    ElicitResult,
    ListRootsResult,
    LoggingMessageNotificationParams,
    Root,
    TextContent,
)
from processes import wait_until

from mcp_celery import ConfigurationError, MCPTask, TransportError
from mcp_celery.asked import Asked, elicited, listed, sampled
from mcp_celery.connections import Connections
from mcp_celery.journal import Journal
from mcp_celery.portal import Caller, Callers, close_portal
from mcp_celery.redis_store import RedisStore
from mcp_celery.session import AsyncMCPSession
from mcp_celery.settings import ServerSettings, StoreSettings
from mcp_celery.transport import resumable_http

#: Servers of ours, one of each implementation.
OURS = ["python", "python1", "typescript"]
MODERN = ("python", "--modern-only")


class Answering(MCPTask):
    """Answers all, and notes in which thread."""

    mcp_server = "peer"

    def on_sampling(self, params):
        self.request.kwargs["threads"].append(threading.current_thread())
        return f"on {params.messages[0].content.text}"

    def on_elicitation(self, params):
        self.request.kwargs["threads"].append(threading.current_thread())
        return {"answer": f"to {params.message}"}

    def on_list_roots(self):
        self.request.kwargs["threads"].append(threading.current_thread())
        return ["/srv/project", "file:///srv/other"]


class AnsweringOnTheLoop(MCPTask):
    mcp_server = "peer"

    async def on_sampling(self, params):
        await anyio.lowlevel.checkpoint()
        return f"{threading.current_thread().name} on {params.messages[0].content.text}"

    async def on_elicitation(self, params):
        await anyio.lowlevel.checkpoint()
        return {"answer": threading.current_thread().name}


class Silent(MCPTask):
    mcp_server = "peer"


@pytest.fixture
def run():
    """`run(url, base, function, **kwargs)` executes *function* as a task of class *base*, on the server at *url*."""
    apps = []

    def run(url, base, function, conf=None, **kwargs):
        app = Celery("asked", broker="memory://", set_as_current=False)
        apps.append(app)
        app.conf.update({"mcp_servers": {"peer": {"url": url}}, **(conf or {})})
        return app.task(function, base=base, bind=True, shared=False, name="asked.task")(**kwargs)

    yield run
    for app in apps:
        app.close()
    close_portal()


@asynccontextmanager
async def a_run(url, valkey, task, connections):
    """The session of one run of a durable task."""
    journal = Journal(RedisStore(StoreSettings(url=valkey)), "task", attempt=0, max_result_bytes=10_000)
    await journal.begin()
    asked = Asked(task, Callers(), logging.getLogger("asked.task"))
    settings, handle = ServerSettings(name="server", url=url), journal.sessions.get("server")
    session = AsyncMCPSession(settings, connections, handle, journal=journal, asked=asked)
    try:
        yield session
    finally:
        await session.release()
        await journal.end(is_done=False)


def answers(recorder):
    """What was sent in answer to requests of the server."""
    return [exchange for exchange in recorder.exchanges if exchange.rpc_id is not None and exchange.rpc_method is None]


def capabilities(recorder):
    return next(exchange for exchange in recorder.exchanges if exchange.rpc_method == "initialize").rpc_params[
        "capabilities"
    ]


def ask_all(self, threads):
    return [
        text_of(self.mcp.call_tool("ask_model", {"prompt": "whales"})),
        text_of(self.mcp.call_tool("ask_user", {"question": "why"})),
        text_of(self.mcp.call_tool("ask_roots")),
    ]


@pytest.mark.parametrize("kind", OURS)
def test_the_methods_of_a_task_answer_its_server_in_the_thread_of_the_task(recorded_peer, run, kind):
    recorder, threads = recorded_peer(kind), []
    assert run(recorder.url, Answering, ask_all, threads=threads) == [
        "unknown: on whales",
        "accept: to why",
        "file:///srv/project file:///srv/other",
    ]
    assert threads == [threading.current_thread()] * 3
    assert set(capabilities(recorder)) == {"sampling", "elicitation", "roots"}
    assert [exchange.status for exchange in answers(recorder)] == [202] * 3
    assert {exchange.session_id for exchange in answers(recorder)} == set(recorder.session_ids)


@pytest.mark.parametrize("kind", OURS)
def test_what_a_task_has_no_method_for_is_not_advertised_and_declined_at_once(recorded_peer, run, kind):
    recorder = recorded_peer(kind)
    sampling, elicitation, roots = run(recorder.url, Silent, ask_all, threads=[])
    assert capabilities(recorder) == {}
    if kind != "typescript":  # whose SDK does not ask where nothing was advertised
        assert [exchange.status for exchange in answers(recorder)] == [202] * 3
        assert "User rejected sampling request" in sampling
        assert elicitation == "decline"
        assert "Roots not supported" in roots


@pytest.mark.anyio
async def test_a_session_of_no_task_declines_all(recorded_peer, new_session):
    recorder = recorded_peer("python")
    session = new_session(recorder.url)
    assert "User rejected" in text_of(await session.call_tool("ask_model", {"prompt": "x"}))
    assert text_of(await session.call_tool("ask_user", {"question": "x"})) == "decline"
    assert "not supported" in text_of(await session.call_tool("ask_roots"))
    assert capabilities(recorder) == {}
    await session.close()


def test_coroutine_functions_answer_on_the_event_loop(recorded_peer, run):
    recorder = recorded_peer("python")

    def ask(self):
        model = text_of(self.mcp.call_tool("ask_model", {"prompt": "whales"}))
        return model, text_of(self.mcp.call_tool("ask_user", {"question": "why"}))

    model, user = run(recorder.url, AnsweringOnTheLoop, ask)
    assert model.startswith("unknown: mcp_celery")
    assert user.startswith("accept: mcp_celery")
    assert set(capabilities(recorder)) == {"sampling", "elicitation"}


def test_a_coroutine_function_of_a_plain_task_knows_its_request_and_may_use_the_session(recorded_peer, run):
    class Looking(Silent):
        async def on_elicitation(self, params):
            found = await self.amcp.call_tool("echo", {"text": self.request.kwargs["text"]})
            return {"answer": text_of(found)}

    def ask(self, text):
        return text_of(self.mcp.call_tool("ask_user", {"question": "why"}))

    assert run(recorded_peer("python").url, Looking, ask, text="known") == "accept: known"


@pytest.mark.parametrize("base", [Answering, AnsweringOnTheLoop])
def test_tasks_with_a_coroutine_function_are_asked_as_others_are(recorded_peer, run, base):
    async def ask(self, threads):
        model = await self.amcp.call_tool("ask_model", {"prompt": "whales"})
        return text_of(model), text_of(await self.amcp.call_tool("ask_user", {"question": "why"}))

    threads = []
    model, user = run(recorded_peer("python").url, base, ask, threads=threads)
    assert model.endswith("on whales")
    assert user.startswith("accept: ")
    assert set(threads) == ({threading.current_thread()} if base is Answering else set())


def test_server_everything_offers_its_questions_to_a_task_that_answers(recorded_peer, run):
    recorder = recorded_peer("everything")

    def ask(self, threads):
        sampled = self.mcp.call_tool("trigger-sampling-request", {"prompt": "whales", "maxTokens": 10})
        return text_of(sampled), text_of(self.mcp.call_tool("trigger-elicitation-request"))

    sampled, elicited = run(recorder.url, Answering, ask, threads=[])
    assert "on Resource trigger-sampling-request context: whales" in sampled
    assert "provided the requested information" in elicited
    assert [exchange.status for exchange in answers(recorder)] == [202, 202]


def test_a_later_step_answers_by_its_own_class_and_declines_what_that_does_not_define(recorded_peer, run):
    recorder = recorded_peer("python")

    def keep(self):
        self.mcp.open()
        return self.mcp.detach()

    def ask(self, threads=None, mcp_session=None):
        texts = ask_all(self, threads)
        self.mcp.detach()
        return texts

    handle = run(recorder.url, Answering, keep)
    threads = []
    assert run(recorder.url, Answering, ask, threads=threads, mcp_session=handle)[1] == "accept: to why"
    sampling, elicitation, roots = run(recorder.url, Silent, ask, mcp_session=handle)
    assert ("User rejected" in sampling, elicitation, "not supported" in roots) == (True, "decline", True)
    assert recorder.methods().count("POST initialize") == 1
    assert len(answers(recorder)) == 6
    assert {exchange.session_id for exchange in answers(recorder)} == {handle.session_id}


def test_a_method_may_use_the_session_while_its_call_waits(recorded_peer, run):
    class Looking(Silent):
        def on_elicitation(self, params):
            return {"answer": text_of(self.mcp.call_tool("ask_model", {"prompt": params.message}))}

        def on_sampling(self, params):
            return "within"

    def ask(self):
        return text_of(self.mcp.call_tool("ask_user", {"question": "why"}))

    assert run(recorded_peer("python").url, Looking, ask) == "accept: unknown: within"


@pytest.mark.parametrize("peer", [("python",), ("typescript",), MODERN], ids=" ".join)
def test_what_a_method_raises_ends_its_call_and_stays_here(recorded_peer, run, peer):
    class Failing(Silent):
        def on_elicitation(self, params):
            raise LookupError("a secret of ours")

    class FailingOnTheLoop(Silent):
        async def on_elicitation(self, params):
            raise LookupError("a secret of ours")

    def ask(self):
        tool, name = ("delete", "item") if peer == MODERN else ("ask_user", "question")
        with pytest.raises(LookupError, match="a secret of ours"):
            self.mcp.call_tool(tool, {name: "why"})
        return text_of(self.mcp.call_tool(*echo(peer, "still here")))

    recorder = recorded_peer(*peer)
    for base in (Failing, FailingOnTheLoop):
        assert run(recorder.url, base, ask) == "still here"
    assert not any(b"secret" in exchange.body for exchange in recorder.exchanges)
    if peer != MODERN:
        assert recorder.wait_for(lambda exchange: b"on_elicitation has failed" in exchange.body)


@pytest.mark.parametrize("code", [-1, CONNECTION_CLOSED])
def test_a_method_may_answer_with_an_error(recorded_peer, run, code):
    class Refusing(Silent):
        def on_sampling(self, params):
            raise MCPError(code, "not today")

    def ask(self):
        return text_of(self.mcp.call_tool("ask_model", {"prompt": "whales"}, timeout=10))

    assert "not today" in run(recorded_peer("python").url, Refusing, ask)


def test_an_answer_that_takes_long_is_no_silence_of_the_server(recorded_peer, run):
    class Pondering(Silent):
        def on_elicitation(self, params):
            # Meanwhile the server answers to nothing for longer than it may.
            with pytest.raises(TransportError):
                self.mcp.call_tool("log_and_wait", {"seconds": 30})
            return {"answer": "at last"}

    def ask(self):
        return text_of(self.mcp.call_tool("ask_user", {"question": "why"}))

    url = recorded_peer("python").url
    servers = {"peer": {"url": url, "read_timeout_seconds": 0.4}}
    assert run(url, Pondering, ask, conf={"mcp_servers": servers}) == "accept: at last"


def test_a_call_that_times_out_while_it_is_answered_is_cancelled_and_the_session_goes_on(recorded_peer, run):
    recorder = recorded_peer("python")

    class Waiting(Silent):
        async def on_elicitation(self, params):
            await anyio.sleep(30)

    def ask(self):
        with pytest.raises(TransportError, match=r"within 0.3 s"):
            self.mcp.call_tool("ask_user", {"question": "why"}, timeout=0.3)
        return text_of(self.mcp.call_tool("echo", {"text": "still here"}))

    assert run(recorder.url, Waiting, ask) == "still here"
    assert any(map(is_cancellation, recorder.exchanges))


def test_a_coroutine_function_is_cancelled_when_its_call_ends(recorded_peer, run):
    cancelled = threading.Event()

    class Waiting(Silent):
        async def on_elicitation(self, params):
            try:
                await anyio.sleep(30)
            finally:
                cancelled.set()

    def ask(self):
        with pytest.raises(TransportError, match=r"within 0.3 s"):
            self.mcp.call_tool("ask_user", {"question": "why"}, timeout=0.3)
        return cancelled.wait(5)

    assert run(recorded_peer("python").url, Waiting, ask)


def test_what_a_method_returns_is_awaited_where_it_can_be(recorded_peer, run):
    async def answer(message):
        await anyio.lowlevel.checkpoint()
        return {"answer": f"to {message}"}

    class Sampling:
        async def __call__(self, params):
            await anyio.lowlevel.checkpoint()
            return f"on {params.messages[0].content.text}"

    class Deferring(Silent):
        on_sampling = Sampling()

        def on_elicitation(self, params):
            return answer(params.message)

        def on_log(self, params):
            return note(params.data)

    async def note(text):
        noted.append(text)

    def ask(self):
        say(self, text="x")
        model = text_of(self.mcp.call_tool("ask_model", {"prompt": "whales"}))
        return model, text_of(self.mcp.call_tool("ask_user", {"question": "why"})), *wait_until(lambda: noted)

    noted = []
    assert run(recorded_peer("python").url, Deferring, ask) == ("unknown: on whales", "accept: to why", "x")


def test_what_comes_to_be_awaited_after_the_call_has_ended_is_dropped(recorded_peer, run):
    ended = threading.Event()

    class Late(Silent):
        def on_elicitation(self, params):
            assert ended.wait(10)
            return sleep()

    async def sleep():
        await anyio.sleep(30)

    def ask(self):
        def until_cancelled():
            recorder.wait_for(is_cancellation)
            ended.set()

        waiting = threading.Thread(target=until_cancelled)
        waiting.start()
        with pytest.raises(TransportError, match=r"within 0.3 s"):
            self.mcp.call_tool("ask_user", {"question": "why"}, timeout=0.3)
        waiting.join()
        return text_of(self.mcp.call_tool("echo", {"text": "still here"}))

    recorder = recorded_peer("python")
    assert run(recorder.url, Late, ask) == "still here"


def test_a_url_is_given_to_the_task_as_it_is(recorded_peer, run):
    class Visiting(Silent):
        def on_elicitation(self, params):
            visited.append((params.mode, params.url, params.message))
            return ElicitResult(action="accept")

    def ask(self):
        return text_of(self.mcp.call_tool("ask_to_visit", {"url": "https://example.com/pay"}))

    visited = []
    recorder = recorded_peer("python")
    assert run(recorder.url, Visiting, ask) == "accept"
    assert visited == [("url", "https://example.com/pay", "Please visit")]
    assert set(capabilities(recorder)["elicitation"]) == {"form", "url"}


# Broken responses


@pytest.mark.parametrize("kind", ["python", "python1"])
def test_a_question_that_comes_in_the_continued_part_of_a_response_is_answered(recorded_peer, run, kind):
    recorder = recorded_peer(kind, "--event-store")
    # The first event only gives an ID, the second is a question, and so on.
    recorder.cut(rpc_method="tools/call", after_events=2)

    def ask(self, threads):
        return text_of(self.mcp.call_tool("ask_twice"))

    assert run(recorder.url, Answering, ask, threads=[]) == "to first to second"
    assert "GET" in recorder.methods()
    assert len(answers(recorder)) == 2


@pytest.mark.anyio
async def test_a_question_that_was_not_answered_is_asked_again_of_who_continues_the_call(recorded_peer):
    recorder = recorded_peer("python", "--event-store")
    request = CallToolRequest(params=CallToolRequestParams(name="ask_twice"))
    tokens, asked = [], []

    async def note(token):
        tokens.append(token)

    async def wait(_context, params):
        asked.append(params.message)
        if params.message == "second":
            await anyio.sleep_forever()
        return ElicitResult(action="accept", content={"answer": "one"})

    async def answer(_context, params):
        return ElicitResult(action="accept", content={"answer": f"again {params.message}"})

    first = resumable_http(recorder.url)
    async with Client(first, elicitation_callback=wait) as client, anyio.create_task_group() as tasks:
        metadata = ClientMessageMetadata(on_resumption_token_update=note)
        tasks.start_soon(lambda: client.session.send_request(request, CallToolResult, metadata=metadata))
        await eventually(lambda: len(asked) == 2)
        handle = first.handle
        tasks.cancel_scope.cancel()
    again = resumable_http(recorder.url, handle=handle)
    async with Client(again, mode="legacy", elicitation_callback=answer) as client:
        metadata = ClientMessageMetadata(resumption_token=tokens[-1])
        with anyio.fail_after(10):
            result = await client.session.send_request(request, CallToolResult, metadata=metadata)
        await again.terminate()
    assert text_of(result) == "one again second"


@pytest.mark.anyio
async def test_what_fails_to_answer_in_a_durable_task_leaves_the_question_to_its_next_run(recorded_peer, valkey):
    class Asking:
        failures = 1

        async def on_elicitation(self, params):
            if self.failures:
                self.failures -= 1
                raise LookupError("not yet")
            return {"answer": params.message}

    recorder, task, connections = recorded_peer("python", "--event-store"), Asking(), Connections()
    async with a_run(recorder.url, valkey, task, connections) as session:
        with pytest.raises(LookupError, match="not yet"):
            await session.call_tool("ask_user", {"question": "why"})
    async with a_run(recorder.url, valkey, task, connections) as session:
        assert text_of(await session.call_tool("ask_user", {"question": "why"})) == "accept: why"
    await connections.aclose()
    assert sum(map(is_call, recorder.exchanges)) == 1
    assert len(answers(recorder)) == 1


# What the methods may return


def test_answers_may_be_written_shortly():
    result = CreateMessageResult(role="assistant", content=TextContent(type="text", text="x"), model="m")
    assert sampled(result) is result
    assert sampled("x").content.text == "x"
    assert sampled(None).code == -1
    assert elicited({"name": "Ada"}) == ElicitResult(action="accept", content={"name": "Ada"})
    assert elicited(ElicitResult(action="cancel")).action == "cancel"
    assert elicited(None).action == "decline"
    roots = listed([Path("/srv/a b"), "file:///srv/c", Root(uri="file:///srv/d", name="d")]).roots
    assert [str(root.uri) for root in roots] == ["file:///srv/a%20b", "file:///srv/c", "file:///srv/d"]
    assert listed(ListRootsResult(roots=roots)).roots == roots


@pytest.mark.parametrize(
    ("read", "answer"), [(sampled, 7), (elicited, "yes"), (elicited, True), (listed, "/srv"), (listed, None)]
)
def test_anything_else_is_refused(read, answer):
    with pytest.raises(TypeError, match=f"not {type(answer).__name__}"):
        read(answer)


# Logs


def say(self, level="warning", text="watch out for {session}"):
    session_id = self.mcp.open() or self.mcp.session_id
    self.mcp.call_tool("say", {"level": level, "text": text})
    return session_id


@pytest.mark.parametrize("kind", OURS)
def test_what_a_server_logs_goes_to_the_logger_of_the_task_without_its_session_id(recorded_peer, run, caplog, kind):
    with caplog.at_level(logging.DEBUG, "asked.task"):
        session_id = run(recorded_peer(kind).url, Silent, say)
    (record,) = [record for record in caplog.records if record.name == "asked.task"]
    assert record.levelno == logging.WARNING
    assert record.getMessage().startswith("peer say: watch out for ")
    assert (record.mcp_server, record.mcp_tool) == ("peer", "say")
    assert record.thread == threading.get_ident()
    assert session_id not in caplog.text


@pytest.mark.parametrize(
    ("level", "number"),
    [
        ("debug", logging.DEBUG),
        ("notice", logging.INFO),
        ("error", logging.ERROR),
        ("alert", logging.CRITICAL),
        ("emergency", logging.CRITICAL),
    ],
)
def test_levels_of_mcp_become_those_of_python(recorded_peer, run, caplog, level, number):
    with caplog.at_level(logging.DEBUG, "asked.task"):
        run(recorded_peer("typescript").url, Silent, say, level=level)
    assert [record.levelno for record in caplog.records if record.name == "asked.task"] == [number]


def test_on_log_takes_over(recorded_peer, run, caplog):
    class Taking(Silent):
        def on_log(self, params):
            taken.append((params.level, params.data, threading.current_thread()))

    class TakingOnTheLoop(Silent):
        async def on_log(self, params):
            taken.append((params.level, params.data, threading.current_thread()))

    taken = []
    url = recorded_peer("python").url
    run(url, Taking, say, text="x")
    run(url, TakingOnTheLoop, say, text="y")
    assert [entry[:2] for entry in taken] == [("warning", "x"), ("warning", "y")]
    assert [entry[2] is threading.current_thread() for entry in taken] == [True, False]
    assert not [record for record in caplog.records if record.name == "asked.task"]


def test_what_on_log_raises_ends_the_call(recorded_peer, run):
    class Failing(Silent):
        def on_log(self, params):
            raise LookupError("no more")

    def slow(self):
        for _ in range(20):
            self.mcp.call_tool("say", {"level": "info", "text": "x"})

    with pytest.raises(LookupError, match="no more"):
        run(recorded_peer("python").url, Failing, slow)


@pytest.mark.anyio
@pytest.mark.parametrize("is_asynchronous", [False, True])
async def test_what_on_log_raises_outside_of_a_call_is_logged_and_ends_no_other(caplog, is_asynchronous):
    class Failing:
        def on_log(self, params):
            raise LookupError("no more")

    class FailingOnTheLoop:
        async def on_log(self, params):
            raise LookupError("no more")

    caller, callers = Caller(), Callers()
    asked = Asked((FailingOnTheLoop if is_asynchronous else Failing)(), callers, logging.getLogger("asked.task"))
    log = asked.callbacks("peer", lambda: None)["logging_callback"]
    params = LoggingMessageNotificationParams(level="info", data="x")

    def wait():
        # As the next call does, which runs what is left over.
        with callers.waiting(caller):
            caller.serve()

    with anyio.fail_after(10):
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(anyio.to_thread.run_sync, wait)
            await log(params)
            caller.done()
    assert [record.getMessage() for record in caplog.records] == ["on_log has failed outside of any call"]


@pytest.mark.parametrize("is_asynchronous", [False, True])
def test_what_on_log_raises_is_what_the_call_raises_also_in_an_async_task(recorded_peer, run, is_asynchronous):
    class Failing(Silent):
        def on_log(self, params):
            raise LookupError("no more")

    async def slow(self):
        call = asyncio.create_task(self.amcp.call_tool("log_and_wait", {"seconds": 30}))
        await asyncio.wait([call])
        return repr(call.exception())

    def slow_in_thread(self):
        with pytest.raises(LookupError) as raised:
            self.mcp.call_tool("log_and_wait", {"seconds": 30})
        return repr(raised.value)

    function = slow if is_asynchronous else slow_in_thread
    assert run(recorded_peer("python").url, Failing, function) == "LookupError('no more')"


@pytest.mark.anyio
async def test_a_time_limit_that_strikes_while_on_log_runs_outside_of_a_call_ends_the_task(caplog):
    class Struck:
        def on_log(self, params):
            raise SoftTimeLimitExceeded

    caller, callers = Caller(), Callers()
    asked = Asked(Struck(), callers, logging.getLogger("asked.task"))
    log = asked.callbacks("peer", lambda: None)["logging_callback"]
    params = LoggingMessageNotificationParams(level="info", data="x")

    def wait():
        with callers.waiting(caller), pytest.raises(SoftTimeLimitExceeded):
            caller.serve()

    with anyio.fail_after(10):
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(log, params)
            await anyio.to_thread.run_sync(wait)
            tasks.cancel_scope.cancel()
    assert not caplog.records


def levels_asked_for(recorder):
    return [
        exchange.rpc_params["level"]
        for exchange in recorder.exchanges
        if exchange.rpc_method == "logging/setLevel" and exchange.status == 200
    ]


def test_a_level_is_asked_for_once_where_a_session_is_opened(recorded_peer, run):
    class Chatty(Silent):
        mcp_log_level = "debug"

    def keep(self, mcp_session=None):
        self.mcp.call_tool("echo", {"text": "x"})
        return self.mcp.detach()

    recorder = recorded_peer("typescript")
    handle = run(recorder.url, Chatty, keep, conf={"mcp_log_level": "error"})
    run(recorder.url, Chatty, keep, mcp_session=handle)
    assert levels_asked_for(recorder) == ["debug"]
    run(recorder.url, Silent, keep, conf={"mcp_log_level": "error"})
    run(recorder.url, Silent, keep)
    assert levels_asked_for(recorder) == ["debug", "error"]


def test_a_server_that_takes_no_level_is_not_asked(recorded_peer, run):
    recorder = recorded_peer("python")
    run(recorder.url, Silent, say, conf={"mcp_log_level": "debug"})
    assert "POST logging/setLevel" not in recorder.methods()


def test_in_the_stateless_era_each_request_asks_for_logs(recorded_peer, run, caplog):
    recorder = recorded_peer(*MODERN)
    with caplog.at_level(logging.DEBUG, "asked.task"):
        run(recorder.url, Silent, say)
        run(recorder.url, Silent, say, conf={"mcp_log_level": "error"})
        assert not [record for record in caplog.records if record.name == "asked.task"]
        run(recorder.url, Silent, say, conf={"mcp_log_level": "info"}, text="x")
    assert [record.getMessage() for record in caplog.records if record.name == "asked.task"] == ["peer say: x"]
    assert "POST logging/setLevel" not in recorder.methods()


@pytest.mark.parametrize("level", ["loud", 10])
def test_a_wrong_level_is_refused_before_anything_is_sent(recorded_peer, run, level):
    recorder = recorded_peer("python")
    with pytest.raises(ConfigurationError, match="mcp_log_level is one of debug"):
        run(recorder.url, Silent, say, conf={"mcp_log_level": level})
    assert not recorder.exchanges


# The stateless era


def test_in_the_stateless_era_the_same_methods_are_asked(recorded_peer, run):
    recorder, threads = recorded_peer(*MODERN), []

    def delete(self, threads):
        return text_of(self.mcp.call_tool("delete", {"item": "x"}))

    assert run(recorder.url, Answering, delete, threads=threads) == "x: accept to Delete x?"
    assert threads == [threading.current_thread()]
    with pytest.raises(MCPError, match="did not declare the form elicitation capability"):
        run(recorder.url, Silent, delete, threads=[])


def test_a_call_that_needs_input_can_be_continued_by_another_task(recorded_peer, run):
    recorder = recorded_peer(*MODERN)

    def begin(self, threads):
        asking = self.mcp.call_tool("delete", {"item": "x"}, allow_input_required=True)
        assert not threads
        return list(asking.input_requests), asking.request_state, self.mcp.handle

    def finish(self, key, state, mcp_session=None):
        answers = {key: {"action": "accept", "content": {"answer": "yes"}}}
        return text_of(self.mcp.call_tool("delete", {"item": "x"}, input_responses=answers, request_state=state))

    (key,), state, handle = run(recorder.url, Answering, begin, threads=[])
    recorder.clear()
    assert run(recorder.url, Silent, finish, key=key, state=state, mcp_session=handle) == "x: accept yes"
    assert recorder.methods()[0] == "POST tools/call"
    assert not {"POST server/discover", "POST initialize"} & set(recorder.methods())


@pytest.mark.anyio
async def test_a_durable_task_gets_the_question_again_without_a_request(recorded_peer, valkey):
    recorder, connections = recorded_peer(*MODERN), Connections()
    answers = []
    for _ in range(2):
        async with a_run(recorder.url, valkey, Answering, connections) as session:
            asking = await session.call_tool("delete", {"item": "x"}, allow_input_required=True)
            (key,) = asking.input_requests
            given = {key: {"action": "accept", "content": {"answer": "yes"}}}
            state = asking.request_state
            answer = await session.call_tool("delete", {"item": "x"}, input_responses=given, request_state=state)
            answers.append((asking, answer))
    await connections.aclose()
    assert answers[0] == answers[1]
    assert text_of(answers[0][1]) == "x: accept yes"
    assert recorder.methods().count("POST tools/call") == 2


# Changes


@pytest.mark.parametrize("kind", OURS)
@pytest.mark.anyio
async def test_a_change_of_the_tools_drops_their_listing(recorded_peer, new_session, kind):
    recorder = recorded_peer(kind)
    session = new_session(recorder.url)
    for _ in range(2):
        await session.call_tool("add", {"a": 1, "b": 2})
    assert recorder.methods().count("POST tools/list") == 1
    await session.call_tool("announce", raise_on_error=False)
    await session.call_tool("add", {"a": 1, "b": 2})
    assert recorder.methods().count("POST tools/list") == 2
    await session.close()


@pytest.mark.parametrize("by_hand", [False, True])
@pytest.mark.anyio
async def test_a_server_that_misses_headers_of_a_call_is_asked_for_its_tools_anew(recorded_peer, new_session, by_hand):
    recorder = recorded_peer(*MODERN)
    session = new_session(recorder.url)
    await session.call_tool("add", {"a": 1, "b": 2})
    recorder.clear()
    error = {"code": HEADER_MISMATCH, "message": "The schema has changed"}
    body = json.dumps({"jsonrpc": "2.0", "id": None, "error": error}).encode()
    recorder.answer(rpc_method="tools/call", status=400, body=body)
    result = await session.call_tool("add", {"a": 1, "b": 2}, allow_input_required=by_hand)
    assert text_of(result) == "3"
    assert recorder.methods() == ["POST tools/call", "POST tools/list", "POST tools/call"]
    await session.close()


@pytest.mark.anyio
async def test_what_the_standalone_stream_asks_waits_for_the_next_call(recorded_peer, run):
    recorder = recorded_peer("everything")

    class Rooted(Silent):
        def on_list_roots(self):
            asked.append(threading.current_thread())
            return ["/srv/project"]

    def ask(self):
        # The server asks for the roots on its own, a moment after the session was opened.
        self.mcp.open()
        recorder.wait_for(lambda exchange: exchange.method == "GET" and exchange.status == 200)
        return text_of(self.mcp.call_tool("get-roots-list"))

    asked = []
    servers = {"peer": {"url": recorder.url, "listen": True}}
    text = await anyio.to_thread.run_sync(lambda: run(recorder.url, Rooted, ask, conf={"mcp_servers": servers}))
    assert "file:///srv/project" in text
    assert len(set(asked)) == 1
    assert await seen(recorder, is_call)
