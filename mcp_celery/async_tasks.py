"""Tasks with a coroutine function. What runs their coroutines is loaded at the first of them."""

import inspect
import typing
from collections.abc import Callable, Mapping
from contextvars import ContextVar
from functools import cache
from types import MappingProxyType
from typing import Any

from .portal import in_loop_thread, is_on_loop

#: By name of the task: the requests of the executions that this context belongs to. Celery keeps requests by thread,
#: and all coroutines of a process share one.
_requests: ContextVar[Mapping[str, Any]] = ContextVar("mcp_celery_requests", default=MappingProxyType({}))


class InTaskThread(Exception):  # noqa: N818 - ends a coroutine, as Celery's Retry and Ignore do
    """Raised in a coroutine that ends by what can only be done in the thread of its task."""

    def __init__(self, act: Callable[[], Any]) -> None:
        super().__init__("the task goes on in its own thread")
        self.act = act


def request_in_context(task_name: str) -> Any:
    """Return the request of a task whose execution this context belongs to; None where there is none."""
    return _requests.get().get(task_name)


def call_function(task: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Call the function of *task*, for an execution; a coroutine runs to its end on the process's event loop."""
    original = vars(task).get("_orig_run")
    if original is not None and not isinstance(original, _Finishing):
        # Under autoretry_for, `run` has to see what the coroutine raises, and so the function it calls has to wait.
        task._orig_run = _Finishing(task, original)  # noqa: SLF001 - Celery's name for it
    # Not for coroutines alone: a plain function may have methods that answer its servers on the event loop.
    before = _requests.set({**_requests.get(), task.name: task.request})
    try:
        return _finished(task, task.run(*args, **kwargs))
    finally:
        _requests.reset(before)


def defer(act: Callable[[], Any]) -> None:
    """End the coroutine that this is called in by *act*, which may wait for the event loop; elsewhere do nothing."""
    if is_on_loop():
        raise InTaskThread(act)


def await_task(task: Any, call: Callable[[], Any]) -> Any:
    """Return what `await task(...)` waits for, where *task* is called as a function on an event loop; else None."""
    if not is_asynchronous(type(task).run) or not in_loop_thread():
        return None
    from .coroutines import in_thread  # noqa: PLC0415 - as said above

    return in_thread(call)


@cache
def is_asynchronous(function: Callable[..., Any]) -> bool:
    """Whether a function is a coroutine function, or is one under what was wrapped around it."""
    return inspect.iscoroutinefunction(inspect.unwrap(function))


class _Finishing:
    """The function of a task that returns what its coroutine returns."""

    def __init__(self, task: Any, function: Callable[..., Any]) -> None:
        self._task = task
        self._function = function

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return _finished(self._task, self._function(*args, **kwargs))


def _finished(task: Any, result: Any) -> Any:
    if not inspect.iscoroutine(result):
        return result
    from .coroutines import run_to_end  # noqa: PLC0415 - as said above

    try:
        return _dumped(type(task).run, run_to_end(task, result))
    except InTaskThread as ending:
        act = ending.act
    return act()


def _dumped(function: Any, value: Any) -> Any:
    """Return *value* as Celery's wrapper for `pydantic=True` would have, had it not seen a coroutine in its place."""
    if (dump := getattr(value, "model_dump", None)) is None:
        return value
    classes, options = _dumping(function)
    return dump(**options) if isinstance(value, classes) else value


@cache
def _dumping(function: Any) -> tuple[tuple[type, ...], dict[str, Any]]:
    """Return the classes of results that are dumped, none without `pydantic=True`, and the options for that."""
    wrapper = inspect.getclosurevars(function).nonlocals if inspect.isfunction(function) else {}
    if "dump_kwargs" not in wrapper:
        return (), {}
    hint = typing.get_type_hints(function).get("return")
    return tuple(kind for kind in (hint, *typing.get_args(hint)) if isinstance(kind, type)), wrapper["dump_kwargs"]
