"""Calls of a durable task, by way of its journal: made once; when it runs again given back, continued or refused."""

from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from typing import Any, Generic, NoReturn, Protocol, TypeVar

import mcp_types as types
from mcp import Client, MCPError
from mcp.shared.message import ClientMessageMetadata
from pydantic import BaseModel

from .exceptions import (
    CallInterruptedError,
    ConfigurationError,
    MCPCeleryError,
    SessionLostError,
    ToolError,
    TransportError,
)
from .exchange import TokenCallback
from .handle import SessionHandle
from .journal import Entry, Journal
from .tool_checks import tools_until

T = TypeVar("T")
R = TypeVar("R", bound=BaseModel)

#: How servers refuse an event ID: 400 in TypeScript, 405 where streams cannot be resumed, 404 and 410 for what is gone.
TOKEN_REFUSED = frozenset({400, 404, 405, 410})

#: What a call that was made before may have raised.
_FAILURES: dict[str, Callable[..., Exception]] = {
    "ConfigurationError": ConfigurationError,
    "MCPError": MCPError,
    "ToolError": ToolError,
    "TransportError": TransportError,
    "SessionLostError": SessionLostError,
}


@dataclass(frozen=True)
class Question(Generic[R]):
    """What is asked of a server, so that it can be asked again or continued.

    Attributes:
        what: For people.
        request: What goes over the wire; by it a call is known again.
        result_type: What the answer is read as.
        call: Sends it, with what continues an earlier attempt.
        tool: The name of the tool; None for what only reads.
    """

    what: str
    request: Any
    result_type: type[R]
    call: Callable[[Client, ClientMessageMetadata | None], Awaitable[R]]
    tool: str | None = None


#: May refuse the answer to a question by raising an error.
Check = Callable[[R], Awaitable[None]]


class Session(Protocol):
    """What durable calls need of their session."""

    @property
    def server(self) -> str:
        """The server's name."""
        ...

    @property
    def resumed(self) -> bool:
        """Whether the session came with a handle."""
        ...

    @property
    def is_untouched(self) -> bool:
        """Whether it was neither opened nor ended here."""
        ...

    async def open_for(self, what: str, timeout_seconds: float | None) -> None:
        """Open it, or resume the one that was given, for the call *what*."""
        ...

    async def ask(
        self,
        what: str,
        call: Callable[[Client], Awaitable[T]],
        timeout_seconds: float | None = None,
        *,
        on_token: TokenCallback | None = None,
    ) -> T:
        """Make a call. Where *on_token* takes its resumption tokens, only its timeout cancels it at the server."""
        ...

    def note_loss(self) -> None:
        """Take the session for lost: an earlier run has found it so."""
        ...


class DurableCalls:
    """The calls of one session of a durable task."""

    def __init__(self, session: Session, journal: Journal) -> None:
        self._session = session
        self._journal = journal

    async def put(
        self,
        question: Question[R],
        timeout_seconds: float | None,
        check: Check[R] | None,
        note_replay: Callable[[], object],
    ) -> R:
        """Put a question to the server, unless an earlier run has its answer. *check* may refuse the answer.

        *note_replay* is called before an earlier answer is returned or raised.

        Raises:
            CallInterruptedError: An earlier run has put it, and nobody can say whether it was answered.
        """
        session, journal = self._session, self._journal
        # `_meta` says how a call is made, not what: the IDs of traces differ in each run.
        params = question.request.params.model_dump(mode="json", by_alias=True, exclude_none=True, exclude={"meta"})

        async def open_first() -> None:
            # Before the call is noted: of one that was noted, nobody can say that it was not sent.
            if session.is_untouched:
                await session.open_for(question.what, timeout_seconds)

        method = question.request.method
        entry, was_made = await journal.enter(question.what, session.server, method, params, prepare=open_first)
        if entry.has_ended:
            note_replay()
            try:
                return _replayed(entry, question.result_type)
            except SessionLostError:
                session.note_loss()
                raise
        # A call is sent once its session is recorded, and not before.
        may_have_run = was_made and (session.resumed or session.server in journal.sessions)
        if may_have_run and entry.token is None:
            await self._check_repeatable(question)

        try:
            result = await self._make(question, entry, timeout_seconds, check, may_have_run=may_have_run)
        except MCPError as exc:
            await journal.finish(entry, _failure_of(exc), "failed")
            raise
        except MCPCeleryError as exc:
            await self._note_failure(entry, exc, may_have_run=may_have_run)
            raise
        answer = result.model_dump(mode="json", by_alias=True, exclude_none=True)
        if isinstance(result, types.CallToolResult) and result.is_error:
            await journal.finish(entry, {"result": answer}, "failed")
        else:
            await journal.finish(entry, answer)
        return result

    async def once(
        self,
        what: str,
        act: Callable[[], Awaitable[SessionHandle | None]],
        act_again: Callable[[SessionHandle | None], Awaitable[None]],
    ) -> SessionHandle | None:
        """Do something with the session at the server; where an earlier run has, only here, by *act_again*."""
        entry, _ = await self._journal.enter(f"session {what}", self._session.server, f"session/{what}", {})
        if not entry.has_ended:
            try:
                handle = await act()
            except TransportError as exc:
                self._journal.break_off(entry, _failure_of(exc))
                raise
            await self._journal.finish(entry, {"handle": None if handle is None else handle.dumps()})
            return handle
        text = (entry.result or {}).get("handle")
        handle = None if text is None else SessionHandle.load(text)
        await act_again(handle)
        if entry.failure is not None:
            _raise_again(entry.failure)
        return handle

    async def _make(
        self,
        question: Question[R],
        entry: Entry,
        timeout_seconds: float | None,
        check: Check[R] | None,
        *,
        may_have_run: bool,
    ) -> R:
        """Make a call, or continue it by its token; anew, where its server knows that no more."""
        on_token = self._journal.token_of(entry)
        metadata = ClientMessageMetadata(resumption_token=entry.token, on_resumption_token_update=on_token)
        try:
            # Where the task is interrupted, or its worker told to end, the call goes on for the next run.
            result = await self._session.ask(
                question.what, lambda client: question.call(client, metadata), timeout_seconds, on_token=on_token
            )
        except TransportError as exc:
            if not (may_have_run and entry.token is not None and exc.status in TOKEN_REFUSED):
                raise
            await self._check_repeatable(question)
            anew = self._journal.without_token(entry)
            return await self._make(question, anew, timeout_seconds, check, may_have_run=may_have_run)
        if check is not None:
            await check(result)
        return result

    async def _note_failure(self, entry: Entry, exc: MCPCeleryError, *, may_have_run: bool) -> None:
        match exc:
            case ToolError():
                await self._journal.finish(entry, _failure_of(exc), "failed")
            case ConfigurationError() | TransportError(sent=False) if not may_have_run:
                await self._journal.withdraw(entry, _failure_of(exc))
            case TransportError(cancelled=True):
                await self._journal.finish(entry, _failure_of(exc), "cancelled")
            case TransportError() | SessionLostError():
                self._journal.break_off(entry, _failure_of(exc))

    async def _check_repeatable(self, question: Question[Any]) -> None:
        if not await self._may_repeat(question):
            raise CallInterruptedError(
                f"An earlier run of the task ended while {question.what} was under way, and there is nothing to "
                "continue it by: it may or may not have run. mcp_on_interrupted = 'call-again' makes such calls again",
                question.tool,
            )

    async def _may_repeat(self, question: Question[Any]) -> bool:
        """Whether a call that may have run is made again: reading is, and a tool that says that this does no harm."""
        if self._journal.calls_again or question.tool is None:
            return True

        name = question.tool
        try:
            listed = await self._session.ask("tools/list", lambda client: tools_until(client, name))
        except SessionLostError:
            # Whatever the tool says, the call cannot be made again here. What counts is that it may have run.
            return False
        hints = next((tool.annotations for tool in listed or () if tool.name == name), None)
        return hints is not None and bool(hints.read_only_hint or hints.idempotent_hint)


def _failure_of(exc: MCPError | MCPCeleryError) -> dict[str, Any]:
    """Return an error of a call as JSON types, for the journal."""
    if isinstance(exc, MCPError):
        return {"class": "MCPError", "args": [exc.code, exc.message, exc.data]}
    return {"class": type(exc).__name__, "args": list(exc.args)}


def _raise_again(failure: Mapping[str, Any]) -> NoReturn:
    """Raise what `_failure_of` has kept."""
    raise _FAILURES[failure["class"]](*failure["args"])


def _replayed(entry: Entry, result_type: type[R]) -> R:
    """Return the result of a call that was made before, or raise its error."""
    if entry.failure is not None and "class" in entry.failure:
        _raise_again(entry.failure)
    answer = entry.failure["result"] if entry.failure is not None else entry.result
    return result_type.model_validate(answer, by_name=False)
