"""`MCPTask`: the task base class, and one execution of such a task."""

import inspect
import logging
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from functools import cache
from typing import Any

from billiard.exceptions import SoftTimeLimitExceeded, Terminated, TimeLimitExceeded, WorkerLostError
from celery import Task
from celery.exceptions import Ignore, Reject, Retry
from celery.signals import task_failure, task_prerun, worker_process_shutdown, worker_shutdown
from kombu.exceptions import EncodeError

from .exceptions import ConfigurationError, MCPCeleryError, SessionHandleError, StoreError
from .handle import SessionHandle, server_name
from .portal import close_portal
from .settings import server_settings, store_url
from .store import RedisStore, Store
from .sync_session import MCPSession, new_session
from .workflow import KEY, Canvas, Given, Signature, bind, carried, read_handles, shown

logger = logging.getLogger(__name__)

#: What a worker's main process says of a task whose own process is gone, or was ended by it.
_FAILED_FROM_OUTSIDE = (Terminated, TimeLimitExceeded, WorkerLostError)


class MCPTask(Task):
    """A task whose MCP session belongs to the workflow, not to the worker.

    The first use of `self.mcp` opens a session. The MCP tasks that follow, on whatever worker, resume it; when the
    last of them has ended, well or badly, the session is ended at the server.

        class BrowserTask(MCPTask):
            mcp_server = "browser"

        @app.task(base=BrowserTask, bind=True)
        def open_page(self, url):
            self.mcp.call_tool("browser_navigate", {"url": url})

    The handle of the session travels in the reserved keyword argument `mcp_session`. Give it yourself to continue a
    session that you keep: `step.s(x, mcp_session=handle)`. The function sees it only if it has such a parameter.
    """

    abstract = True

    #: The MCP server that `self.mcp` talks to: a name in `app.conf.mcp_servers`, or a URL.
    mcp_server: str | None = None
    #: More servers: `self.mcp["name"]` is the session of one, and `self.mcp` that of the first named.
    mcp_servers: tuple[str, ...] = ()

    # Keeps handles out of what `celery inspect` and a result of a lost worker show.
    Request = "mcp_celery.worker:MCPRequest"

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        header = cls.__dict__.get("__header__")
        if header is not None:
            cls.__header__ = staticmethod(_without_session(header.__func__))

    # -- In the task function

    @property
    def mcp(self) -> MCPSession:
        """The MCP session of this execution, opened or resumed at its first call.

        Raises:
            ConfigurationError: No server is named, it is not configured, or no execution is under way.
        """
        execution = _execution(self.request)
        if execution is None:
            raise ConfigurationError(
                f"self.mcp is there while task {self.name} runs, in the thread that runs it; for other threads, take "
                "it first: mcp = self.mcp"
            )
        return execution.first_session()

    # -- Around it

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Execute the task, for a worker or as a plain function call; then its sessions go on or end."""
        if not self.request.called_directly and _execution(self.request) is None:
            return self._execute(args, kwargs)
        # Called as a function, perhaps within another execution of this very task, whose request would be copied.
        given = Given(kwargs.pop(KEY, None))
        self.push_request(args=args, kwargs=kwargs, called_directly=True, callbacks=None, chain=None, chord=None)
        self.request.mcp_session = given
        try:
            return self._execute(args, kwargs)
        finally:
            self.pop_request()

    def _execute(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        given = _given(self.request)
        self._check_server(given)
        store_url(self.app.conf)  # a mistake in it shows before anything is sent
        execution = self.request.mcp_execution = Execution(self, read_handles(given))
        if _asks_for_session(type(self).run):
            kwargs = {**kwargs, KEY: execution.given_handle()}
        try:
            try:
                # Not super().__call__, which would push a second request. autoretry_for wraps run.
                result = self.run(*args, **kwargs)
                execution.succeed()
            except Retry:
                raise
            except Reject as exc:
                execution.reject(requeue=exc.requeue)
                raise
            except Ignore:
                execution.ignore()
                raise
            except BaseException:
                execution.fail()
                raise
            return result
        finally:
            execution.release()

    # -- On the way to a worker

    def apply_async(self, args: Any = None, kwargs: Any = None, *rest: Any, **options: Any) -> Any:
        """Publish the task, as Celery does. A handle in `mcp_session` is checked, and shown only as a hash.

        Raises:
            SessionHandleError: The handle cannot be read or is of another server than this task's.
        """
        given = (kwargs or {}).get(KEY)
        if given is not None:
            self._check_server(given)
            wire = [handle.to_json() for handle in read_handles(given)]
            kwargs = {**kwargs, KEY: wire if isinstance(given, list | tuple) else wire[0]}
            options["kwargsrepr"] = shown(kwargs)
        return super().apply_async(args, kwargs, *rest, **options)

    def _check_server(self, given: Any) -> None:
        """A handle that was given to this very task has to be of one of its servers; carried ones need not."""
        if given is None or isinstance(given, list | tuple):
            return
        handle = SessionHandle.load(given)
        names = {server_name(server) for server in self.server_names()}
        if handle.server not in names:
            known = ", ".join(sorted(names)) or "none"
            raise SessionHandleError(
                f"The session handle is of server {handle.server!r}, and task {self.name} uses {known}"
            )

    def server_names(self) -> tuple[str, ...]:
        """Return the servers of this task as they are written in its options, the first one first."""
        return tuple(self.mcp_servers) if self.mcp_server is None else (self.mcp_server, *self.mcp_servers)

    def signature_from_request(self, request: Any = None, *args: Any, **options: Any) -> Any:
        """Return the signature of a retry, with the session of this attempt."""
        request = self.request if request is None else request
        signature = super().signature_from_request(request, *args, **options)
        execution = _execution(request)
        # In the worker's main process (a lost worker is retried there) nothing was executed.
        handles = execution.handles() if execution else read_handles(_given(request))
        if handles:
            signature["kwargs"] = {**signature["kwargs"], KEY: handles}
        return signature

    def retry(self, *args: Any, **kwargs: Any) -> Any:
        """Retry the task, as Celery does; the next attempt resumes the session of this one."""
        retry = super().retry(*args, **kwargs)
        # With throw=False: the next attempt is on its way while this one goes on.
        if (execution := _execution(self.request)) is not None:
            execution.hand_on()
        return retry

    def on_replace(self, sig: Any) -> Any:
        """Replace the task, as Celery does; the replacement gets the session.

        Celery has put into *sig* by now what followed this task, and the task IDs.
        """
        if (execution := _execution(self.request)) is not None:
            execution.bind_replacement(sig)
        return super().on_replace(sig)


class Execution:
    """One execution of an MCP task: the sessions it was given and those it opened, and what becomes of them.

    Belongs to `self.request`, so to one thread.
    """

    def __init__(self, task: Task, handles: Iterable[SessionHandle]) -> None:
        self._task = task
        self._request = task.request
        #: By server: what came with the message. Sessions of servers that this task does not use are passed on.
        self._given = {handle.server: handle for handle in handles}
        self._sessions: dict[str, MCPSession] = {}
        self._is_handed_on = False
        #: The task has succeeded, and its sessions were bound into what follows it, or ended.
        self.is_settled = False

    # -- In the task function

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
        return self._session(server)

    def _session(self, server: str) -> MCPSession:
        settings = server_settings(self._task.app.conf, server)
        if settings.name not in self._sessions:
            handle = self._given.get(settings.name)
            self._sessions[settings.name] = new_session(settings, handle, self.session)
        return self._sessions[settings.name]

    def given_handle(self) -> SessionHandle | None:
        """Return what a function with a parameter `mcp_session` gets: the handle for its server, if one came."""
        return next(filter(None, (self._given.get(server_name(name)) for name in self._task.server_names())), None)

    def handles(self) -> list[SessionHandle]:
        """Return the handles of all sessions that this execution holds now."""
        used = {server: session.handle for server, session in self._sessions.items()}
        return [handle for handle in {**self._given, **used}.values() if handle is not None]

    # -- What becomes of the sessions

    def succeed(self) -> None:
        """Pass each session on to what comes next, or end it where nothing does."""
        if not self._is_handed_on:
            self._settle(_canvas(self._task).ahead_of(self._request))
            self.is_settled = True

    def bind_replacement(self, signature: Signature) -> None:
        """Pass each session on to what replaces this task, or end it where nothing there takes one."""
        self._settle(_canvas(self._task).within(signature))
        self.hand_on()

    def hand_on(self) -> None:
        """Another execution continues the sessions."""
        self._is_handed_on = True

    def ignore(self) -> None:
        """`Ignore` was raised: by `replace`, or to end the workflow here."""
        if not self._is_handed_on:
            self.fail()

    def reject(self, *, requeue: bool) -> None:
        """The message goes back to the queue with what it brought, or it is dead. What was opened here ends."""
        for handle in self.handles():
            came_along = self._given.get(handle.server)
            if not (requeue and came_along is not None and came_along.session_id == handle.session_id):
                self._end(handle)

    def fail(self) -> None:
        """End all sessions: nothing comes after a failed task."""
        for handle in self.handles():
            self._end(handle)

    def release(self) -> None:
        """Let go of this process's end of each session."""
        for session in self._sessions.values():
            session.release()

    def _settle(self, following: Sequence[Signature]) -> None:
        for handle in self.handles():
            bound = bind(handle, following)
            if handle.shared:
                self._pass_on(handle, [self._request.id], bound)
            elif not bound:
                self._close(handle)
            elif len(bound) > 1:
                shared = replace(handle, shared=True)
                self._pass_on(shared, [], bind(shared, following))

    def _end(self, handle: SessionHandle) -> None:
        """This execution needs the session no more, and nothing follows that could."""
        if handle.shared:
            waiting = carried(_canvas(self._task).hopeless_after(self._request))
            # By the key: a load balancer may have changed the cookies since.
            hopeless = [holder for other, holders in waiting if other.key == handle.key for holder in holders]
            self._pass_on(handle, [self._request.id, *hopeless], [])
        else:
            self._close(handle)

    def end_carried(self, handle: SessionHandle, holders: Sequence[str]) -> None:
        """End a session that was bound to *holders*, which will never run."""
        if handle.shared:
            self._pass_on(handle, holders, [])
        else:
            self._close(handle)

    def _pass_on(self, handle: SessionHandle, leaving: Sequence[str], joining: Sequence[str]) -> None:
        """Count the holders of a session with several branches, and close it after the last one."""
        if handle.session_id is None:
            return
        try:
            store = _store(store_url(self._task.app.conf))
            holders = None if store is None else store.pass_on(handle.key, leaving, joining)
        except (ConfigurationError, StoreError) as exc:
            logger.debug("%s", exc)
            holders = None
        if holders is None:
            _warn_of_uncounted(handle.server)
        elif holders == 0:
            self._close(handle)

    def _close(self, handle: SessionHandle) -> None:
        try:
            session = self._sessions.get(handle.server)
            if session is None:
                settings = server_settings(self._task.app.conf, self._written(handle.server))
                session = self._sessions[handle.server] = new_session(settings, handle)
            session.close()
        except (MCPCeleryError, SoftTimeLimitExceeded) as exc:
            # The soft time limit too: the task is done, and its outcome is not changed by this.
            logger.warning("A session is left to the idle timeout of its server: %s", exc)

    def _written(self, server: str) -> str:
        """Return how this task's options write *server*: a URL may have credentials there, and not in a handle."""
        names = self._task.server_names() if isinstance(self._task, MCPTask) else ()
        return next((name for name in names if server_name(name) == server), server)


@task_prerun.connect
def _take_handles(task: Task, kwargs: dict[str, Any], **_: object) -> None:
    """Take the handles out of the arguments before anything else sees them: results hold arguments too.

    Celery sends this with the very mapping that it calls the function with and stores.
    """
    if isinstance(task, MCPTask):
        task.request.mcp_session = Given(kwargs.pop(KEY, None))


@task_failure.connect
def _end_what_was_carried_past(sender: Task, exception: BaseException, **_: object) -> None:
    """A plain task has failed, and sessions were bound past it: those that they wait for will never run.

    The same where an MCP task has bound its session, and its return value then turns out to fit into no message.

    Not in the main process of a worker, which does no MCP I/O and gets this for tasks whose own process is gone.
    """
    if isinstance(exception, _FAILED_FROM_OUTSIDE):
        return
    if isinstance(sender, MCPTask):
        execution = _execution(sender.request)
        if execution is None or not execution.is_settled:
            return
        if not isinstance(exception, EncodeError):
            # The broker broke off: what follows may have been published all the same.
            logger.warning("What follows task %s may not run; its sessions are left to their servers", sender.name)
            return
    canvas = _canvas(sender)
    waiting = [*canvas.ahead_of(sender.request), *canvas.hopeless_after(sender.request)]
    for handle, holders in carried(waiting):
        execution = Execution(sender, [handle])
        try:
            execution.end_carried(handle, holders)
        finally:
            execution.release()


@worker_process_shutdown.connect
@worker_shutdown.connect
def _close_portal(**_: object) -> None:
    close_portal()


def _canvas(task: Task) -> Canvas:
    return Canvas(lambda name: isinstance(task.app.tasks.get(name), MCPTask))


@cache
def _store(url: str | None) -> Store | None:
    return None if url is None else RedisStore(url)


@cache
def _warn_of_uncounted(server: str) -> None:
    """Once a process and server."""
    logger.warning(
        "A session of server %r goes on in several branches of a workflow, and no store counts who still holds it: "
        "it is left to the idle timeout of the server",
        server,
    )


def _given(request: Any) -> Any:
    given = getattr(request, "mcp_session", None)
    return given.value if isinstance(given, Given) else None


def _execution(request: Any) -> Execution | None:
    return getattr(request, "mcp_execution", None)


@cache
def _asks_for_session(function: Callable[..., Any]) -> bool:
    return KEY in inspect.signature(function).parameters


def _without_session(header: Callable[..., Any]) -> Callable[..., Any]:
    """Return the check of a task's arguments, which lets the reserved one pass unless the function declares it."""
    signature = inspect.signature(header)
    if KEY in signature.parameters:
        return header

    def check(*args: Any, **kwargs: Any) -> Any:
        kwargs.pop(KEY, None)
        return header(*args, **kwargs)

    # Celery looks at the arity of errbacks.
    check.__signature__ = signature  # type: ignore[attr-defined]  # a documented attribute of functions
    return check
