"""What a worker's main process shows of MCP tasks: requests and log lines without the session IDs in them."""

import logging
import re
from typing import Any

from billiard.exceptions import WorkerLostError
from celery.app.task import Context
from celery.worker.request import Request

from . import results  # noqa: F401 - hooks into Celery's backends, in workers only
from .known_tasks import settings_of_journal
from .progress import EVENTS
from .unexecuted import bind_errbacks, never_runs, release_journal
from .workflow import KEY, Given, redacted, shown

#: Celery prints whole messages there: at DEBUG what goes to the pool, at ERROR a message whose task is not registered.
_MESSAGE_LOGGERS = ("celery.pool", "celery.worker.consumer.consumer")
_FROM_HANDLE_ON = re.compile(rf"{KEY}.*", re.DOTALL)


class MCPRequest(Request):
    """A worker's request whose arguments, as `celery inspect` and results show them, hold no session ID."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._kwargs: dict[str, Any]
        self.mcp_session = Given(self._kwargs.get(KEY))
        if (kwargs := redacted(self._kwargs)) is not self._kwargs:
            # What a publisher that does not know the task has put there shows a handle whole.
            self._kwargsrepr = self._request_dict["kwargsrepr"] = shown(self._kwargs)
            self._kwargs = self._request_dict["kwargs"] = kwargs
        self._request_dict[EVENTS] = self._sends_events()

    def _sends_events(self) -> bool:
        """Whether events of the task are sent: by the option -E, or since somebody has asked the worker for them."""
        dispatcher = self._eventer
        if dispatcher is None or not dispatcher.enabled or not self.task.send_events:
            return False
        return not dispatcher.groups or "task" in dispatcher.groups

    @property
    def _context(self) -> Context:
        """The context of failures and retries in the main process, which resume the session."""
        context = self.__dict__.get("mcp_context")
        if context is None:
            context = self.mcp_context = super()._context
            context.kwargs = {key: value for key, value in context.kwargs.items() if key != KEY}
            context.mcp_session = self.mcp_session
        return context

    def on_failure(self, exc_info: Any, *args: Any, **kwargs: Any) -> Any:
        """Give the sessions of a task whose process is gone to its errbacks."""
        # Billiard may have put the exception into one that carries its traceback.
        exc = getattr(exc_info.exception, "exc", exc_info.exception)
        if isinstance(exc, WorkerLostError | SystemExit):
            bind_errbacks(self.task, self._context)
            if self.worker_pid is not None:
                release_journal(self.task, self._context, self.worker_pid)
        # Celery 5.6 sends task_failure of it without its request.
        self.task.request_stack.push(self._context)
        try:
            return super().on_failure(exc_info, *args, **kwargs)
        finally:
            self.task.request_stack.pop()

    def _success_was_stored(self) -> Any:
        """Whether Celery takes a task whose process is gone for one that has succeeded, and drops its message.

        Its result is stored before the chord that waits for it is told, and nobody tells that then. A durable task runs
        again instead: it repeats no calls, and a chord does not count it twice.
        """
        runs_again = self.task.acks_late and self.task.reject_on_worker_lost
        if runs_again and self._context.chord and settings_of_journal(self.task) is not None:
            return False
        return super()._success_was_stored()

    def on_timeout(self, soft: bool, timeout: float) -> None:
        """See to the sessions of a task that a hard time limit has ended; Celery says nothing of its request."""
        if not soft:
            bind_errbacks(self.task, self._context)
        super().on_timeout(soft, timeout)
        # Celery 5.6 has one option for both.
        acks = getattr(self.task, "acks_on_timeout", None)
        is_requeued = self.task.acks_late and not (self.task.acks_on_failure_or_timeout if acks is None else acks)
        if not soft and not is_requeued:
            never_runs(self.task, self._context)


def _cut_handles(record: logging.LogRecord) -> bool:
    text = record.getMessage()
    if KEY in text:
        record.msg, record.args = _FROM_HANDLE_ON.sub(f"{KEY} ... (left out: it holds a session ID)", text), ()
    return True


for _name in _MESSAGE_LOGGERS:
    logging.getLogger(_name).addFilter(_cut_handles)
