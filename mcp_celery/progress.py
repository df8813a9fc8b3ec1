"""What servers report of their progress, as the state of the task: `PROGRESS`, for `AsyncResult` and Flower."""

import logging
import math
import time
from collections import deque
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any, Protocol

from billiard.exceptions import SoftTimeLimitExceeded
from celery.states import READY_STATES

from .portal import Callers

if TYPE_CHECKING:
    from mcp.shared.dispatcher import ProgressFnT

logger = logging.getLogger(__name__)

STATE = "PROGRESS"
#: The attribute of a request that says whether its worker sends events of tasks: the process of the task does not know.
EVENTS = "mcp_events"
#: A result backend that did not take a state is left alone for so long: each attempt may hold up the task.
PAUSE_SECONDS = 60.0


class Call(Protocol):
    """A call under way."""

    @property
    def has_ended(self) -> bool:
        """Whether it is under way no more."""
        ...


class TaskProgress:
    """Writes the progress of an execution's calls into the state of its task, one at a time, in the task's thread.

    It runs only while that thread waits for a call, so never after the task has ended.

    Args:
        task: The task.
        request: Its execution.
        callers: The threads that wait for its calls.
        interval_seconds: How often at most; 0 for each report.
        current_call: Returns the call to which a report belongs.
        is_superseded: Whether another execution has taken over. Runs in the task's thread.
    """

    def __init__(
        self,
        task: Any,
        request: Any,
        callers: Callers,
        *,
        interval_seconds: float,
        current_call: Callable[[], Call | None],
        is_superseded: Callable[[], bool],
    ) -> None:
        self._task = task
        self._request = request
        self._callers = callers
        self._interval_seconds = interval_seconds
        self._current_call = current_call
        self._is_superseded = is_superseded
        self._latest: deque[tuple[dict[str, Any], Call | None]] = deque(maxlen=1)
        self._is_awaited = False
        self._is_due = -math.inf
        #: When the result backend may be tried again; None where it has not failed.
        self._paused_until: float | None = None

    def of(self, tool: str) -> "ProgressFnT":
        """Return what takes the progress of a call of *tool*, on the event loop."""

        async def report(progress: float, total: float | None = None, message: str | None = None) -> None:
            meta = {"progress": progress, "total": total, "message": message, "tool": tool}
            self._take(meta, self._current_call())

        return report

    def _take(self, meta: dict[str, Any], call: Call | None) -> None:
        import asyncio  # noqa: PLC0415 - a process that only publishes tasks is not to load it

        if not self._interval_seconds:
            self._callers.run(partial(self._store, meta, call))
            return
        self._latest.append((meta, call))
        if not self._is_awaited:  # else it goes along when the time has come
            self._is_awaited = True
            delay = max(0.0, self._is_due - time.monotonic())
            asyncio.get_running_loop().call_later(delay, self._callers.run, self._store_latest)

    def _store_latest(self) -> None:
        self._is_awaited = False  # first: what the loop adds from here on, it has looked at by itself
        if self._latest:
            self._is_due = time.monotonic() + self._interval_seconds
            self._store(*self._latest.pop())

    def _store(self, meta: dict[str, Any], call: Call | None) -> None:
        if (call is not None and call.has_ended) or self._is_superseded():
            return
        if self._paused_until is not None and time.monotonic() < self._paused_until:
            return
        what = "the result backend"
        try:
            if self._has_ended_elsewhere():
                return
            self._task.update_state(task_id=self._request.id, state=STATE, meta=meta)
            what = "the broker"
            self._send_event(meta)
        except SoftTimeLimitExceeded:
            raise
        except Exception as exc:  # noqa: BLE001 - backends raise what their drivers raise
            if self._paused_until is None:
                logger.warning(
                    "The progress of task %s[%s] is not shown: %s has failed (%s)",
                    self._task.name,
                    self._request.id,
                    what,
                    type(exc).__name__,
                )
            self._paused_until = time.monotonic() + PAUSE_SECONDS

    def _send_event(self, meta: dict[str, Any]) -> None:
        """Tell monitors, where the worker tells them of its tasks. Flower shows the state, and a text as the result."""
        if not vars(self._request).get(EVENTS):
            return
        with self._task.app.events.default_dispatcher(hostname=self._request.hostname) as dispatcher:
            dispatcher.send(f"task-{STATE.lower()}", uuid=self._request.id, result=_text_of(meta), **meta)

    def _has_ended_elsewhere(self) -> bool:
        """Whether the task has a final state: its time limit has struck, or a copy of its message was executed.

        With rpc:// nobody can know: reading would take the state from who waits for it. Elsewhere it is read, and then
        written: a final state that comes in between is written over.
        """
        from celery.backends.rpc import RPCBackend  # noqa: PLC0415 - as above

        backend = self._task.backend
        if isinstance(backend, RPCBackend):
            return False
        return backend.get_task_meta(self._request.id, cache=False)["status"] in READY_STATES


def _text_of(meta: dict[str, Any]) -> str:
    amount = f"{meta['progress']:g}" if meta["total"] is None else f"{meta['progress']:g}/{meta['total']:g}"
    return f"{amount} {meta['message'] or ''}".rstrip()


def has_state(task: Any, request: Any) -> bool:
    """Whether an execution has a state that others can look at."""
    from celery.backends.base import DisabledBackend  # noqa: PLC0415 - as above

    if not request.id or request.called_directly or isinstance(task.backend, DisabledBackend):
        return False
    if request.is_eager and not task.store_eager_result:
        return False
    ignores = vars(request).get("ignore_result")
    return not (task.ignore_result if ignores is None else ignores)
