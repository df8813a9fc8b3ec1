"""What servers ask and tell a task while one of its calls is under way: sampling, elicitation, roots, logs.

A task answers by methods of its own (`on_sampling`, `on_elicitation`, `on_list_roots`, `on_log`). Those that are
coroutine functions run on the event loop, the others in the task's thread, which waits for the call meanwhile; what
they return is awaited where it can be. What it has no method for is declined at once (MCP 2025-11-25, Client Features).
"""

import asyncio
import inspect
import json
import logging
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from functools import partial
from pathlib import Path
from typing import Any, Protocol, TypeVar

import anyio
import mcp_types as types
from billiard.exceptions import SoftTimeLimitExceeded
from mcp import MCPError
from mcp.client import ClientRequestContext
from mcp.shared.dispatcher import ProgressFnT

from .handle import short_hash
from .portal import CLEAN_UP_SECONDS, Callers

T = TypeVar("T")

_logger = logging.getLogger(__name__)

#: MCP 2025-11-25, Sampling, Error Handling.
SAMPLING_REJECTED = types.ErrorData(code=-1, message="User rejected sampling request")
#: MCP 2025-11-25, Roots, Error Handling.
ROOTS_UNKNOWN = types.ErrorData(code=types.METHOD_NOT_FOUND, message="Roots not supported")
_HAS_ENDED = "The call to which this belongs has ended"
_DECLINED = types.ElicitResult(action="decline")

#: Which method of a task answers which request.
HOOKS = {
    "sampling/createMessage": "on_sampling",
    "elicitation/create": "on_elicitation",
    "roots/list": "on_list_roots",
}
_DECLINES: Mapping[str, types.ErrorData | types.ElicitResult] = {
    "sampling/createMessage": SAMPLING_REJECTED,
    "elicitation/create": _DECLINED,
    "roots/list": ROOTS_UNKNOWN,
}

#: RFC 5424, section 6.2.1, as MCP names the levels.
_LEVELS = {
    "debug": logging.DEBUG,
    "info": logging.INFO,
    "notice": logging.INFO,
    "warning": logging.WARNING,
    "error": logging.ERROR,
    "critical": logging.CRITICAL,
    "alert": logging.CRITICAL,
    "emergency": logging.CRITICAL,
}


class Reports(Protocol):
    """Takes the progress of a task's calls."""

    def of(self, tool: str) -> ProgressFnT:
        """Return what takes the progress of a call."""
        ...


class CallUnderWay:
    """A call that waits for its answer, as what the server asks meanwhile sees it.

    Attributes:
        tool: The name of the tool; None for what only reads.
        goes_on: Whether it goes on at the server where it is given up here: that of a durable task.
        ended: Set once the answer is there, or not waited for any more.
        failure: What a method of the task has raised: the call ends with it.
    """

    def __init__(self, tool: str | None, *, goes_on: bool = False) -> None:
        self.tool = tool
        self.goes_on = goes_on
        self.ended = asyncio.Event()
        self.failure: Exception | None = None
        self.scope = anyio.CancelScope()
        self._unanswered: set[asyncio.Future[Any]] = set()

    @property
    def has_ended(self) -> bool:
        """Whether `ended` is set."""
        return self.ended.is_set()

    def fail(self, exc: Exception) -> None:
        """Cancel the call, which raises *exc*."""
        if self.failure is None and not self.has_ended:
            self.failure = exc
            self.scope.cancel()

    def end(self) -> None:
        """Answer what the server has asked meanwhile, and nobody will: the thread of the task has gone on."""
        self.ended.set()
        for future in self._unanswered:
            if not future.done():
                future.set_exception(MCPError(types.CONNECTION_CLOSED, _HAS_ENDED))

    async def answer_of(self, future: asyncio.Future[T]) -> T:
        """Wait for an answer that comes from a thread, until the call ends."""
        self._unanswered.add(future)
        try:
            return await future
        finally:
            self._unanswered.discard(future)

    async def outcome_of(self, awaitable: Awaitable[T]) -> T:
        """Wait for what runs on the loop, until the call ends, which cancels that.

        Raises:
            MCPError: The call has ended.
        """
        task, ended = asyncio.ensure_future(awaitable), asyncio.create_task(self.ended.wait())
        try:
            await asyncio.wait([task, ended], return_when=asyncio.FIRST_COMPLETED)
            if not task.done():
                raise MCPError(types.CONNECTION_CLOSED, _HAS_ENDED)
            return task.result()
        finally:
            ended.cancel()
            if task.cancel():
                with anyio.CancelScope(shield=True):
                    await asyncio.wait([task], timeout=CLEAN_UP_SECONDS)


#: The call to which a message of the server belongs: the transport hands on each in the context of its request.
_current: ContextVar[CallUnderWay | None] = ContextVar("mcp_celery_call", default=None)


@contextmanager
def under_way(tool: str | None, *, goes_on: bool = False) -> Iterator[CallUnderWay]:
    """Make a call within. Where a method of the task fails meanwhile, the call is cancelled, and this raises that."""
    call = CallUnderWay(tool, goes_on=goes_on)
    token = _current.set(call)
    try:
        with call.scope:
            yield call
    except Exception:
        if call.failure is not None:
            raise call.failure from None
        raise
    finally:
        _current.reset(token)
        call.end()
    if call.failure is not None:
        raise call.failure


def current_call() -> CallUnderWay | None:
    """Return the call to which what runs now belongs; None on the standalone stream."""
    return _current.get()


def belong_to_no_call() -> None:
    """Have what this asyncio task starts belong to no call: it outlives the one that it was started in."""
    _current.set(None)


class Asked:
    """What the servers of one execution of a task ask it, and how that is answered.

    Args:
        task: Has the methods, as far as its class defines them.
        callers: The threads that wait for the calls of the execution.
        logger: Where the logs of servers go.
        progress: What takes progress where a call has no `on_progress`.
        log_level: The level that servers are asked for; None where they are not asked.
    """

    def __init__(
        self,
        task: object,
        callers: Callers,
        logger: logging.Logger,
        *,
        progress: Reports | None = None,
        log_level: types.LoggingLevel | None = None,
    ) -> None:
        self._task = task
        self._callers = callers
        self._logger = logger
        self._progress = progress
        self.log_level = log_level

    def declines(self) -> dict[str, types.ErrorData | types.ElicitResult]:
        """Return the answers to requests that the task has no method for, by method of the protocol."""
        return declines(self._task)

    def progress_of(self, tool: str, session_id: Callable[[], str | None]) -> ProgressFnT | None:
        """Return what takes the progress of a call that has no `on_progress`; None where nobody wants it.

        Args:
            tool: The name of the tool.
            session_id: Returns the ID of the session, which is to show in no result backend.
        """
        if self._progress is None:
            return None
        take = self._progress.of(tool)

        async def report(progress: float, total: float | None = None, message: str | None = None) -> None:
            await take(progress, total, None if message is None else _hidden(session_id(), message))

        return report

    def callbacks(self, server: str, session_id: Callable[[], str | None]) -> dict[str, Any]:
        """Return the callbacks of the SDK's client: a server is told of what is there, and of nothing else.

        Args:
            server: The name of the server.
            session_id: Returns the ID of the session, which is to show in no log.
        """
        answers: dict[str, Any] = {
            "sampling/createMessage": ("sampling_callback", self._sample),
            "elicitation/create": ("elicitation_callback", self._elicit),
            "roots/list": ("list_roots_callback", self._list_roots),
        }
        declined = self.declines()
        callbacks = dict(callback for method, callback in answers.items() if method not in declined)
        callbacks["logging_callback"] = partial(self._log, server, session_id)
        if self.log_level is not None:
            callbacks["log_level"] = self.log_level
        return callbacks

    # -- Requests

    async def _sample(
        self, _: ClientRequestContext, params: types.CreateMessageRequestParams
    ) -> types.CreateMessageResult | types.CreateMessageResultWithTools | types.ErrorData:
        return await self._answer("on_sampling", sampled, params)

    async def _elicit(
        self, _: ClientRequestContext, params: types.ElicitRequestParams
    ) -> types.ElicitResult | types.ErrorData:
        return await self._answer("on_elicitation", elicited, params)

    async def _list_roots(self, _: ClientRequestContext) -> types.ListRootsResult | types.ErrorData:
        return await self._answer("on_list_roots", listed)

    async def _answer(self, name: str, read: Callable[[Any], T], *args: object) -> T | types.ErrorData:
        """Have the task answer. What it raises ends the call; the server is told that there is no answer, not why.

        An `MCPError` is an answer as well.
        """
        call = current_call()
        try:
            return read(await self._run(name, *args, until=call))
        except MCPError as exc:
            is_left = call is not None and call.has_ended
            if exc.code == types.CONNECTION_CLOSED and not is_left:
                # The transport takes this code for what is left unanswered; servers have it for errors of all kinds.
                return types.ErrorData(code=types.INTERNAL_ERROR, message=exc.message, data=exc.data)
            return exc.error
        except Exception as exc:  # noqa: BLE001 - the user's own code
            fail(call, name, exc)
            if call is not None:
                await call.ended.wait()  # so that the server hears first that the call is cancelled
            is_left = call is not None and call.goes_on  # then who continues the call is asked
            code = types.CONNECTION_CLOSED if is_left else types.INTERNAL_ERROR
            return types.ErrorData(code=code, message=f"{name} has failed")

    async def _run(self, name: str, *args: object, until: CallUnderWay | None) -> Any:
        """Run a method of the task where it belongs, and return what it returns.

        It is given up when the call *until* ends. What it raises is raised here; but a time limit that no call would
        raise goes on in the thread of the task.
        """
        hook: Callable[..., Any] = getattr(self._task, name)
        outcome = hook(*args) if inspect.iscoroutinefunction(hook) else await self._in_thread(name, hook, args, until)
        if not inspect.isawaitable(outcome):
            return outcome
        return await (outcome if until is None else until.outcome_of(outcome))

    async def _in_thread(
        self, name: str, hook: Callable[..., Any], args: tuple[object, ...], until: CallUnderWay | None
    ) -> Any:
        loop, call = asyncio.get_running_loop(), current_call()
        future: asyncio.Future[Any] = loop.create_future()

        def tell(set_outcome: Callable[[Any], None], outcome: object) -> None:
            if not future.done():
                set_outcome(outcome)
            elif isinstance(outcome, Exception):
                fail(None, name, outcome)
            elif inspect.iscoroutine(outcome):
                outcome.close()

        def run() -> None:
            if future.done():
                return
            try:
                outcome = hook(*args)
            except Exception as exc:
                is_raised_by_call = call is not None and not call.has_ended and not future.done()
                if isinstance(exc, SoftTimeLimitExceeded) and not is_raised_by_call:
                    raise
                loop.call_soon_threadsafe(tell, future.set_exception, exc)
            else:
                loop.call_soon_threadsafe(tell, future.set_result, outcome)

        self._callers.run(run)
        return await (future if until is None else until.answer_of(future))

    # -- Logs

    async def _log(
        self, server: str, session_id: Callable[[], str | None], params: types.LoggingMessageNotificationParams
    ) -> None:
        call = current_call()
        if getattr(self._task, "on_log", None) is not None:
            try:
                await self._run("on_log", params, until=None)  # what is logged last may come after the answer
            except Exception as exc:  # noqa: BLE001 - the user's own code
                fail(call, "on_log", exc)
            return
        tool = call.tool if call is not None else None
        text = params.data if isinstance(params.data, str) else json.dumps(params.data, ensure_ascii=False, default=str)
        log = partial(
            self._logger.log,
            _LEVELS[params.level],
            "%s: %s",
            server if tool is None else f"{server} {tool}",
            _hidden(session_id(), text),
            extra={"mcp_server": server, "mcp_tool": tool, "mcp_logger": params.logger},
        )
        # In the task's thread its logger knows the task; but what a server says is not kept until the next call.
        if self._callers.are_waiting:
            self._callers.run(log)
        else:
            log()


def _hidden(secret: str | None, text: str) -> str:
    """Return *text* with the hash of *secret* in its place."""
    return text if secret is None else text.replace(secret, short_hash(secret))


def fail(call: CallUnderWay | None, name: str, exc: Exception) -> None:
    """End the call to which belongs what the user's own code has failed to take."""
    if call is None or call.has_ended:
        _logger.error("%s has failed outside of any call", name, exc_info=exc)
    else:
        call.fail(exc)


def declines(task: object = None) -> dict[str, types.ErrorData | types.ElicitResult]:
    """Return the answers to requests that *task* has no method for, by method of the protocol."""
    return {method: _DECLINES[method] for method, hook in HOOKS.items() if getattr(task, hook, None) is None}


def sampled(answer: object) -> types.CreateMessageResult | types.CreateMessageResultWithTools | types.ErrorData:
    """Read what `on_sampling` has returned: a result of the SDK, or a text of the assistant; None rejects.

    Raises:
        TypeError: It is something else.
    """
    match answer:
        case None:
            return SAMPLING_REJECTED
        case types.CreateMessageResult() | types.CreateMessageResultWithTools():
            return answer
        case str():
            content = types.TextContent(type="text", text=answer)
            return types.CreateMessageResult(role="assistant", content=content, model="unknown")
        case _:
            raise TypeError(f"on_sampling returns a CreateMessageResult, a text or None, not {type(answer).__name__}")


def elicited(answer: object) -> types.ElicitResult:
    """Read what `on_elicitation` has returned: a result of the SDK, or the content as a mapping; None declines.

    Raises:
        TypeError: It is something else.
    """
    match answer:
        case None:
            return _DECLINED
        case types.ElicitResult():
            return answer
        case Mapping():
            return types.ElicitResult(action="accept", content=dict(answer))
        case _:
            raise TypeError(f"on_elicitation returns an ElicitResult, a mapping or None, not {type(answer).__name__}")


def listed(answer: object) -> types.ListRootsResult:
    """Read what `on_list_roots` has returned: a result of the SDK, or a sequence of roots, `file://` URIs and paths.

    Raises:
        TypeError: It is something else.
    """
    match answer:
        case types.ListRootsResult():
            return answer
        case Sequence() if not isinstance(answer, str | bytes):
            return types.ListRootsResult(roots=[_root(item) for item in answer])
        case _:
            raise TypeError(f"on_list_roots returns a ListRootsResult or a sequence, not {type(answer).__name__}")


def _root(item: object) -> types.Root:
    match item:
        case types.Root():
            return item
        case str() if "://" in item:
            return types.Root.model_validate({"uri": item})
        case str() | Path():
            return types.Root.model_validate({"uri": Path(item).absolute().as_uri()})
        case _:
            raise TypeError(f"A root is a Root, a URI or a path, not {type(item).__name__}")
