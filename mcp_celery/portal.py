"""The event loop of a process: one thread, started at the first use, and the way into it from a task's thread.

Tasks are synchronous and MCP clients are not. Each process has one portal, keyed by its PID: a child forked from a
process with a running loop has no such thread, so it gets a portal of its own. Nothing starts at import.
"""

import _thread
import atexit
import logging
import os
import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Coroutine, Generator, Iterator
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from functools import partial
from typing import TYPE_CHECKING, Any, Generic, NoReturn, TypeVar

from .exceptions import ConfigurationError
from .threads import NOTICE_SECONDS, Threads

if TYPE_CHECKING:
    import asyncio

T = TypeVar("T")

logger = logging.getLogger(__name__)

#: How long an interrupted call may take to clean up on the loop (a cancellation sent to the server, for instance).
CLEAN_UP_SECONDS = 6.0

#: Where what is started on the loop of the process, in this context, is kept until it has ended; None: nowhere.
started_tasks: "ContextVar[set[asyncio.Task[Any]] | None]" = ContextVar("mcp_celery_started_tasks", default=None)


def threads_of_this_process() -> Threads:
    """Return what this process has for threads.

    Raises:
        ConfigurationError: It has greenlets of eventlet, whose locks break where a thread of the operating system
            uses them as well: who waits for one is woken in the wrong thread, which fails, and waits for ever.
    """
    if not is_green():
        return Threads()
    patched_by = _thread.start_new_thread.__module__.partition(".")[0]
    if patched_by != "gevent":
        raise ConfigurationError(
            f"MCP tasks do not run under {patched_by}: use the worker pool prefork, threads, gevent or solo"
        )
    from .green import Greenlets  # noqa: PLC0415 - it imports gevent

    return Greenlets()


class Caller:
    """The thread or greenlet that waits in `Portal.call`, which can be asked to run something meanwhile."""

    def __init__(self) -> None:
        kind = threads_of_this_process()
        self._inbox = kind.new_inbox()
        self._patience_seconds = kind.patience_seconds
        self._is_done = False

    def run(self, function: Callable[[], object]) -> None:
        """Have *function* run in the waiting thread, soon. Runs in the loop's thread; returns at once."""
        self._inbox.put(function)

    def done(self) -> None:
        """End `serve`, after everything that was asked for before."""
        self._is_done = True  # `serve` may be interrupted once it has taken the None
        self._inbox.put(None)

    def serve(self) -> None:
        """Run what arrives, in order, until `done`. Runs in the waiting thread."""
        while True:
            try:
                function = self._inbox.get(timeout=self._patience_seconds)
            except queue.Empty:
                continue
            if function is None:
                return
            function()

    def wait(self, seconds: float) -> None:
        """Run nothing any more, and wait for `done`, *seconds* at most."""
        deadline = time.monotonic() + seconds
        with suppress(queue.Empty):
            while not self._is_done:
                self._inbox.get(timeout=max(0.0, deadline - time.monotonic()))


class AwaitingCaller:
    """The coroutine that waits in `Portal.acall`, on a loop of another thread, which can be asked to run something."""

    def __init__(self) -> None:
        import asyncio  # noqa: PLC0415 - a process that only publishes tasks is not to load it

        self._loop = asyncio.get_running_loop()
        self._jobs: deque[Callable[[], object]] = deque()
        self._woken: asyncio.Future[None] = self._loop.create_future()
        self._is_done = False

    def run(self, function: Callable[[], object]) -> None:
        """Have *function* run in the waiting coroutine, soon. From any thread; returns at once."""
        self._jobs.append(function)
        self._wake()

    def done(self) -> None:
        """End `serve`, after everything that was asked for before. From any thread."""
        self._is_done = True
        self._wake()

    async def serve(self) -> None:
        """Run what arrives, in order, until `done`."""
        while not self._is_done:
            await self._next(NOTICE_SECONDS)
            while self._jobs:
                self._jobs.popleft()()

    async def wait(self, seconds: float) -> None:
        """Run nothing any more, and wait for `done`, *seconds* at most."""
        import anyio  # noqa: PLC0415 - as above

        with anyio.move_on_after(seconds, shield=True):
            while not self._is_done:
                await self._next(None)

    async def _next(self, seconds: float | None) -> None:
        import asyncio  # noqa: PLC0415 - as above

        await asyncio.wait([self._woken], timeout=seconds)
        if self._woken.done():
            self._woken = self._loop.create_future()

    def _wake(self) -> None:
        def tell() -> None:
            if not self._woken.done():
                self._woken.set_result(None)

        with suppress(RuntimeError):  # the loop is closed: nobody waits any more
            self._loop.call_soon_threadsafe(tell)


class Callers:
    """The threads that wait for the loop on behalf of one task, and what is to be run in one of them.

    Belongs to the thread that makes it. That one goes first; of several calls within each other, the innermost. There
    is no lock: who adds something looks only then for the other side, so one of the two sees it.
    """

    def __init__(self) -> None:
        self._owner = threading.get_ident()
        self._waiting: list[tuple[int, Caller | AwaitingCaller]] = []
        self._jobs: deque[Callable[[], object]] = deque()

    @contextmanager
    def waiting(self, caller: Caller | AwaitingCaller) -> Iterator[None]:
        """While this thread waits: have *caller* run what there is to run, also what was left over before."""
        entry = threading.get_ident(), caller
        try:  # here: an interruption may come at any place
            self._waiting.append(entry)
            self._wake()
            yield
        finally:
            with suppress(ValueError):
                self._waiting.remove(entry)
            self._wake()

    @property
    def are_waiting(self) -> bool:
        """Whether a thread waits now."""
        return bool(self._waiting)

    def run(self, job: Callable[[], object]) -> None:
        """Have *job* run in a thread that waits, soon; where none does, as soon as one does. Returns at once."""
        self._jobs.append(job)
        self._wake()

    def _wake(self) -> None:
        waiting = list(self._waiting)
        own = [entry for entry in waiting if entry[0] == self._owner]
        if waiting and self._jobs:
            _, caller = (own or waiting)[-1]
            caller.run(self._work)

    def _work(self) -> None:
        while self._jobs:
            try:
                job = self._jobs.popleft()
            except IndexError:  # another thread took it
                return
            job()


class Portal:
    """One thread with one event loop."""

    def __init__(self) -> None:
        self._on_close: list[Callable[[], Coroutine[Any, Any, object]]] = []
        self._is_wanted = True
        self._end: Callable[[], object] | None = None
        self._callers: set[Caller | AwaitingCaller] = set()
        self._loop: asyncio.AbstractEventLoop
        started, kind = Caller(), threads_of_this_process()
        self._join = kind.start(partial(self._run, kind.new_loop, started), "mcp_celery")
        try:
            started.serve()
        except BaseException:
            self._stop()
            raise

    def _run(self, new_loop: "Callable[[], asyncio.AbstractEventLoop]", started: Caller) -> None:
        """Run the loop until the portal ends. Runs in the loop's thread."""
        # Here, because a process that only publishes tasks is not to load it.
        import asyncio  # noqa: PLC0415

        async def stay() -> None:
            ended = asyncio.Event()
            self._loop, self._end = asyncio.get_running_loop(), ended.set
            self._loop.set_task_factory(_new_task)
            started.done()
            if self._is_wanted:
                await ended.wait()

        try:
            with asyncio.Runner(loop_factory=new_loop) as runner:
                runner.run(stay())
        except BaseException as exc:
            if self._end is None:
                started.run(partial(_raise, exc))
            else:
                logger.exception("What ran on the event loop of the process has ended it")
        finally:
            for caller in list(self._callers):  # what they asked for came when the loop was about to end
                caller.done()

    def call(self, function: Callable[[], Coroutine[Any, Any, T]], caller: Caller | None = None) -> T:
        """Run `await function()` on the loop and wait for it. Context variables go along.

        Where the waiting thread is interrupted (SoftTimeLimitExceeded, SystemExit, KeyboardInterrupt, raised by a
        signal handler or by something that *caller* ran), the coroutine is cancelled and given `CLEAN_UP_SECONDS`
        to end; then the interruption goes on.

        Raises:
            RuntimeError: The loop has ended meanwhile, or before.
        """
        caller = caller or Caller()
        run = _Run(self, function, caller)
        try:
            self._callers.add(caller)
            # Within: the loop may run, and the interruption come, before this thread goes on.
            self._loop.call_soon_threadsafe(run.begin)
            caller.serve()
        except BaseException:
            with suppress(RuntimeError):  # the loop is closed
                self._loop.call_soon_threadsafe(run.cancel)  # in the loop's queue after begin, if that is there
                caller.wait(CLEAN_UP_SECONDS)
            raise
        finally:
            self._callers.discard(caller)
        return run.result()

    async def acall(self, function: Callable[[], Coroutine[Any, Any, T]], caller: "AwaitingCaller | None" = None) -> T:
        """Run `await function()` on the loop and await it, from a coroutine of any loop. Context variables go along.

        Where the waiting coroutine is cancelled or otherwise interrupted (also by something that *caller* ran), that of
        the loop is cancelled and given `CLEAN_UP_SECONDS` to end; then the interruption goes on.

        Raises:
            RuntimeError: As above.
        """
        caller = caller or AwaitingCaller()
        run = _Run(self, function, caller)
        try:
            self._callers.add(caller)
            self._loop.call_soon_threadsafe(run.begin)  # within, as above
            await caller.serve()
        except BaseException:
            with suppress(RuntimeError):
                self._loop.call_soon_threadsafe(run.cancel)
                await caller.wait(CLEAN_UP_SECONDS)
            run.forget()
            raise
        finally:
            self._callers.discard(caller)
        return run.result()

    @property
    def is_wanted(self) -> bool:
        """Whether what is handed over may begin: the portal is not being closed."""
        return self._is_wanted

    def new_task(self, coroutine: Coroutine[Any, Any, T]) -> "asyncio.Task[T]":
        """Start *coroutine* on the loop, for who waits for it elsewhere. Runs on the loop."""
        started_tasks.set(None)  # a callback has a context of its own: who waits for the task ends it
        return self._loop.create_task(coroutine)

    @property
    def is_broken(self) -> bool:
        """Whether the loop has ended by itself: `sys.exit` in an asyncio task ends it, with all that runs on it."""
        return self._loop.is_closed()

    def is_current(self) -> bool:
        """Whether the calling thread is that of the loop, where to wait for the loop would be a deadlock."""
        return _running_loop() is self._loop

    def on_close(self, function: Callable[[], Coroutine[Any, Any, object]]) -> None:
        """Have `await function()` run on the loop when the portal closes; the last added first."""
        self._on_close.append(function)

    def close(self) -> None:
        """Run what was added by `on_close`, then end the loop and its thread."""
        try:
            while self._on_close:
                try:
                    self.call(self._on_close.pop())
                except Exception:
                    logger.exception("Closing what used the event loop")
        finally:
            self._stop()
            self._join()

    def _stop(self) -> None:
        """Have the loop end, and its thread; what runs on it still is cancelled."""
        self._is_wanted = False
        if self._end is not None:
            self._loop.call_soon_threadsafe(self._end)


class _Run(Generic[T]):
    """A coroutine that is handed over to the loop by *caller*, who waits for its end."""

    def __init__(
        self, portal: Portal, function: Callable[[], Coroutine[Any, Any, T]], caller: Caller | AwaitingCaller
    ) -> None:
        self._portal = portal
        self._function = function
        self._caller = caller
        self._task: asyncio.Task[T] | None = None

    def begin(self) -> None:
        """Start it. Runs on the loop."""
        if not self._portal.is_wanted:
            self._caller.done()
            return
        self._task = self._portal.new_task(self._function())
        self._task.add_done_callback(lambda _: self._caller.done())

    def cancel(self) -> None:
        """Cancel it, if it has begun. Runs on the loop."""
        if self._task is not None:
            self._task.cancel()
        else:
            self._caller.done()

    def forget(self) -> None:
        """Leave its outcome, whatever that is."""
        if self._task is not None and self._task.done() and not self._task.cancelled():
            self._task.exception()  # mark as retrieved

    def result(self) -> T:
        """Return what it has returned, or raise what it has raised.

        Raises:
            RuntimeError: The loop has ended before it.
        """
        if self._task is None or not self._task.done():
            raise RuntimeError("The event loop has ended")
        return self._task.result()


def _raise(exc: BaseException) -> NoReturn:
    raise exc


def _new_task(
    loop: "asyncio.AbstractEventLoop", coroutine: "Coroutine[Any, Any, T] | Generator[Any, None, T]", **options: Any
) -> "asyncio.Task[T]":
    import asyncio  # noqa: PLC0415 - as above

    task = asyncio.Task(coroutine, loop=loop, **options)
    if (started := started_tasks.get()) is not None:
        started.add(task)
        task.add_done_callback(started.discard)
    return task


_lock = threading.Lock()
_portals: dict[int, Portal] = {}


def _renew_lock() -> None:
    """In a forked child: a thread of the parent may have held the lock.

    The parent's portal stays in the table. It is never used here, and collecting it would close the parent's loop.
    """
    global _lock  # noqa: PLW0603 - a lock cannot be reset in place
    _lock = threading.Lock()


os.register_at_fork(after_in_child=_renew_lock)


def get_portal() -> Portal:
    """Return the portal of this process, started on the first call, and again where its loop has broken."""
    with _lock:
        portal = _portals.get(os.getpid())
        if portal is None or portal.is_broken:
            portal = _portals[os.getpid()] = Portal()
            # For scripts and tests that call tasks as functions; workers have signals.
            atexit.register(close_portal)
        return portal


def close_portal() -> None:
    """End the portal of this process, if it has one. The next `get_portal` starts another."""
    with _lock:
        portal = _portals.pop(os.getpid(), None)
    if portal is not None:
        atexit.unregister(close_portal)
        portal.close()


def is_running() -> bool:
    """Whether this process has a portal now."""
    return os.getpid() in _portals


def is_on_loop() -> bool:
    """Whether the calling thread runs the loop of this process."""
    portal = _portals.get(os.getpid())
    return portal is not None and portal.is_current()


def in_loop_thread() -> bool:
    """Whether the calling thread runs an event loop, where waiting for the portal would be a deadlock."""
    return _running_loop() is not None


def _running_loop() -> "asyncio.AbstractEventLoop | None":
    import asyncio  # noqa: PLC0415 - as above

    try:
        return asyncio.get_running_loop()
    except RuntimeError:
        return None


def is_green() -> bool:
    """Whether greenlets stand in for threads."""
    return _thread.start_new_thread.__module__ != _thread.__name__
