"""The event loop of a process: one thread, started at the first use, and the way into it from a task's thread.

Tasks are synchronous and MCP clients are not. Each process has one portal, keyed by its PID: a child forked from a
process with a running loop has no such thread, so it gets a portal of its own. Nothing starts at import.
"""

import atexit
import os
import queue
import threading
from collections.abc import Awaitable, Callable
from contextlib import ExitStack
from typing import TYPE_CHECKING, TypeVar, TypeVarTuple

if TYPE_CHECKING:
    from concurrent.futures import Future

T = TypeVar("T")
Ts = TypeVarTuple("Ts")

#: How long an interrupted call may take to clean up on the loop (a cancellation sent to the server, for instance).
CLEAN_UP_SECONDS = 6.0


class Caller:
    """The thread that waits in `Portal.call`, which can be asked to run something meanwhile."""

    def __init__(self) -> None:
        self._inbox: queue.SimpleQueue[Callable[[], object] | None] = queue.SimpleQueue()

    def run(self, function: Callable[[], object]) -> None:
        """Have *function* run in the waiting thread, soon. Runs in the loop's thread; returns at once."""
        self._inbox.put(function)

    def serve(self) -> None:
        """Run what arrives, in order, until `done`. Runs in the waiting thread."""
        while (function := self._inbox.get()) is not None:
            function()

    def done(self) -> None:
        """End `serve`, after everything that was asked for before."""
        self._inbox.put(None)


class Portal:
    """One thread with one event loop."""

    def __init__(self) -> None:
        from anyio.from_thread import start_blocking_portal  # noqa: PLC0415 - publishing a task must not load anyio

        self._stack = ExitStack()
        self._portal = self._stack.enter_context(start_blocking_portal("asyncio", name="mcp_celery"))
        self._on_close: list[Callable[[], Awaitable[object]]] = []

    def call(self, function: Callable[[*Ts], Awaitable[T]], *args: *Ts, caller: Caller | None = None) -> T:
        """Run `await function(*args)` on the loop and wait for it.

        Where the waiting thread is interrupted (SoftTimeLimitExceeded, SystemExit, KeyboardInterrupt, raised by a
        signal handler or by something that *caller* ran), the coroutine is cancelled and given `CLEAN_UP_SECONDS`
        to end; then the interruption goes on.
        """
        caller = caller or Caller()
        ended = threading.Event()

        async def run() -> T:
            try:
                return await function(*args)
            finally:
                ended.set()

        future: Future[T] | None = None
        try:
            future = self._portal.start_task_soon(run)
            future.add_done_callback(lambda _: caller.done())
            caller.serve()
            return future.result()
        except BaseException:
            if future is not None and not future.done():
                future.cancel()
                ended.wait(CLEAN_UP_SECONDS)
            raise

    def on_close(self, function: Callable[[], Awaitable[object]]) -> None:
        """Have `await function()` run on the loop when the portal closes; the last added first."""
        self._on_close.append(function)

    def close(self) -> None:
        """Run what was added by `on_close`, then end the loop and its thread."""
        try:
            while self._on_close:
                self.call(self._on_close.pop())
        finally:
            self._portal.call(self._portal.stop, True)
            self._stack.close()


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
    """Return the portal of this process, started on the first call."""
    with _lock:
        portal = _portals.get(os.getpid())
        if portal is None:
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


def in_loop_thread() -> bool:
    """Whether the calling thread runs an event loop, where waiting for the portal would be a deadlock."""
    import asyncio  # noqa: PLC0415 - a publisher does not need it

    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return False
    return True
