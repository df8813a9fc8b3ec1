"""Tasks whose function is `async def`, run in this process: as functions and eagerly."""

import asyncio
import os
import signal
import threading
from contextlib import ExitStack, asynccontextmanager, suppress
from contextvars import ContextVar
from functools import partial, wraps

import anyio
import pytest
from calls import eventually, is_call, is_cancellation, text_of
from celery import Celery, current_task
from celery.exceptions import SoftTimeLimitExceeded
from mcp import Client
from processes import wait_until
from pydantic import BaseModel

from mcp_celery import MCPTask, coroutines, signals
from mcp_celery.exceptions import ConfigurationError, SessionError, ToolError, TransportError
from mcp_celery.portal import close_portal, get_portal
from mcp_celery.testing import eager_sessions

SLOW = {"steps": 100, "seconds": 0.1}


@pytest.fixture
def recorder(recorded_peer):
    return recorded_peer("python")


@pytest.fixture
def app(recorder):
    with Celery("async_tasks", broker="memory://", backend="cache+memory://", set_as_current=False) as app:
        app.conf.mcp_servers = {"peer": {"url": recorder.url}, "second": {"url": recorder.url}}
        yield app
    close_portal()


@pytest.fixture
def task(app):
    """`@task` and `@task(option=...)` as in a project, for tasks of the server "peer"."""
    return partial(app.task, base=MCPTask, bind=True, shared=False, mcp_servers=("peer", "second"))


@pytest.fixture
def interrupted(recorder):
    """`interrupted(exc, function)` calls a function in which *exc* is raised by a signal once a tool was called."""
    before = signal.getsignal(signal.SIGUSR1)

    def interrupted(exc, function):
        def handler(*_):
            raise exc

        def interrupt():
            recorder.wait_for(is_call)
            os.kill(os.getpid(), signal.SIGUSR1)

        signal.signal(signal.SIGUSR1, handler)
        thread = threading.Thread(target=interrupt)
        thread.start()
        try:
            return function()
        finally:
            thread.join(10)

    yield interrupted
    signal.signal(signal.SIGUSR1, before)


def was_cancelled(recorder):
    """Whether the call that was made has been cancelled at the server, by now."""
    calls = [exchange.rpc_id for exchange in recorder.exchanges if is_call(exchange)]
    return [exchange.rpc_params["requestId"] for exchange in recorder.exchanges if is_cancellation(exchange)] == calls


# -- Running


def test_an_async_function_runs_to_its_end_and_its_session_with_it(task, recorder):
    @task()
    async def step(self, value):
        await self.amcp.call_tool("set_variable", {"name": "x", "value": value})
        return text_of(await self.amcp.call_tool("get_variable", {"name": "x"})), self.amcp.session_id is not None

    assert step("red") == ("red", True)
    assert step.apply(("blue",)).get() == ("blue", True)
    assert recorder.methods().count("DELETE") == 2


def test_all_that_the_session_can_do_can_be_awaited(task, recorder):
    @task()
    async def step(self):
        mcp = self.amcp
        before = mcp.is_open, mcp.handle, mcp.requests_sent, repr(mcp)
        await mcp.open()
        assert isinstance(mcp.client, Client)
        assert "echo" in {tool.name for tool in (await mcp.client.list_tools()).tools}
        assert "echo" in {tool.name for tool in (await mcp.list_tools()).tools}
        assert (await mcp.list_resources()).resources
        assert (await mcp.list_resource_templates()).resource_templates
        assert (await mcp.list_prompts()).prompts
        assert (await mcp.read_resource("note://hello")).contents
        assert (await mcp.get_prompt("greet", {"name": "Ada"})).messages
        assert (mcp.server, mcp.server_info.name, mcp.resumed) == ("peer", "python", False)
        with pytest.raises(ToolError, match="it failed"):
            await mcp.call_tool("fail")
        await self.amcp["second"].call_tool("echo", {"text": "x"})
        assert self.amcp["second"].session_id != mcp.session_id
        handle = await mcp.detach()
        with pytest.raises(SessionError, match="not open"):
            _ = mcp.client
        await mcp.open()
        await mcp.close()
        return before, handle.short_id

    before, _ = step()
    assert before == (False, None, 0, "<AwaitedSession peer None not open yet>")
    assert recorder.methods().count("DELETE") == 2, "one of two on the first server, one on the second"


def test_calls_of_one_session_are_made_at_once(task, recorder):
    @task()
    async def gathers(self):
        results = await asyncio.gather(*[self.amcp.call_tool("echo", {"text": str(n)}) for n in range(20)])
        return [text_of(result) for result in results]

    @task()
    async def groups(self):
        texts = {}

        async def call(number):
            texts[number] = text_of(await self.amcp.call_tool("echo", {"text": str(number)}))

        async with anyio.create_task_group() as tasks:
            for number in range(20):
                tasks.start_soon(call, number)
        return [texts[number] for number in range(20)]

    expected = [str(number) for number in range(20)]
    assert gathers() == expected
    assert groups() == expected
    assert recorder.methods().count("POST initialize") == 2


def test_context_variables_go_along_and_stay_apart(task):
    variable = ContextVar("variable", default="unset")

    @task()
    async def step(self):
        before = variable.get()
        variable.set("of the task")
        return before

    variable.set("of the caller")
    assert step() == "of the caller"
    assert variable.get() == "of the caller"


def test_the_request_and_the_current_task_are_those_of_each_execution(task):
    async def child(task):
        await asyncio.sleep(0)
        return task.request.id

    @task()
    async def step(self, others):
        seen = [self.request.id, current_task.request.id, current_task.name]
        await asyncio.sleep(0.001)
        seen += [self.request.id, current_task.request.id, current_task.name]
        seen += await asyncio.gather(child(self), child(self), asyncio.to_thread(lambda: self.request.id))
        assert set(seen) == {self.request.id, self.name}
        return self.request.id

    assert step.request.id is None, "bound by now: several threads would bind it at once"
    ids = [f"id-{number}" for number in range(8)]
    results = []
    threads = [
        threading.Thread(target=lambda task_id=task_id: results.append(step.apply(([],), task_id=task_id).get()))
        for task_id in ids
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    assert sorted(results) == ids
    assert step.request.id is None


def test_progress_is_reported_to_functions_and_coroutine_functions(task):
    @task()
    async def step(self):
        seen = []

        async def report(*progress):
            await asyncio.sleep(0)
            seen.append((self.request.id, *progress))

        await self.amcp.call_tool("slow", {"steps": 2, "seconds": 0.01}, on_progress=report)
        await self.amcp.call_tool(
            "slow", {"steps": 1, "seconds": 0.01}, on_progress=lambda *progress: seen.append((None, *progress))
        )
        return seen

    assert step.apply(task_id="me").get() == [("me", 1, 2, "step 1"), ("me", 2, 2, "step 2"), (None, 1, 1, "step 1")]


def test_an_error_in_a_progress_callback_ends_the_call_also_at_the_server(task, recorder):
    @task()
    async def step(self):
        def report(*_):
            raise LookupError("in the callback")

        await self.amcp.call_tool("slow", SLOW, on_progress=report)

    with pytest.raises(LookupError, match="in the callback"):
        step()
    assert was_cancelled(recorder)


def test_results_are_dumped_as_those_of_functions(app, task):
    class Point(BaseModel):
        x: int

    @task(pydantic=True)
    async def shift(self, point: Point, by: int) -> Point | None:
        assert isinstance(point, Point)
        return Point(x=text_of(await self.amcp.call_tool("add", {"a": point.x, "b": by}))) if by else None

    assert shift.apply(({"x": 1}, 2)).get() == {"x": 3}
    assert shift.apply(({"x": 1}, 0)).get() is None


def test_functions_that_return_coroutines_and_classes_with_async_run_are_run_so(app, task):
    def doubled(function):
        @wraps(function)
        def double(*args):
            return function(*args, 2)

        return double

    @task()
    @doubled
    async def wrapped(self, value, factor):
        return value * factor

    @app.task(base=MCPTask, shared=False)
    async def unbound(value):
        await asyncio.sleep(0)
        return value

    class Base(MCPTask):
        async def run(self, value):
            return value + 1

    class Derived(Base):
        name = "derived"

        async def run(self, value, mcp_session=None):
            return await super().run(value), mcp_session

    assert wrapped(2) == 4
    assert unbound(3) == 3
    assert app.register_task(Derived()).apply((1,)).get() == (2, None)


def test_what_a_coroutine_raises_is_retried_for(task):
    attempts = []

    @task(autoretry_for=(RuntimeError,), max_retries=2, default_retry_delay=0, retry_backoff=False)
    async def step(self):
        attempts.append(self.request.retries)
        await self.amcp.call_tool("echo", {"text": "x"})
        if self.request.retries < 2:
            raise RuntimeError("not yet")
        return "done"

    assert step.apply().get() == "done"
    assert attempts == [0, 1, 2]
    with pytest.raises(RuntimeError, match="not yet"):
        step()


def test_an_eager_task_retries_and_replaces_itself(task):
    @task(max_retries=2, default_retry_delay=0)
    async def retries(self):
        await self.amcp.call_tool("echo", {"text": "x"})
        if self.request.retries < 2:
            raise self.retry(exc=RuntimeError("not yet"))
        return self.request.retries

    @task()
    async def replaced(self, value):
        await self.amcp.call_tool("echo", {"text": "x"})
        return self.replace(adds.s(value, 10))

    @task()
    async def adds(self, a, b):
        return text_of(await self.amcp.call_tool("add", {"a": a, "b": b}))

    assert retries.apply().get() == 2
    assert replaced.apply((1,)).get() == "11"


# -- Called on a loop


@pytest.mark.anyio
async def test_called_on_a_loop_a_task_is_awaited_as_its_function_would_be(task, recorder):
    variable = ContextVar("variable", default="unset")

    @task()
    async def inner(self, value):
        if value > 2:
            raise ValueError(value)
        return value, variable.get(), text_of(await self.amcp.call_tool("echo", {"text": "x"}))

    @task()
    async def outer(self, value):
        return await asyncio.gather(*[inner(value) for _ in range(3)])

    variable.set("here")
    assert await inner(1) == (1, "here", "x")
    assert await outer(2) == [(2, "here", "x")] * 3
    with pytest.raises(ValueError, match="3"):
        await inner(3)
    assert (await asyncio.to_thread(inner.apply, (1,))).get()[0] == 1
    assert inner.apply((1,)).get()[0] == 1, "where it holds this loop up"
    assert recorder.methods().count("DELETE") == recorder.methods().count("POST initialize") == 6


@pytest.mark.anyio
async def test_tasks_that_are_awaited_in_a_test_share_its_session(app, task, recorder):
    @task()
    async def remember(self):
        await self.amcp.call_tool("set_variable", {"name": "x", "value": "1"})

    @task()
    async def recall(self):
        return text_of(await self.amcp.call_tool("get_variable", {"name": "x"}))

    with eager_sessions(app):
        await remember()
        assert await recall() == "1"
    assert (recorder.methods().count("POST initialize"), recorder.methods()[-1]) == (1, "DELETE")


@pytest.mark.anyio
async def test_a_task_that_is_awaited_is_cancelled_with_who_awaits_it(task, recorder):
    @task()
    async def step(self):
        await self.amcp.call_tool("slow", SLOW)

    with anyio.move_on_after(20) as scope:
        async with anyio.create_task_group() as tasks:

            async def cancel():
                await eventually(lambda: any(map(is_call, recorder.exchanges)))
                tasks.cancel_scope.cancel()

            tasks.start_soon(cancel)
            await step()
    assert not scope.cancelled_caught
    assert was_cancelled(recorder)
    await eventually(lambda: recorder.methods()[-1] == "DELETE")


def test_what_would_be_a_deadlock_is_an_error(task):
    @task()
    def plain(self):
        return self.mcp.call_tool("echo", {"text": "x"})

    @task()
    async def other(self):
        pass

    @task()
    async def step(self):
        with pytest.raises(SessionError, match=r"await self\.amcp"):
            self.mcp.call_tool("echo", {"text": "x"})
        with pytest.raises(SessionError, match="coroutine"):
            plain()
        with pytest.raises(SessionError, match="await the task"):
            other.apply(throw=True)
        return text_of(await self.amcp.call_tool("echo", {"text": "still there"}))

    assert step() == "still there"


def test_elsewhere_the_asynchronous_face_says_what_to_do(task):
    @task()
    def plain(self):
        _ = self.amcp

    @task()
    def with_a_loop_of_its_own(self):
        async def use():
            await self.amcp.call_tool("echo", {"text": "x"})

        asyncio.run(use())

    @task()
    async def in_another_loop(self):
        mcp = self.amcp
        await asyncio.to_thread(lambda: asyncio.run(mcp.open()))

    for wrong in (plain, with_a_loop_of_its_own, in_another_loop):
        with pytest.raises(SessionError, match=r"in a plain function use self\.mcp"):
            wrong()
    with pytest.raises(ConfigurationError, match="while task"):
        _ = plain.amcp


# -- What is left at the end


def names_on_loop():
    """The names of what runs on the event loop of the process."""

    async def names():
        return {each.get_name() for each in asyncio.all_tasks()}

    return get_portal().call(names)


def test_what_a_task_has_started_ends_with_it_after_its_clean_up(task, recorder):
    ended = []

    async def poll(self):
        try:
            while True:
                await asyncio.sleep(0.01)
                await self.amcp.call_tool("echo", {"text": "x"})
        finally:
            await asyncio.sleep(0.01)
            ended.append(self.request.id)

    async def fail():
        raise LookupError("at once")

    async def start_another(self):
        try:
            await asyncio.Event().wait()
        finally:
            asyncio.create_task(poll(self), name="left by what was left")  # noqa: RUF006 - it is to be forgotten

    @task()
    async def forgets(self):
        asyncio.create_task(poll(self), name="left")  # noqa: RUF006 - the same
        asyncio.create_task(start_another(self), name="left")  # noqa: RUF006 - the same
        await self.amcp.call_tool("slow", {"steps": 1, "seconds": 0.05})
        return "done"

    @task()
    async def fails(self):
        await asyncio.gather(asyncio.create_task(poll(self), name="left"), fail())

    @task()
    async def outer(self):
        await forgets()
        await fails()

    assert forgets.apply(task_id="forgets").get() == "done"
    assert "forgets" in ended
    with pytest.raises(LookupError):
        fails()
    assert len(ended) > 1
    with pytest.raises(LookupError):
        outer()
    assert not {name for name in names_on_loop() if name.startswith("left")}
    assert recorder.methods().count("DELETE") == recorder.methods().count("POST initialize")


def test_what_a_task_has_started_is_left_alone_while_another_one_ends(task):
    still = []

    async def wait_for_other(other_has_ended):
        await eventually(other_has_ended.is_set)
        still.append("runs")

    @task()
    async def ends(self):
        await self.amcp.call_tool("echo", {"text": "x"})

    @task()
    async def stays(self):
        other_has_ended = asyncio.Event()
        waiting = asyncio.create_task(wait_for_other(other_has_ended))
        await ends()
        await asyncio.to_thread(ends)
        other_has_ended.set()
        await waiting

    stays()
    assert still == ["runs"]


def test_a_plain_task_that_was_started_in_a_thread_goes_on_as_the_thread_does(task, recorder):
    done = []

    @task()
    def plain(self):
        done.append(text_of(self.mcp.call_tool("slow", {"steps": 3, "seconds": 0.1})))

    @task()
    async def step(self):
        asyncio.create_task(asyncio.to_thread(plain))  # noqa: RUF006 - it is to be forgotten
        await eventually(lambda: any(map(is_call, recorder.exchanges)))
        assert not done

    step()
    wait_until(lambda: done)
    recorder.wait_for(lambda exchange: exchange.method == "DELETE")


def test_a_session_ends_well_though_the_client_was_used_in_the_background(task, recorder):
    @task()
    async def step(self):
        await self.amcp.open()
        left = asyncio.create_task(self.amcp.client.call_tool("slow", SLOW))
        await eventually(lambda: any(map(is_call, recorder.exchanges)))
        assert not left.done()

    step()
    assert recorder.methods()[-2:] == ["POST notifications/cancelled", "DELETE"]
    assert was_cancelled(recorder)


def test_an_error_at_the_end_of_what_is_left_is_logged_and_harms_no_task(task, caplog):
    async def fails_at_the_end():
        try:
            await asyncio.Event().wait()
        finally:
            raise LookupError("while it was cancelled")

    @task()
    async def step(self):
        asyncio.create_task(fails_at_the_end())  # noqa: RUF006 - it is to be forgotten
        await asyncio.sleep(0)
        return "done"

    assert step() == "done"
    assert "while it was cancelled" in caplog.text


def test_what_does_not_end_is_left_with_a_warning(task, caplog, monkeypatch):
    monkeypatch.setattr(coroutines, "CLEAN_UP_SECONDS", 0.05)
    left = asyncio.Event()

    async def stay():
        while not left.is_set():
            with suppress(asyncio.CancelledError):
                await left.wait()

    @task()
    async def step(self):
        asyncio.create_task(stay(), name="stubborn")  # noqa: RUF006 - it is to be forgotten
        await asyncio.sleep(0)
        return "done"

    async def let_go():
        left.set()

    assert step() == "done"
    assert "stubborn" in caplog.text
    get_portal().call(let_go)


def test_an_interruption_once_the_function_has_ended_harms_no_result(task, caplog):
    """It comes while what the function has left is about to end."""
    before = signal.getsignal(signal.SIGUSR1)
    interrupted = []

    def handler(*_):
        interrupted.append(True)
        raise SoftTimeLimitExceeded

    async def be_slow():
        try:
            await asyncio.Event().wait()
        finally:
            os.kill(os.getpid(), signal.SIGUSR1)
            await eventually(lambda: interrupted)

    @task()
    async def step(self):
        asyncio.create_task(be_slow())  # noqa: RUF006 - it is to be forgotten
        await asyncio.sleep(0)
        return "done"

    signal.signal(signal.SIGUSR1, handler)
    try:
        assert step() == "done"
    finally:
        signal.signal(signal.SIGUSR1, before)
    assert interrupted == [True]


# -- Interrupts


def test_a_soft_limit_is_raised_where_the_coroutine_waits_and_can_be_caught(task, recorder, interrupted):
    @task()
    async def step(self):
        try:
            await self.amcp.call_tool("slow", SLOW)
        except SoftTimeLimitExceeded:
            assert was_cancelled(recorder)
            return "partial", text_of(await self.amcp.call_tool("echo", {"text": "usable"}))

    assert interrupted(SoftTimeLimitExceeded(), step) == ("partial", "usable")


@pytest.mark.parametrize("exc", [SoftTimeLimitExceeded(), SystemExit(1), KeyboardInterrupt()], ids=repr)
def test_an_interruption_cancels_the_call_and_ends_the_task(task, recorder, interrupted, exc):
    cleaned_up = []

    @task()
    async def step(self):
        try:
            await self.amcp.call_tool("slow", SLOW)
        finally:
            await asyncio.sleep(0.01)
            cleaned_up.append(self.request.called_directly)

    with pytest.raises(type(exc)) as caught:
        interrupted(exc, step)
    assert caught.value is exc
    assert cleaned_up == [True]
    assert was_cancelled(recorder)
    assert get_portal().call(alive) == "alive"


async def alive():
    return "alive"


def test_who_catches_the_end_of_the_process_does_not_stop_it(task, interrupted):
    @task()
    async def step(self):
        try:
            await self.amcp.call_tool("slow", SLOW)
        except SystemExit:
            return "never seen"

    with pytest.raises(SystemExit):
        interrupted(SystemExit(1), step)


async def gathered(self):
    await asyncio.gather(self.amcp.call_tool("slow", SLOW), asyncio.sleep(60))


async def in_asyncio_group(self):
    async with asyncio.TaskGroup() as tasks:
        tasks.create_task(self.amcp.call_tool("slow", SLOW))
        tasks.create_task(asyncio.sleep(60))


async def in_anyio_group(self):
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(self.amcp.call_tool, "slow", SLOW)
        tasks.start_soon(anyio.sleep, 60)


async def in_generator(self):
    async def calls():
        yield await self.amcp.call_tool("slow", SLOW)

    async for _ in calls():
        pass


async def in_group_of_context_manager(self):
    @asynccontextmanager
    async def calling():
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self.amcp.call_tool("slow", SLOW))
            yield

    async with calling():
        pass


async def with_timeout(self):
    async with asyncio.timeout(60):
        await self.amcp.call_tool("slow", SLOW)


WAYS = [gathered, in_asyncio_group, in_anyio_group, in_generator, in_group_of_context_manager, with_timeout]


@pytest.mark.parametrize("way", WAYS, ids=lambda way: way.__name__)
@pytest.mark.parametrize("exc", [SoftTimeLimitExceeded(), SystemExit(1)], ids=repr)
def test_an_interruption_can_be_caught_around_calls_that_are_made_at_once(task, recorder, interrupted, way, exc):
    def calls():
        return [task for task in asyncio.all_tasks() if task.get_name().startswith("mcp_celery call")]

    @task()
    async def step(self):
        try:
            await way(self)
        except type(exc):
            await eventually(lambda: was_cancelled(recorder) and not calls())
            assert asyncio.current_task().cancelling() == 0
            return "partial"

    if isinstance(exc, Exception):
        assert interrupted(exc, step) == "partial"
    else:
        with pytest.raises(type(exc)):
            interrupted(exc, step)
    assert was_cancelled(recorder)


async def in_body_of_group(self):
    async with asyncio.TaskGroup() as tasks:
        tasks.create_task(asyncio.sleep(60))
        await self.amcp.call_tool("slow", SLOW)


async def by_client(self):
    await self.amcp.open()
    await self.amcp.client.call_tool("slow", SLOW)


@pytest.mark.parametrize("way", [in_body_of_group, by_client], ids=lambda way: way.__name__)
@pytest.mark.parametrize("exc", [SoftTimeLimitExceeded(), SystemExit(1)], ids=repr)
def test_an_interruption_ends_the_task_as_what_it_is_however_it_comes_out(task, recorder, interrupted, way, exc):
    @task()
    async def step(self):
        await way(self)

    with pytest.raises(type(exc)) as caught:
        interrupted(exc, step)
    assert caught.value is exc
    assert was_cancelled(recorder)


def test_a_cancellation_of_its_own_fails_the_task_and_not_its_process(task):
    @task()
    async def step(self):
        asyncio.current_task().cancel()
        await self.amcp.call_tool("echo", {"text": "x"})

    with pytest.raises(Exception, match="was cancelled") as caught:
        step()
    assert isinstance(caught.value, Exception)


def test_a_call_that_anyio_cancels_is_cancelled_at_the_server(task, recorder):
    @task()
    async def step(self):
        await self.amcp.open()
        with anyio.move_on_after(0.3) as scope:
            await self.amcp.call_tool("slow", SLOW)
        assert scope.cancelled_caught
        with pytest.raises(TransportError, match=r"within 0.1 s"):
            await self.amcp.call_tool("slow", SLOW, timeout=0.1)
        return text_of(await self.amcp.call_tool("echo", {"text": "usable"}))

    assert step() == "usable"
    assert sum(map(is_cancellation, recorder.exchanges)) == 2


def test_signals_of_a_coroutine_are_sent_in_the_thread_of_its_task(app, task):
    told = []

    def note(signal, task_id, **_):
        told.append((signal.name, threading.get_ident(), task_id))

    @task()
    async def step(self):
        await self.amcp.call_tool("echo", {"text": "x"})

    with ExitStack() as receivers:
        for sent in (signals.session_opened, signals.call_finished, signals.session_closed):
            sent.connect(note, weak=False)
            receivers.callback(sent.disconnect, note)
        step.apply(task_id="me").get()
    here = threading.get_ident()
    assert told == [(name, here, "me") for name in ("session_opened", "call_finished", "session_closed")]
