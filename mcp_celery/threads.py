"""Threads, and what stands in for them in a process that gevent has patched.

There, "threads" are greenlets which take turns in one thread, the hub's: whoever blocks it blocks all of them. So the
event loop runs in a thread of the operating system, and greenlets wait for it as they wait for anything else.
"""

import queue
import threading
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

if TYPE_CHECKING:
    import asyncio

T = TypeVar("T")

#: How long a signal can go unnoticed that arrives in the instant before a thread begins to wait. Python runs handlers
#: between bytecodes, and a wait that has not begun is not interrupted by a signal that has already arrived.
NOTICE_SECONDS = 1.0


class Inbox(Protocol):
    """A queue that any thread may fill, for the one that asked for it."""

    def put(self, item: Any, /) -> None:
        """Put *item* in. Does not block."""

    def get(self, *, timeout: float | None) -> Any:
        """Return the next item, once there is one.

        Raises:
            queue.Empty: There was none for *timeout* seconds.
        """


class Threads:
    """Those of the operating system. See `Greenlets` for others."""

    #: How long a thread may wait for an inbox without a look around.
    patience_seconds: float | None = NOTICE_SECONDS

    def start(self, function: Callable[[], None], name: str) -> Callable[[], object]:
        """Run *function* in a new thread of the operating system; return what waits for its end."""
        thread = threading.Thread(target=function, name=name, daemon=True)
        thread.start()
        return thread.join

    def new_inbox(self) -> Inbox:
        """Return an inbox for the calling thread."""
        return queue.SimpleQueue()

    def new_loop(self) -> "asyncio.AbstractEventLoop":
        """Return an event loop for the calling thread, which was started by `start`."""
        import asyncio  # noqa: PLC0415 - a process that only publishes tasks is not to load it

        return asyncio.new_event_loop()


def start_beside(loop: "asyncio.AbstractEventLoop", function: Callable[[], object], name: str) -> None:
    """Run *function*, which may wait for *loop*, in a thread of its own; beside the loop of `Greenlets` in a greenlet.

    Runs in the loop's thread.
    """
    start = getattr(loop, "start_greenlet", None)
    if start is None:
        threading.Thread(target=function, name=name, daemon=True).start()
    else:
        start(function)


async def aside(function: Callable[..., T], *arguments: Any) -> T:
    """Run *function*, which may block, beside the event loop, in the context of the caller.

    In a thread; in a patched process in a greenlet, since sockets and locks are made for greenlets there.
    """
    import asyncio  # noqa: PLC0415 - as above

    import anyio.to_thread  # noqa: PLC0415 - as above

    beside = getattr(asyncio.get_running_loop(), "aside", anyio.to_thread.run_sync)
    result: T = await beside(function, *arguments)
    return result
