"""One execution of an MCP task: the sessions it was given and those it opened, and what becomes of them.

Who holds a session is counted in the store. Without one (or without an answer from it) a session that goes from step
to step is ended by who has nothing to pass it on to, and one that goes on in several branches is left to the idle
timeout of its server.
"""

import logging
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from billiard.exceptions import SoftTimeLimitExceeded
from celery import uuid
from celery.exceptions import Ignore, Reject, Retry
from celery.utils.log import get_task_logger

from .durable_run import DurableRun
from .eager import shared_now, warn_of_eager
from .events import Event
from .exceptions import HAS_TAKEN_OVER, ConfigurationError, MCPCeleryError, SupersededError
from .handle import SessionHandle, server_name
from .known_tasks import is_redelivered, journal_id, of_server, settings_of, settings_of_journal
from .portal import Callers
from .progress import TaskProgress, has_state
from .settings import Conf, JournalSettings, log_level, progress_interval_seconds, server_settings
from .signals import send
from .store import Change, Leaving, Standing
from .sync_session import MCPSession, new_session
from .tally import Tally
from .workflow import Ahead, Canvas, Carried, Signature, bind, carried

if TYPE_CHECKING:
    from .asked import Asked

logger = logging.getLogger(__name__)


def execution_of(request: Any) -> "Execution | None":
    """Return the execution under way in *request*, if it is that of an MCP task."""
    execution: Execution | None = getattr(request, "mcp_execution", None)
    return execution


class Execution:
    """What a task does with its sessions while it runs, and when it ends; the `Ledger` of those sessions.

    Belongs to `request`, so to one thread; the methods of a `Ledger` are called from others, while that one waits.

    Args:
        task: The MCP task that names the servers.
        request: What is executed; of a mapped task, Celery's own task that maps.
        brought: What came with the message.
        canvas: Finds what follows.
    """

    def __init__(self, task: Any, request: Any, brought: Carried, canvas: Canvas) -> None:
        self._task = task
        self._request = request
        self._canvas = canvas
        self._holder = brought.holder or request.id or uuid()
        self._bound_at = brought.at
        self._started = time.time()
        shared = shared_now.get() if request.is_eager or request.called_directly else None
        #: What eager tasks share, or None where each has its own session.
        self._eager = shared.sessions if shared is not None and shared.app is task.app else None
        self._tally = Tally(task, self._holder, request.hostname, counts=self._eager is None)
        #: By server: what came with the message. Sessions of servers that this task does not use are passed on.
        self._given = {server: handle for server, (_, handle) in (self._eager or {}).items()}
        self._given |= {handle.server: handle for handle in brought.all}
        self._sessions: dict[str, MCPSession] = {}
        #: The threads that wait for calls of this execution: this one, as a rule.
        self.callers = Callers()
        self._asked: Asked | None = None
        #: By key: the sessions that have this execution among their holders, as far as it knows.
        self._held = {handle.key: handle for handle in brought.handles}
        self._brought = {handle.key for handle in brought.all}
        self._given_by_user = {handle.key: handle for handle in brought.given}
        self._tentative = brought.handles if brought.tentative else ()
        self._durable: DurableRun | None = None
        #: By key: the sessions of an earlier execution, which may have gone on or ended before.
        self._recovered: dict[str, SessionHandle] = {}
        #: By key: the sessions that go on elsewhere while this execution holds them, with the names of the tasks there.
        self._shared: dict[str, list[str]] = {}
        self._failure: MCPCeleryError | None = None
        self._branches = 0
        self._has_begun = False
        self._is_retried = False
        #: Its sessions were given to what takes its place: another attempt, a replacement, errbacks.
        self.is_handed_on = False
        #: The task has succeeded, and its sessions were bound into what follows it, or ended.
        self.is_settled = False

    # -- In the task function

    def begin(self) -> None:
        """Find what earlier attempts have left, and hold the sessions that nobody has counted.

        Raises:
            ConfigurationError: The task is durable, and there is no store.
            StoreError: The task is durable, and the store does not answer.
            SupersededError: The task is durable, and has ended before.
        """
        self._recover()
        for handle in self._given_by_user.values():
            self._hold(handle)
        for handle in self._tentative:
            self._hold_if_alive(handle)
        self._has_begun = True

    def begin_mapping(self) -> None:
        """Begin, for Celery's task that maps. Told by a signal, which lets nothing through: its items raise it."""
        try:
            self.begin()
        except MCPCeleryError as exc:
            self._failure = exc

    def begin_item(self) -> None:
        """Raise what has kept the list of this item from beginning."""
        if self._failure is not None:
            raise self._failure

    def _recover(self) -> None:
        """Resume the sessions that an earlier attempt of this task has opened."""
        request = self._request
        if request.called_directly or request.is_eager or not request.id:
            return
        settings = settings_of_journal(self._task)
        if settings is not None:
            self._begin_durable(settings)
        if request.retries or is_redelivered(request):
            for handle in self._tally.held():
                if handle.server not in self._given:
                    self._given[handle.server] = self._held[handle.key] = handle

    def _begin_durable(self, settings: JournalSettings) -> None:
        self._durable = DurableRun(self._task, self._request, settings)
        self._durable.begin()
        journal = self._durable.journal
        if journal.is_continued:
            self._recovered |= {handle.key: handle for handle in self._given.values()}
        # Held or not: they may have been passed on before the worker was lost.
        self._recovered |= {handle.key: handle for handle in journal.sessions.values()}
        self._given = {**journal.sessions, **self._given}

    def check(self) -> None:
        """Raise what the task function has kept to itself or could not know: another execution has taken over.

        Raises:
            SupersededError: This one counts no more.
        """
        if self._has_lost_lease():
            raise SupersededError(HAS_TAKEN_OVER)

    def _has_lost_lease(self) -> bool:
        return self._durable is not None and self._durable.has_lost_lease()

    def superseded_by(self, exc: BaseException | None) -> Ignore | Reject | None:
        """Return what a task raises instead of *exc* where all is left to another execution; None where it goes on.

        To one that has taken over, or that has ended the task before. Asks the store, so for ends other than a return.
        """
        if self._durable is None:
            return None
        instead = self._durable.superseded_by(exc, has_begun=self._has_begun)
        if instead is not None:
            self.is_handed_on = True
            self._held.clear()
        return instead

    def end_journal(self, state: str | None, *, is_requeued: bool) -> None:
        """Give the journal back, once the result is stored."""
        if self._durable is not None:
            self._durable.end(state, is_requeued=is_requeued, is_retried=self._is_retried)

    def first_session(self) -> MCPSession:
        """Return the session of the task's first server.

        Raises:
            ConfigurationError: The task names none, or it is not configured.
        """
        names = self._task.server_names()
        if not names:
            raise ConfigurationError(f"Task {self._task.name} names no MCP server: set mcp_server")
        return self.session(names[0])

    def session(self, server: str) -> MCPSession:
        """Return the session of one of the task's servers.

        Raises:
            ConfigurationError: The task does not name it, or it is not configured.
        """
        names = self._task.server_names()
        if server not in names:
            known = ", ".join(map(server_name, names)) or "none"
            raise ConfigurationError(f"Task {self._task.name} does not name this MCP server (it names {known})")
        settings = server_settings(self._conf, server)
        if settings.name not in self._sessions:
            handle = self._given.get(settings.name)
            lost_at = None if handle is None else self._lost_at(handle, settings.keepalive_seconds)
            journal = None if self._durable is None else self._durable.journal
            self._sessions[settings.name] = new_session(
                settings,
                handle,
                self.session,
                ledger=self,
                lost_at=lost_at,
                journal=journal,
                asked=self.asked(),
                callers=self.callers,
                tell=self._signal,
            )
        return self._sessions[settings.name]

    def asked(self) -> "Asked":
        """Return what answers the servers of this execution, and takes what they tell.

        Raises:
            ConfigurationError: A setting is wrong.
        """
        from .asked import Asked, current_call  # noqa: PLC0415 - publishing a task must not load the MCP SDK

        if self._asked is None:
            task, request = self._task, self._request
            level = log_level(self._conf, task.mcp_log_level)
            interval_seconds = progress_interval_seconds(self._conf)
            progress = None
            if interval_seconds is not None and has_state(task, request):
                progress = TaskProgress(
                    task,
                    request,
                    self.callers,
                    interval_seconds=interval_seconds,
                    current_call=current_call,
                    is_superseded=self._has_lost_lease,
                )
            self._asked = Asked(task, self.callers, get_task_logger(task.name), progress=progress, log_level=level)
        return self._asked

    def given_handle(self) -> SessionHandle | None:
        """Return what a function with a parameter `mcp_session` gets: the handle for its server, if one came."""
        return next(filter(None, (self._given.get(server_name(name)) for name in self._task.server_names())), None)

    def handles(self) -> list[SessionHandle]:
        """Return the handles of all sessions that this execution holds now."""
        used = {server: session.handle for server, session in self._sessions.items()}
        held = [handle for handle in {**self._given, **used}.values() if handle is not None]
        return [replace(handle, shared=True) if handle.key in self._shared else handle for handle in held]

    def carried(self) -> Carried:
        """Return what another attempt of this execution gets."""
        return Carried(handles=self.handles(), holder=self._holder, at=time.time())

    # -- Told by the sessions

    def opened(self, handle: SessionHandle) -> None:
        """Record a session before its first call."""
        if self._request.is_eager and shared_now.get() is None:
            warn_of_eager()
        self._hold(handle)

    def closed(self, handle: SessionHandle) -> None:
        """Forget a session that has ended at its server."""
        self._forget(handle)
        self._tally.closed(handle)

    def detached(self, handle: SessionHandle) -> None:
        """Leave a session to whoever has its handle now."""
        if self._forget(handle):
            self._tally.detached(handle)

    @property
    def _signal(self) -> Callable[[Event], None]:
        return partial(send, self._task, self._request.id)

    # -- What becomes of the sessions

    def succeed(self) -> None:
        """Pass each session on to what comes next, or end it where nothing does."""
        if not self.is_handed_on:
            ahead = self._canvas.ahead_of(self._request)
            # What comes next may turn out not to be publishable, and then this task has failed.
            ahead.errbacks += self._canvas.errbacks_of(self._request)
            self._settle(ahead, "done")
            self.is_settled = True
            if self._durable is not None:
                self._durable.wait_for_claim()

    def bind_replacement(self, signature: Signature) -> None:
        """Pass each session on to what replaces this task, or end it where nothing there takes one."""
        # The last task of it has the ID of this one; Celery says so to the outermost tasks only.
        nesting = (self._request.get("replaced_task_nesting") or 0) + 1
        for task in self._canvas.all_in(signature):
            task.setdefault("options", {})["replaced_task_nesting"] = nesting
        self._settle(self._canvas.within(signature), "replaced")
        self.is_handed_on = True

    def branch(self, signature: Signature) -> None:
        """Pass each session on to *signature*, and keep it as well."""
        self._branches += 1
        for handle in self.handles():
            self._share(handle, self._canvas.within(signature), f"branch{self._branches}")

    def bind_ahead(self) -> None:
        """Pass each session that was opened here on to what comes next, and keep it as well."""
        ahead = self._canvas.ahead_of(self._request)
        for handle in self.handles():
            if handle.key not in self._brought and handle.key not in self._shared:
                self._share(handle, ahead, "next")

    def retry(self) -> None:
        """The next attempt continues the sessions; this one may go on, where Celery does not raise `Retry`."""
        self._is_retried = True
        if self.is_handed_on:
            return
        self.is_handed_on = True
        for handle in self.handles():
            self._held.pop(handle.key, None)
            step = self._step(handle, "retried")
            # The next attempt may have ended by now, and the session with it: nothing begins anew here.
            self._tally.change(handle, replace(step, leaving=(), create=False))

    def end(self, exc: BaseException) -> None:
        """The task function, or what was done for it, has raised *exc*."""
        if isinstance(exc, Retry):
            self.retry()
        elif isinstance(exc, Reject):
            self.reject(requeue=exc.requeue)
        elif isinstance(exc, Ignore):
            self.ignore()
        else:
            self.fail(exc)

    def ignore(self) -> None:
        """`Ignore` was raised: by `replace`, or to end the workflow here."""
        if not self.is_handed_on:
            self._end("ignored")

    def reject(self, *, requeue: bool) -> None:
        """The message goes back to the queue with what it brought, or it is dead. What was opened here ends."""
        if not requeue:
            self._end("rejected")
            return
        if self._durable is not None:
            self._held.clear()  # what was opened here, the next run goes on with
            return
        for key in self._brought:
            self._held.pop(key, None)
        for handle in self.handles():
            if handle.key not in self._brought:
                self._pass_on(handle, self._step(handle, "rejected"))
        self._let_go_of_lost("rejected")

    def fail(self, exc: BaseException) -> None:
        """Pass all sessions on to the errbacks, or end them where there are none."""
        errbacks = self._canvas.errbacks_of(self._request)
        is_for_others = bool(errbacks) or self._durable is not None
        if not isinstance(exc, Exception) and (self._task.acks_late or (is_for_others and self._tally.has_store())):
            # The process is being ended, with its worker perhaps. Where the task runs again, or its errbacks do, is
            # decided outside of it: by the worker's main process, which lets go of the sessions where neither does, or
            # by who gets the message next.
            self._held.clear()
        else:
            self._end("failed", errbacks)
            if isinstance(exc, Exception) and self._durable is not None:
                self._durable.wait_for_claim()
        self.is_handed_on = True

    def leave(self, outcome: str) -> None:
        """End what a task held that passes nothing on: what comes next has been bound before."""
        if self.is_handed_on:
            return
        if outcome == "done":
            self._settle(Ahead(), outcome)
        else:
            self._end(outcome)

    def release(self) -> None:
        """Let go of this process's end of each session."""
        for server, session in self._sessions.items():
            if session.is_lost and self._eager is not None:
                self._eager.pop(server, None)
            session.release()
        for handle in list(self._held.values()):
            # Neither passed on nor ended: closed by the task in vain, or left behind for another one.
            self._held.pop(handle.key, None)
            self._tally.abandoned(handle)

    def end_carried(self, handle: SessionHandle, never: Iterable[str], errbacks: Mapping[str, str]) -> None:
        """End a session that was bound to the tasks *never*, which will not run, and to *errbacks*, which do."""
        self._pass_on(handle, Change(leaving=list(never), joining=errbacks))

    # -- Within

    def _settle(self, ahead: Ahead, outcome: str) -> None:
        for handle in self.handles():
            bound = self._bind(handle, ahead.tasks, ahead.errbacks)
            self._pass_on(handle, self._step(handle, outcome, joining=bound))
        self._let_go_of_lost(outcome)

    def _end(self, outcome: str, errbacks: Sequence[Signature] = ()) -> None:
        """The sessions go on to errbacks only, and to those of the body of a chord that will never run."""
        hopeless = self._canvas.hopeless_after(self._request)
        # Celery does not hear of a task that is ignored: its chord never ends, and calls no errbacks, whoever fails.
        is_silent = outcome == "ignored"
        untold = [*hopeless.untold, *(hopeless.errbacks if is_silent else ())]
        given_up = carried([*hopeless.tasks, *untold])
        never = {handle.key: holders for handle, holders in given_up}
        takes_over = {handle.key: holders for handle, holders in carried(() if is_silent else hopeless.errbacks)}
        own = set(self._held) | {handle.key for handle in self.handles()}
        for handle in self.handles():
            joining = {**self._bind(handle, errbacks, kind="failed"), **takes_over.get(handle.key, {})}
            self._pass_on(handle, self._step(handle, outcome, never.get(handle.key, ()), joining))
        self._let_go_of_lost(outcome, never)
        for handle, holders in given_up:
            if handle.key not in own:  # detached here, or passed by: this task has another one of that server
                self.end_carried(handle, holders, takes_over.get(handle.key, {}))

    def _bind(
        self, handle: SessionHandle, tasks: Sequence[Signature], errbacks: Sequence[Signature] = (), kind: str = "next"
    ) -> dict[str, str]:
        """Bind into *tasks*, and return those bound; into *errbacks* as well, of which only failures make holders."""
        parent = journal_id(self._request) if self._request.id else self._holder
        bound = bind(handle, tasks, f"{parent}/{kind}")
        if len(bound) > 1 and not handle.shared:
            handle = replace(handle, shared=True)
            bind(handle, tasks, f"{parent}/{kind}")
        if bound:
            bind(handle, errbacks, f"{parent}/{kind}/errback", tentative=True)
        return bound

    def _pass_on(self, handle: SessionHandle, change: Change) -> None:
        """Give way to other holders; end the session where there are none."""
        if handle.session_id is None:
            return
        self._held.pop(handle.key, None)
        if self._eager is not None and handle.key not in self._given_by_user:
            if not change.joining:
                self._eager[handle.server] = (self._task, handle)
            return
        standing = self._tally.change(handle, change)
        # Where it never was a holder itself, or runs again after its worker was lost, somebody else may have ended what
        # the store does not know any more.
        is_alone = _is_uncounted(standing) and not handle.shared and not change.joining
        is_known = standing is None or self._holder in change.leaving
        if standing is Standing.LAST or (is_alone and is_known and handle.key not in self._recovered):
            self._close(handle)
        elif handle.shared or len(change.joining) > 1:
            self._tally.warn_if_uncounted(handle, standing)

    def _share(self, handle: SessionHandle, ahead: Ahead, kind: str) -> None:
        shared = replace(handle, shared=True)
        if handle.session_id is not None and (bound := self._bind(shared, ahead.tasks, ahead.errbacks, kind)):
            self._shared.setdefault(handle.key, []).extend(bound.values())
            self._tally.warn_if_uncounted(handle, self._tally.share(handle, bound))

    def _hold(self, handle: SessionHandle) -> None:
        self._held[handle.key] = handle
        self._tally.hold(handle, is_opened_here=handle.key not in self._brought)

    def _hold_if_alive(self, handle: SessionHandle) -> None:
        """Join the holders of a session; where it has ended meanwhile, this execution has none of that server."""
        if not self._tally.hold_if_alive(handle):
            self._given.pop(handle.server, None)
            self._held.pop(handle.key, None)
            self._brought.discard(handle.key)

    def _forget(self, handle: SessionHandle) -> bool:
        """Return whether this execution has held the session."""
        if self._eager is not None:
            self._eager.pop(handle.server, None)
        return self._held.pop(handle.key, None) is not None

    def _let_go_of_lost(self, outcome: str, never: Mapping[str, Iterable[str]] = MappingProxyType({})) -> None:
        lost = {server for server, session in self._sessions.items() if session.is_lost}
        for handle in [held for held in self._held.values() if held.server in lost]:
            self._held.pop(handle.key)
            step = self._step(handle, outcome, never.get(handle.key, ()), when_empty=Leaving.LOST)
            self._tally.change(handle, step)

    def _close(self, handle: SessionHandle) -> None:
        try:
            session = self._sessions.get(handle.server)
            if session is None or session.handle is None or session.handle.key != handle.key:
                settings = settings_of(self._task, handle)
                session = self._sessions[handle.server] = new_session(settings, handle, ledger=self, tell=self._signal)
            session.end()
        except (MCPCeleryError, SoftTimeLimitExceeded) as exc:
            # The soft time limit too: the task is done, and its outcome is not changed by this.
            logger.warning("A session is left to the reaper, or to the idle timeout of its server: %s", exc)

    @property
    def _conf(self) -> Conf:
        conf: Conf = self._task.app.conf
        return conf

    def _lost_at(self, handle: SessionHandle, keepalive_seconds: float) -> float | None:
        """Return when a ping has found the session lost. Asked only where one can have been sent meanwhile."""
        if not keepalive_seconds or time.time() - self._bound_at < keepalive_seconds:
            return None
        return self._tally.lost_at(handle)

    def _step(
        self,
        handle: SessionHandle,
        outcome: str,
        never: Iterable[str] = (),
        joining: Mapping[str, str] = MappingProxyType({}),
        *,
        when_empty: Leaving = Leaving.CLOSE,
    ) -> Change:
        """This execution and those that will *never* run leave, others join; and the history says what was done."""
        session = self._sessions.get(handle.server)
        step = {
            **self._tally.event("step"),
            "at": self._started,
            "until": time.time(),
            "outcome": outcome,
            "to": [*self._shared.get(handle.key, ()), *joining.values()],
            "calls": [call._asdict() for call in session.calls] if session is not None else [],
        }
        return Change(
            leaving=[self._holder, *never],
            joining=joining,
            may_return=outcome == "replaced",
            when_empty=when_empty,
            create=not handle.shared and handle.key not in self._recovered,
            events=[step],
            **of_server(self._task, handle),
        )


def _is_uncounted(standing: Standing | None) -> bool:
    """Whether the store cannot say who holds a session. Then one that is not shared is its holder's alone."""
    return standing in {None, Standing.UNCOUNTED}
