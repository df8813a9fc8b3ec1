"""Greenlets in the place of threads, where gevent has patched the standard library.

Imported in such processes only.
"""

import asyncio
import queue
from collections import deque
from collections.abc import Callable
from concurrent.futures import Executor
from contextlib import suppress
from contextvars import copy_context
from functools import partial
from typing import Any, TypeVar, TypeVarTuple

import anyio
import gevent
import gevent.event
import gevent.monkey

from .threads import Inbox, Threads

T = TypeVar("T")
Ts = TypeVarTuple("Ts")


class Greenlets(Threads):
    """Those of gevent. Here a thread of the operating system is the exception: the event loop has one."""

    # Where a greenlet waits, the hub notices signals, and throws what comes of them.
    patience_seconds = None

    def __init__(self) -> None:
        self._hub = gevent.get_hub()

    def start(self, function: Callable[[], None], name: str) -> Callable[[], object]:  # noqa: ARG002 - it goes unnamed
        """Run *function* in a new thread of the operating system; return what waits for its end."""
        ended = self.new_inbox()

        def run() -> None:
            try:
                function()
            finally:
                # Locks and sockets have made one for this thread, if they were used.
                gevent.get_hub().destroy(destroy_loop=True)
                ended.put(None)

        gevent.monkey.get_original("_thread", "start_new_thread")(run, ())
        return partial(ended.get, timeout=None)

    def new_inbox(self) -> Inbox:
        """Return an inbox for the calling greenlet."""
        return GreenInbox()

    def new_loop(self) -> asyncio.AbstractEventLoop:
        """Return an event loop for the calling thread, which was started by `start`."""
        return LoopBesideGreenlets(self._hub)


class GreenInbox:
    """A queue that any thread may fill, for greenlets of the thread that made it."""

    def __init__(self) -> None:
        self._items: deque[Any] = deque()
        self._arrived = gevent.event.Event()
        #: The one thing of a hub that other threads may use.
        self._bell = gevent.get_hub().loop.async_()

    def put(self, item: Any, /) -> None:
        """Put *item* in. Does not block."""
        self._items.append(item)
        self._bell.send()

    def get(self, *, timeout: float | None) -> Any:
        """Return the next item, once there is one.

        Raises:
            queue.Empty: There was none for *timeout* seconds.
        """
        self._bell.start(self._arrived.set)  # before a look at the items: what arrives later is heard
        try:
            while not self._items:
                self._arrived.clear()
                if not self._items and not self._arrived.wait(timeout):
                    raise queue.Empty
            return self._items.popleft()
        finally:
            self._bell.stop()


class LoopBesideGreenlets(asyncio.SelectorEventLoop):
    """An event loop that blocks its thread where it has nothing to do, and starts no threads, which were greenlets.

    Args:
        hub: Where greenlets run what would block the loop.
    """

    def __init__(self, hub: Any) -> None:
        super().__init__(gevent.monkey.get_original("selectors", "DefaultSelector")())
        self._hub = hub

    def run_in_executor(self, executor: Executor | None, func: Callable[[*Ts], T], *args: *Ts) -> asyncio.Future[T]:
        """Run *func* in a greenlet where no executor is named: for `asyncio.to_thread`, and to look names up."""
        if executor is not None:
            return super().run_in_executor(executor, func, *args)
        return self.create_task(self.aside(func, *args))

    def start_greenlet(self, function: Callable[[], object]) -> None:
        """Run *function* in a greenlet of the hub."""
        self._hub.loop.run_callback_threadsafe(gevent.spawn, function)

    async def aside(self, function: Callable[..., Any], *arguments: Any) -> Any:
        """Run *function* in a greenlet of the hub, in the context of the caller."""
        outcome: asyncio.Future[Any] = self.create_future()
        run = partial(copy_context().run, function, *arguments)

        def tell(settle: Callable[[Any], object], value: Any) -> None:
            with suppress(RuntimeError):  # the loop was closed meanwhile
                self.call_soon_threadsafe(lambda: outcome.done() or settle(value))

        def run_and_tell() -> None:
            try:
                result = run()
            except BaseException as exc:  # noqa: BLE001 - raised again where it is waited for
                tell(outcome.set_exception, exc)
            else:
                tell(outcome.set_result, result)

        self.start_greenlet(run_and_tell)
        with anyio.CancelScope(shield=True):  # as in a thread: it is not left alone
            return await outcome
