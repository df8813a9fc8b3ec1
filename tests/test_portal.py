"""The event loop of a process: there is one, a fork gets its own, and an interrupted call leaves nothing behind."""

import _thread
import asyncio
import signal
import subprocess
import sys
import threading
from contextlib import suppress
from contextvars import ContextVar
from functools import partial

import anyio
import pytest
from anyio.lowlevel import checkpoint
from celery.exceptions import SoftTimeLimitExceeded
from processes import wait_until

from mcp_celery import portal as portal_module
from mcp_celery.portal import AwaitingCaller, Caller, Portal, close_portal, get_portal, in_loop_thread, is_running


@pytest.fixture
def portal():
    """A portal of the test's own."""
    portal = Portal()
    yield portal
    portal.close()


@pytest.fixture
def process_portal():
    """The portal of this process, new to the test and gone after it."""
    close_portal()
    yield get_portal()
    close_portal()


@pytest.fixture
def interrupt_with():
    """`interrupt_with(exc)` makes SIGUSR1 raise *exc* in the main thread, as Celery's signals do."""
    before = signal.getsignal(signal.SIGUSR1)

    def arm(exc):
        def handler(*_):
            raise exc

        signal.signal(signal.SIGUSR1, handler)

    yield arm
    signal.signal(signal.SIGUSR1, before)


async def own_thread():
    return threading.get_ident()


async def interrupt_once_waiting(caller):
    """Send the signal as soon as the calling thread waits."""
    waiting = threading.Event()
    caller.run(waiting.set)
    assert await anyio.to_thread.run_sync(waiting.wait, 10)
    signal.pthread_kill(threading.main_thread().ident, signal.SIGUSR1)


def run_program(text):
    """Run *text* in an interpreter of its own, which must end by itself, and return what it printed."""
    done = subprocess.run([sys.executable, "-c", text], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


def test_a_call_gives_what_the_coroutine_returns(portal):
    async def add(a, b):
        await anyio.lowlevel.checkpoint()
        return a + b

    assert portal.call(partial(add, 2, 3)) == 5


def test_a_call_raises_what_the_coroutine_raises(portal):
    async def fail():
        raise LookupError("here")

    with pytest.raises(LookupError, match="here"):
        portal.call(fail)


def test_all_threads_of_a_process_share_one_loop(process_portal):
    found = set()
    start = threading.Barrier(8)

    def ask():
        start.wait(10)
        found.add((get_portal(), get_portal().call(own_thread)))

    threads = [threading.Thread(target=ask) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(10)
    assert len(found) == 1
    portal, loop_thread = found.pop()
    assert portal is process_portal
    assert loop_thread != threading.get_ident()


def test_a_loop_that_an_asyncio_task_has_ended_is_replaced(process_portal):
    async def leave():
        sys.exit(3)

    async def start_and_wait():
        await asyncio.create_task(leave())

    with pytest.raises((SystemExit, asyncio.CancelledError)):
        process_portal.call(start_and_wait)
    wait_until(lambda: process_portal.is_broken, what="the loop to end")
    assert get_portal() is not process_portal
    assert get_portal().call(own_thread)


def test_calls_of_several_threads_run_at_the_same_time(portal):
    barrier = threading.Barrier(4)

    async def meet():
        await anyio.to_thread.run_sync(barrier.wait, 10)

    threads = [threading.Thread(target=portal.call, args=(meet,)) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(10)
    assert not any(thread.is_alive() for thread in threads)


def test_closing_the_portal_leaves_no_thread_and_the_next_use_starts_another():
    close_portal()
    before = set(threading.enumerate())
    first = get_portal()
    assert is_running()
    assert first.call(own_thread) not in {thread.ident for thread in before}
    close_portal()
    wait_until(lambda: set(threading.enumerate()) <= before, what="the portal's thread to end")
    assert not is_running()
    close_portal()
    try:
        assert get_portal() is not first
        assert get_portal().call(own_thread)
    finally:
        close_portal()


@pytest.mark.parametrize("how", ["call", "acall"])
def test_who_calls_while_the_portal_ends_does_not_wait_for_ever(how):
    portal, answers, ends = Portal(), [], []

    async def answer():
        answers.append(1)

    async def await_it():
        while True:
            with suppress(asyncio.CancelledError):
                await portal.acall(answer)

    def acall():
        try:
            asyncio.run(await_it())
        except RuntimeError as exc:
            ends.append(str(exc))

    def call():
        while True:
            try:
                with suppress(asyncio.CancelledError):
                    portal.call(answer)
            except RuntimeError as exc:
                ends.append(str(exc))
                return

    target = call if how == "call" else acall
    threads = [threading.Thread(target=target, daemon=True) for _ in range(8)]
    for thread in threads:
        thread.start()
    wait_until(lambda: len(answers) > 100)
    portal.close()
    wait_until(lambda: len(ends) == len(threads))
    assert set(ends) <= {"The event loop has ended", "Event loop is closed"}


def test_what_was_opened_on_the_loop_is_closed_on_it_the_last_first():
    portal = Portal()
    closed = []
    loop_thread = portal.call(own_thread)

    def closer(name):
        async def close():
            closed.append((name, await own_thread()))

        return close

    portal.on_close(closer("first"))
    portal.on_close(closer("second"))
    portal.close()
    assert closed == [("second", loop_thread), ("first", loop_thread)]


def test_a_portal_ends_even_when_something_cannot_be_closed(caplog):
    before = set(threading.enumerate())
    portal = Portal()
    closed = []

    async def fail():
        raise LookupError("cannot")

    async def close():
        closed.append(True)

    portal.on_close(close)
    portal.on_close(fail)
    portal.close()
    assert closed == [True]
    assert "cannot" in caplog.text
    wait_until(lambda: set(threading.enumerate()) <= before, what="the portal's thread to end")


@pytest.mark.parametrize("interruption", [SoftTimeLimitExceeded(), SystemExit(1), KeyboardInterrupt()], ids=repr)
def test_an_interrupted_call_is_cancelled_and_the_interruption_goes_on(portal, interrupt_with, interruption):
    interrupt_with(interruption)
    caller = Caller()
    seen = []

    async def wait_for_ever():
        await interrupt_once_waiting(caller)
        try:
            await anyio.sleep_forever()
        except anyio.get_cancelled_exc_class():
            seen.append("cancelled")
            with anyio.CancelScope(shield=True):
                await anyio.sleep(0.05)
            seen.append("cleaned up")
            raise

    with pytest.raises(type(interruption)) as caught:
        portal.call(wait_for_ever, caller=caller)
    assert caught.value is interruption
    assert seen == ["cancelled", "cleaned up"]
    assert portal.call(own_thread), "the portal is usable after it"


def test_a_signal_that_does_not_wake_the_waiting_thread_is_noticed_all_the_same(portal, interrupt_with):
    interrupt_with(SoftTimeLimitExceeded())
    caller = Caller()

    async def wait_for_ever():
        waiting = threading.Event()
        caller.run(waiting.set)
        assert await anyio.to_thread.run_sync(waiting.wait, 10)
        _thread.interrupt_main(signal.SIGUSR1)  # marks it as arrived, and interrupts no wait
        await anyio.sleep_forever()

    with pytest.raises(SoftTimeLimitExceeded):
        portal.call(wait_for_ever, caller=caller)


def test_an_interruption_before_the_waiting_begins_cancels_the_call_too(portal, monkeypatch):
    runs, seen = threading.Event(), []

    def interrupt():
        assert runs.wait(10)
        raise KeyboardInterrupt

    async def wait_for_ever():
        runs.set()
        try:
            await anyio.sleep_forever()
        finally:
            seen.append("cancelled")

    hand_over = portal._loop.call_soon_threadsafe
    hold_ups = [interrupt]

    def hand_over_slowly(*args):
        hand_over(*args)
        if hold_ups:
            hold_ups.pop()()

    monkeypatch.setattr(portal._loop, "call_soon_threadsafe", hand_over_slowly)
    with pytest.raises(KeyboardInterrupt):
        portal.call(wait_for_ever)
    assert seen == ["cancelled"]


def test_a_call_that_does_not_end_holds_an_interruption_up_no_longer_than_its_clean_up(
    portal, interrupt_with, monkeypatch
):
    monkeypatch.setattr(portal_module, "CLEAN_UP_SECONDS", 0.1)
    interrupt_with(SoftTimeLimitExceeded())
    caller = Caller()
    allowed_to_end = threading.Event()

    async def be_stubborn():
        with anyio.CancelScope(shield=True):
            await interrupt_once_waiting(caller)
            await anyio.to_thread.run_sync(allowed_to_end.wait, 20)

    try:
        with pytest.raises(SoftTimeLimitExceeded):
            portal.call(be_stubborn, caller=caller)
        assert not allowed_to_end.is_set()
    finally:
        allowed_to_end.set()


def test_what_a_coroutine_asks_its_caller_to_run_runs_in_the_calling_thread_in_order(portal):
    caller = Caller()
    ran = []

    async def report():
        for step in range(5):
            caller.run(lambda step=step: ran.append((step, threading.get_ident())))
            await anyio.lowlevel.checkpoint()
        return "done"

    assert portal.call(report, caller=caller) == "done"
    assert ran == [(step, threading.get_ident()) for step in range(5)]


@pytest.mark.parametrize("where", ["another loop", "the loop itself"])
def test_a_coroutine_of_any_loop_awaits_what_the_loop_runs(portal, where):
    variable = ContextVar("variable", default="not set")

    async def work():
        await checkpoint()
        return await own_thread(), variable.get()

    async def fail():
        raise LookupError("on the loop")

    async def use():
        variable.set("set")
        with pytest.raises(LookupError, match="on the loop"):
            await portal.acall(fail)
        return await portal.acall(work)

    outcome = asyncio.run(use()) if where == "another loop" else portal.call(use)
    assert outcome == (portal.call(own_thread), "set")


@pytest.mark.parametrize("where", ["another loop", "the loop itself"])
def test_a_coroutine_that_is_cancelled_goes_on_once_what_it_awaits_has_cleaned_up(portal, where):
    events, began = [], threading.Event()

    async def work():
        try:
            began.set()
            await anyio.sleep_forever()
        except BaseException:
            await anyio.sleep(0.01)
            events.append("cleaned up")
            raise

    async def use():
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(portal.acall, work)
            assert await anyio.to_thread.run_sync(began.wait, 10)
            tasks.cancel_scope.cancel()
        events.append("goes on")

    asyncio.run(use()) if where == "another loop" else portal.call(use)
    assert events == ["cleaned up", "goes on"]


def test_other_coroutines_of_a_loop_run_while_one_awaits_the_portal(portal):
    async def use():
        met = [threading.Event(), threading.Event()]

        async def meet(mine, others):
            mine.set()
            assert await anyio.to_thread.run_sync(others.wait, 10)

        await asyncio.gather(portal.acall(partial(meet, *met)), portal.acall(partial(meet, *reversed(met))))

    asyncio.run(use())


def test_an_error_of_what_the_caller_runs_cancels_the_call(portal):
    caller = Caller()
    seen = []

    def fail():
        raise LookupError("in the callback")

    async def report():
        caller.run(fail)
        try:
            await anyio.sleep_forever()
        finally:
            seen.append("cancelled")

    with pytest.raises(LookupError, match="in the callback"):
        portal.call(report, caller=caller)
    assert seen == ["cancelled"]


def test_an_error_of_what_an_awaiting_caller_runs_cancels_the_call(portal):
    ran, seen = [], []

    def fail():
        raise LookupError("in the callback")

    async def use():
        caller = AwaitingCaller()

        async def report():
            caller.run(lambda: ran.append(threading.current_thread()))
            caller.run(fail)
            try:
                await anyio.sleep_forever()
            finally:
                seen.append("cancelled")

        with pytest.raises(LookupError, match="in the callback"):
            await portal.acall(report, caller)

    asyncio.run(use())
    assert (ran, seen) == ([threading.current_thread()], ["cancelled"])


def test_a_thread_that_runs_a_loop_is_told_from_one_that_does_not(portal):
    async def ask():
        return in_loop_thread()

    assert not in_loop_thread()
    assert anyio.run(ask)
    assert portal.call(ask)


FORK = """
import os, threading
from mcp_celery import portal as module

async def own_thread():
    return threading.get_ident()

parents = module.get_portal()
parents.call(own_thread)
held, release = threading.Event(), threading.Event()
def hold():
    with module._lock:
        held.set()
        release.wait(30)
holder = threading.Thread(target=hold)
holder.start()
held.wait(10)
child = os.fork()
if not child:
    assert not module.is_running()
    own = module.get_portal()
    assert own is not parents and own is module.get_portal()
    own.call(own_thread)
    module.close_portal()
    print("child", flush=True)
    os._exit(0)
release.set()
holder.join(10)
assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
assert module.get_portal() is parents
parents.call(own_thread)
print("parent")
"""


def test_a_forked_child_gets_a_loop_of_its_own_and_the_parent_keeps_its():
    assert run_program(FORK) == ["child", "parent"]


def test_a_script_that_used_the_loop_ends_by_itself():
    program = """
from mcp_celery.portal import get_portal
async def closed():
    print("closed")
async def used():
    print("used")
get_portal().on_close(closed)
get_portal().call(used)
"""
    assert run_program(program) == ["used", "closed"]


def test_importing_starts_no_thread_and_loads_no_event_loop():
    program = """
import sys, threading
import mcp_celery.portal, mcp_celery.sync_session
assert threading.active_count() == 1
print(*{"anyio", "asyncio", "mcp", "httpx2"} & sys.modules.keys(), "end")
"""
    assert run_program(program) == ["end"]


GREEN = """
from gevent import monkey
monkey.patch_all()
import asyncio, queue, socket, threading
import anyio, gevent
from mcp_celery.portal import Caller, Portal, close_portal, get_portal, in_loop_thread
from mcp_celery.threads import aside

seen = []

async def wait_for_ever():
    seen.append("runs")
    try:
        await anyio.sleep_forever()
    finally:
        with anyio.CancelScope(shield=True):
            await anyio.sleep(0.02)
        seen.append("cleaned")

async def fail():
    raise LookupError("here")
"""


def run_green(text):
    """Run *text* in a process that gevent has patched."""
    return run_program(GREEN + text)


def test_greenlets_go_on_while_others_wait_for_the_loop():
    program = """
meeting = []
async def meet():
    meeting.append(1)
    while len(meeting) < 50:
        await anyio.sleep(0.001)
    return threading.get_ident()
with gevent.Timeout(20):
    found = {each.get() for each in [gevent.spawn(get_portal().call, meet) for _ in range(50)]}
print(len(found), threading.get_ident() in found, in_loop_thread())
close_portal()
"""
    assert run_green(program) == ["1", "False", "False"]


def test_an_interrupted_greenlet_cancels_its_call():
    program = """
def call():
    try:
        get_portal().call(wait_for_ever)
    except BaseException as exc:
        seen.append(type(exc).__name__)
        raise
killed = gevent.spawn(call)
with gevent.Timeout(10):
    while not seen:
        gevent.sleep(0.001)
killed.kill()
with gevent.Timeout(10):
    try:
        with gevent.Timeout(0.2):
            call()
    except gevent.Timeout:
        print(*seen)
    try:
        get_portal().call(fail)
    except LookupError as exc:
        print(exc)
"""
    interrupted = [["runs", "cleaned", how] for how in ("GreenletExit", "Timeout")]
    assert run_green(program) == [*interrupted[0], *interrupted[1], "here"]


def test_what_would_block_the_loop_runs_in_a_greenlet_among_the_others():
    program = """
here = threading.get_native_id()
def block():
    gevent.sleep(0.01)
    return threading.get_native_id() == here
async def ask():
    print(await aside(block))
    try:
        await aside([].pop)
    except IndexError:
        print("raised")
    found = await asyncio.get_running_loop().getaddrinfo("localhost", 80, type=socket.SOCK_STREAM)
    print(bool(found))
    for _ in range(2):
        print(await asyncio.wait_for(asyncio.to_thread(block), 5))
get_portal().call(ask)
"""
    assert run_green(program) == ["True", "raised", "True", "True", "True"]


def test_eventlet_is_refused():
    program = """
import eventlet
eventlet.monkey_patch()
from mcp_celery import ConfigurationError
from mcp_celery.portal import get_portal
try:
    get_portal()
except ConfigurationError as exc:
    print(exc)
"""
    assert "eventlet:" in run_program(program)
