"""A coroutine that runs on the process's event loop while the thread of its task waits for it.

What interrupts the thread (a soft time limit, the end of its process) is raised in the coroutine, where that waits.
"""

import asyncio
import concurrent.futures
import gc
import logging
from collections.abc import Callable, Coroutine, Generator, Iterator
from contextlib import contextmanager, suppress
from contextvars import ContextVar, copy_context
from functools import partial
from types import AsyncGeneratorType, CoroutineType
from typing import Any, NamedTuple, TypeVar

import anyio
from celery._state import pop_current_task, push_current_task

from .exceptions import SessionError
from .portal import CLEAN_UP_SECONDS, Caller, Callers, Portal, get_portal, started_tasks
from .threads import start_beside

T = TypeVar("T")


class Outcome(NamedTuple):
    """How a coroutine ended."""

    value: Any
    error: BaseException | None = None


class Nested:
    """A task that was called as a function on an event loop, and runs in a thread of its own."""

    def __init__(self) -> None:
        self.run: CoroutineRun | None = None

    def cancel(self) -> None:
        """End the coroutine of the task, if it runs. From any thread."""
        if self.run is not None:
            self.run.abandon()


logger = logging.getLogger(__name__)

_nested: ContextVar[Nested | None] = ContextVar("mcp_celery_nested", default=None)


def run_to_end(task: Any, coroutine: Coroutine[Any, Any, T]) -> T:
    """Return what *coroutine*, which the function of *task* has returned, returns. Context variables go along.

    An `Exception` that is raised in the waiting thread (SoftTimeLimitExceeded) is raised in the coroutine, which may
    catch it and go on. What is to end the thread (SystemExit, KeyboardInterrupt) is raised there too, and goes on once
    the coroutine has ended, after `CLEAN_UP_SECONDS` at the latest. An `Exception` that comes when the coroutine has
    ended, and its outcome is on its way here, is dropped.

    Raises:
        SessionError: It was called on the event loop.
    """
    portal = get_portal()
    if portal.is_current():
        coroutine.close()
        raise SessionError(
            f"Task {task.name} is asynchronous and was called on the event loop that is to run it: await the task, or "
            "publish it"
        )
    run = CoroutineRun(task, task.request, coroutine)
    if (nested := _nested.get()) is not None:
        nested.run = run
    execution = getattr(task.request, "mcp_execution", None)
    # What servers ask of the task is run in this thread meanwhile.
    outcome = _wait_for(run, portal, Callers() if execution is None else execution.callers)
    try:
        if outcome.error is not None:
            raise outcome.error
        value: T = outcome.value
        return value
    finally:
        del outcome  # or its traceback refers to it


def _wait_for(run: "CoroutineRun", portal: Portal, callers: Callers) -> Outcome:
    interruption: BaseException | None = None
    try:
        while True:
            try:
                caller = Caller()
                with callers.waiting(caller):
                    return portal.call(partial(run.go_on, interruption), caller)
            except Exception as exc:
                if interruption is not None and not run.has_gone_on:
                    raise  # the loop is gone
                interruption = exc
                run.has_gone_on = False
            except BaseException as exc:
                if not run.is_waited_for:  # else the loop is blocked, and does not even say so
                    portal.call(partial(run.stop, exc))
                raise
    finally:
        run.abandon()


def begin_call(call: Coroutine[Any, Any, T], name: str) -> asyncio.Task[T]:
    """Run *call* as an asyncio task, which ends with the Celery task at the latest. What it starts may go on."""
    context = copy_context()
    context.run(started_tasks.set, None)
    return asyncio.create_task(call, name=name, context=context)


async def in_thread(function: Callable[[], T]) -> T:
    """Run *function*, which calls a task, in a thread of its own. Cancelling this cancels the task's coroutine."""
    loop, context, nested = asyncio.get_running_loop(), copy_context(), Nested()
    done: asyncio.Future[Outcome] = loop.create_future()

    def tell(outcome: Outcome) -> None:
        if not done.done():
            done.set_result(outcome)

    def work() -> None:
        try:
            outcome = Outcome(context.run(function))
        except BaseException as exc:  # noqa: BLE001 - raised below
            outcome = Outcome(None, exc)
        with suppress(RuntimeError):  # the loop is closed
            loop.call_soon_threadsafe(tell, outcome)

    context.run(_nested.set, nested)
    # Of its own: pools have limits, and who waits in one for what waits for it would wait for ever.
    start_beside(loop, work, "mcp_celery task")
    try:
        await asyncio.wait([done])
    except BaseException:
        nested.cancel()
        with anyio.CancelScope(shield=True):  # anyio cancels again and again
            await asyncio.wait([done], timeout=CLEAN_UP_SECONDS)
        raise
    value, error = done.result()
    if error is not None:
        raise error
    result: T = value
    return result


class CoroutineRun:
    """One coroutine on the event loop, for one execution of a task.

    Args:
        task: The task whose function has returned the coroutine.
        request: The request of this execution.
        coroutine: Not started yet.
    """

    def __init__(self, task: Any, request: Any, coroutine: Coroutine[Any, Any, Any]) -> None:
        self._celery_task = task
        self._request = request
        self._coroutine = coroutine
        self._task: asyncio.Task[Outcome] | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        #: What is still to be raised in the coroutine.
        self._pending: BaseException | None = None
        self._interruption: BaseException | None = None
        self._started: set[asyncio.Task[Any]] = set()
        #: Whether the loop runs `go_on`.
        self.is_waited_for = False
        #: Whether it has, since this was reset.
        self.has_gone_on = False

    # -- On the loop

    async def go_on(self, interruption: BaseException | None) -> Outcome:
        """Wait for the end of the coroutine. It begins, or *interruption* is raised in it."""
        self.is_waited_for = self.has_gone_on = True
        try:
            if self._task is None:
                if interruption is not None:
                    self._coroutine.close()
                    return Outcome(None, interruption)
                self._loop = asyncio.get_running_loop()
                self._task = asyncio.create_task(self._to_end(), name=f"{self._celery_task.name}[{self._request.id}]")
            elif interruption is not None:
                self._interrupt(interruption)
            await asyncio.wait([self._task])
            return self._task.result()
        finally:
            self.is_waited_for = False

    async def stop(self, interruption: BaseException) -> None:
        """Raise *interruption* in the coroutine, and wait for its end, `CLEAN_UP_SECONDS` at most."""
        if self._task is not None:
            self._interrupt(interruption)
            await asyncio.wait([self._task], timeout=CLEAN_UP_SECONDS)

    def _interrupt(self, interruption: BaseException) -> None:
        if self._task is not None and not self._task.done():
            self._pending = self._interruption = interruption
            self._task.cancel()

    async def _to_end(self) -> Outcome:
        started_tasks.set(self._started)
        try:
            return Outcome(await self)
        except BaseException as exc:  # noqa: BLE001 - raised in the task's thread: here SystemExit would end the loop
            return Outcome(None, self._surfacing(exc))
        finally:
            with suppress(asyncio.CancelledError):  # what interrupts this comes too late to change the outcome
                await self._end_started()

    async def _end_started(self) -> None:
        """Cancel what nobody waits for any more, as `asyncio.run` does, and wait for it, `CLEAN_UP_SECONDS` at most.

        The other members of an `asyncio.gather` where one has failed, for instance.
        """
        loop = asyncio.get_running_loop()
        deadline = loop.time() + CLEAN_UP_SECONDS
        while left := self._left_over():
            for task in left:
                if not task.cancelling():
                    task.cancel()
            ended, running = await asyncio.wait(left, timeout=max(0.0, deadline - loop.time()))
            for task in ended:
                if not task.cancelled() and (error := task.exception()) is not None:
                    message = "Unhandled exception in what a task has left behind"
                    loop.call_exception_handler({"message": message, "exception": error, "task": task})
            if running:
                names = ", ".join(sorted(task.get_name() for task in running))
                logger.warning("Task %s has ended, and left what does not end: %s", self._celery_task.name, names)
                return

    def _left_over(self) -> list[asyncio.Task[Any]]:
        """Find what this has started and is not ended by others.

        A member of anyio's task groups is: it may be one of the SDK's client, and to cancel it would end the session.
        """
        if not self._started:
            return []
        members = {info.id for info in anyio.get_running_tasks() if info.parent_id is not None}
        return [task for task in self._started if not task.done() and id(task) not in members]

    def __await__(self) -> Generator[Any, Any, Any]:
        """Run the coroutine step by step, each as Celery would run a function: with the current task and its request.

        Others run on this thread between the steps.
        """
        step: Callable[[], Any] = partial(self._coroutine.send, None)
        while True:
            try:
                with self._as_current():
                    future = step()
            except StopIteration as end:
                return end.value
            try:
                sent = yield future
            except GeneratorExit:
                self._coroutine.close()
                raise
            except BaseException as exc:  # noqa: BLE001 - raised in the coroutine
                step = partial(self._coroutine.throw, self._raised_instead_of(exc))
            else:
                step = partial(self._coroutine.send, sent)
                # The other part of `_raised_instead_of`; or what was awaited has ended in the same moment.
                if self._pending is not None and not _is_closed_to_others(self._coroutine):
                    step = partial(self._coroutine.throw, self._taken())

    def _raised_instead_of(self, exc: BaseException) -> BaseException:
        """Return what is raised where the coroutine waits: an interruption, if it was cancelled for that."""
        if self._pending is None or not isinstance(exc, asyncio.CancelledError):
            return exc
        if _is_closed_to_others(self._coroutine):
            self._pending = None
            return exc
        if _is_leaving_group(self._coroutine):
            return exc  # The group ends its tasks. Once they have ended, the interruption is raised.
        return self._taken()

    def _taken(self) -> BaseException:
        exc, self._pending = self._pending, None
        if self._task is not None:
            self._task.uncancel()
        return exc or asyncio.CancelledError()

    def _surfacing(self, exc: BaseException) -> BaseException:
        """Return what the task ends with, where the coroutine has raised *exc*."""
        if self._interruption is not None and all(
            isinstance(leaf, asyncio.CancelledError) or leaf is self._interruption for leaf in _leaves(exc)
        ):
            return self._interruption
        if isinstance(exc, asyncio.CancelledError):
            # It is no Exception, and Celery would take the process for broken.
            error = concurrent.futures.CancelledError("The coroutine of the task was cancelled")
            error.__cause__ = exc
            return error
        return exc

    @contextmanager
    def _as_current(self) -> Iterator[None]:
        push_current_task(self._celery_task)
        self._celery_task.request_stack.push(self._request)
        try:
            yield
        finally:
            self._celery_task.request_stack.pop()
            pop_current_task()

    # -- In any thread

    def abandon(self) -> None:
        """Cancel the coroutine, unless it has ended. Waits for nothing."""
        if self._task is None:
            self._coroutine.close()
        elif self._loop is not None and not self._task.done():
            with suppress(RuntimeError):  # the loop is closed
                self._loop.call_soon_threadsafe(self._task.cancel)


def _leaves(exc: BaseException) -> Iterator[BaseException]:
    if isinstance(exc, BaseExceptionGroup):
        for part in exc.exceptions:
            yield from _leaves(part)
    else:
        yield exc


def _is_leaving_group(coroutine: Any) -> bool:
    """Whether it waits for the tasks of a task group to end: asyncio's and anyio's know what to do with a cancellation.

    Anything else would end the wait, and leave those tasks behind.
    """
    return any(code.co_qualname == "TaskGroup.__aexit__" for code, _ in _frames(coroutine))


def _is_closed_to_others(coroutine: Any) -> bool:
    """Whether it waits in the MCP SDK (by `self.amcp.client`), which tells the server of a cancellation alone."""
    return any(module.partition(".")[0] == "mcp" for _, module in _frames(coroutine))


def _frames(awaited: Any) -> Iterator[tuple[Any, str]]:
    """Find the code in which a suspended coroutine waits, from the outermost to the innermost, with its modules."""
    while awaited is not None:
        kind = next((kind for kind in ("cr", "gi", "ag") if hasattr(awaited, f"{kind}_frame")), None)
        if kind is None:
            # What `async for` and `asynccontextmanager` wait for says nothing of its generator, but refers to it.
            referents = gc.get_referents(awaited)
            awaited = next(
                (found for found in referents if isinstance(found, AsyncGeneratorType | CoroutineType)), None
            )
            continue
        frame = getattr(awaited, f"{kind}_frame")
        if frame is not None:
            yield frame.f_code, frame.f_globals.get("__name__", "")
        awaited = getattr(awaited, "gi_yieldfrom" if kind == "gi" else f"{kind}_await")
