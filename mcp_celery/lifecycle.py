"""What Celery's signals tell of tasks: arguments to take handles out of, and ends that no task function sees."""

import threading
from typing import Any

from billiard.exceptions import Terminated, TimeLimitExceeded, WorkerLostError
from celery import Task
from celery.signals import (
    after_task_publish,
    task_failure,
    task_internal_error,
    task_postrun,
    task_prerun,
    task_revoked,
    worker_process_init,
    worker_process_shutdown,
    worker_shutdown,
)
from celery.states import IGNORED, REJECTED
from kombu.exceptions import EncodeError

from .execution import Execution, execution_of
from .known_tasks import brought_by, canvas_of, is_mcp_task
from .portal import close_portal
from .unexecuted import REFUSED, never_runs
from .workflow import KEY, MAPS, Carried, Given, carried

#: What a worker's main process says of a task whose own process is gone, or was ended by it.
_FAILED_FROM_OUTSIDE = (Terminated, TimeLimitExceeded, WorkerLostError)


class _Last(threading.local):
    """The task that runs in this thread, or ran last.

    Where publishing what follows has failed, Celery has taken its request away by the time it says so.
    """

    def __init__(self) -> None:
        self.request: Any = None
        #: Whether a message was sent since it began, or since its sessions were passed on.
        self.has_published = False
        #: Whether it failed outside of its own code.
        self.is_internal_error = False


_last = _Last()


@task_prerun.connect
def _take_handles(task: Task, kwargs: dict[str, Any], **_: object) -> None:
    """Take the handles out of the arguments before anything else sees them: results hold arguments too.

    Celery sends this with the very mapping that it calls the function with and stores.
    """
    _last.request, _last.has_published, _last.is_internal_error = task.request, False, False
    if is_mcp_task(task):
        task.request.mcp_session = Given(kwargs.pop(KEY, None))
    elif task.name in MAPS:
        _begin_mapping(task, kwargs)


def _begin_mapping(task: Task, kwargs: dict[str, Any]) -> None:
    """Have all items of a list share one execution."""
    mapped = kwargs["task"]
    if is_mcp_task(task.app.tasks.get(mapped["task"])):
        task.request.mcp_session = Given((mapped.get("kwargs") or {}).pop(KEY, None))
        mcp_task, canvas = task.app.tasks[mapped["task"]], canvas_of(task.app)
        execution = Execution(mcp_task, task.request, brought_by(task.request), canvas)
        task.request.mcp_execution = execution
        execution.begin_mapping()


@task_postrun.connect
def _end_execution(task: Task, state: str | None, retval: object, **_: object) -> None:
    execution = execution_of(task.request)
    if execution is None:
        return
    if task.name in MAPS:
        try:
            execution.leave("done" if state == "SUCCESS" else "failed")
        finally:
            execution.release()
    # What follows was published, and the result is stored: the message can only come back to be ignored.
    execution.end_journal(state, is_requeued=bool(getattr(retval, "requeue", False)))


@task_postrun.connect
def _end_what_was_carried_past_in_silence(task: Task, state: str | None, retval: object, **_: object) -> None:
    """As `_end_what_was_carried_past`, where a plain task has raised `Ignore` or `Reject`, of which no signal tells."""
    if execution_of(task.request) is not None:
        return
    if state == IGNORED and not _last.has_published:  # else it was replaced, or may have been
        _end_carried(task, task.request, are_errbacks_called=False)
    elif state == REJECTED and not getattr(retval, "requeue", False):
        _end_carried(task, task.request)


@after_task_publish.connect
def _note_publishing(**_: object) -> None:
    if not _last.is_internal_error:  # else an errback
        _last.has_published = True


@task_internal_error.connect
def _note_internal_error(**_: object) -> None:
    _last.is_internal_error = True


@task_failure.connect
def _end_what_was_carried_past(sender: Task, task_id: str, exception: BaseException, **_: object) -> None:
    """End the sessions that were bound to tasks which will never run.

    A plain task has failed, and sessions were bound past it; or an MCP task has bound its sessions, and what follows
    could then not be published.
    """
    request = sender.request if sender.request.id == task_id else _last.request
    if request is None or request.id != task_id:
        return  # a hard time limit: `MCPRequest` sees to it
    if isinstance(exception, _FAILED_FROM_OUTSIDE):
        never_runs(sender, request)
        return
    execution = execution_of(request)
    if execution is not None and not execution.is_settled:
        return
    is_about_publishing = _last.is_internal_error or isinstance(exception, EncodeError)
    is_refused = isinstance(exception, REFUSED) and not _last.has_published
    if is_about_publishing and not is_refused:
        return  # What was published, or may have been, holds its sessions; the rest ends with the deadline.
    _end_carried(sender, request)


def _end_carried(task: Task, request: Any, *, are_errbacks_called: bool = True) -> None:
    canvas = canvas_of(task.app)
    hopeless = canvas.hopeless_after(request)
    # Where Celery does not hear of the end, a chord never ends, and calls no errbacks, whoever else fails.
    untold = [*hopeless.untold, *(() if are_errbacks_called else hopeless.errbacks)]
    never = carried([*hopeless.tasks, *untold])
    errbacks = [*canvas.errbacks_of(request), *hopeless.errbacks] if are_errbacks_called else []
    instead = {handle.key: holders for handle, holders in carried(errbacks)}
    for handle, holders in never:
        ending = Execution(task, request, Carried(), canvas)
        try:
            ending.end_carried(handle, holders, instead.get(handle.key, {}))
        finally:
            ending.release()


@task_revoked.connect
def _let_go_of_revoked(sender: Task, request: Any, **_: object) -> None:
    """In a worker's main process. Expired tasks too, and those that were terminated; for none is an errback called."""
    never_runs(sender, request, are_errbacks_called=False)


@worker_process_init.connect
def _hide_handles_in_results(**_: object) -> None:
    """In a process of the pool that was not forked: the worker's main process has done so."""
    from . import results  # noqa: F401, PLC0415 - hooks into Celery's backends


@worker_process_shutdown.connect
@worker_shutdown.connect
def _close_portal(**_: object) -> None:
    close_portal()
