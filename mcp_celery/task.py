"""`MCPTask`: the task base class, and one execution of such a task."""

import inspect
from collections.abc import Callable, Sequence
from functools import cache, partial
from typing import Any, Literal

from celery import Task, current_task, uuid
from celery.exceptions import TaskPredicate

from . import lifecycle  # noqa: F401 - connects to Celery's signals
from .async_session import NOT_HERE, AwaitedSession
from .async_tasks import await_task, call_function, defer, request_in_context
from .exceptions import ConfigurationError, SessionError, SessionHandleError
from .execution import Execution, execution_of
from .handle import SessionHandle, server_name
from .known_tasks import brought_by, canvas_of
from .portal import is_green
from .redis_store import get_store
from .sync_session import MCPSession
from .unexecuted import REFUSED, hold_given, never_published
from .workflow import KEY, MAPS, Given, read, shown


class MCPTask(Task):
    """A task whose MCP session belongs to the workflow, not to the worker.

    The first use of `self.mcp` opens a session. The MCP tasks that follow, on whatever worker, resume it; when the
    last of them has ended, well or badly, the session is ended at the server.

        class BrowserTask(MCPTask):
            mcp_server = "browser"

        @app.task(base=BrowserTask, bind=True)
        def open_page(self, url):
            self.mcp.call_tool("browser_navigate", {"url": url})

    The function may be `async def`: `await self.amcp.call_tool(...)`. It runs on the event loop of the process.

    The handle of the session travels in the reserved keyword argument `mcp_session`. Give it yourself to continue a
    session that you keep: `step.s(x, mcp_session=handle)`. The function sees it only if it has such a parameter.

    A class may define what answers its servers while a call is under way. Servers are told of those methods that are
    defined when the session is opened; what there is no method for is declined. They run in the task's thread, and on
    the event loop where they are coroutine functions. What they raise ends the call; an `MCPError` is an answer.

        def on_sampling(self, params):      # CreateMessageRequestParams -> CreateMessageResult, a text, or None
        def on_elicitation(self, params):   # ElicitRequestFormParams or ...URLParams -> ElicitResult, a dict, or None
        def on_list_roots(self):            # -> ListRootsResult, or a list of Roots, file:// URIs and paths
        def on_log(self, params):           # LoggingMessageNotificationParams; without it, the task's logger gets them
    """

    abstract = True

    #: The MCP server that `self.mcp` talks to: a name in `app.conf.mcp_servers`, or a URL.
    mcp_server: str | None = None
    #: More servers: `self.mcp["name"]` is the session of one, and `self.mcp` that of the first named.
    mcp_servers: tuple[str, ...] = ()

    #: Keep a journal of the calls, so that a task whose worker is killed repeats none of them. "redelivery" has a retry
    #: repeat them. None: as the setting `mcp_durable` says.
    mcp_durable: bool | Literal["redelivery"] | None = None
    #: What becomes of a call that may have run and cannot be continued: "raise" (`CallInterruptedError`), or
    #: "call-again". None: as the setting says.
    mcp_on_interrupted: Literal["raise", "call-again"] | None = None

    #: Which logs servers are asked for: "debug", "info", ... None: as the setting `mcp_log_level` says.
    mcp_log_level: str | None = None

    # Keeps handles out of what `celery inspect` and a result of a lost worker show.
    Request = "mcp_celery.worker:MCPRequest"

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if not isinstance(cls.mcp_server, str | None) or isinstance(cls.mcp_servers, str):
            raise ConfigurationError("mcp_server is the name of one server; several go into mcp_servers, as a tuple")
        header = cls.__dict__.get("__header__")
        if header is not None:
            cls.__header__ = staticmethod(_without_session(header.__func__))

    @classmethod
    def on_bound(cls, app: Any) -> None:
        """Have the workers of *app* look after the sessions of its tasks."""
        app.steps["worker"].add("mcp_celery.bootstep:ReaperStep")
        app.on_after_finalize.connect(_shield_maps)

    # -- In the task function

    @property
    def mcp(self) -> MCPSession:
        """The MCP session of this execution, opened or resumed at its first call.

        Raises:
            ConfigurationError: No server is named, it is not configured, or no execution is under way.
        """
        execution = execution_of(self.request)
        if execution is None:
            raise ConfigurationError(
                f"self.mcp is there while task {self.name} runs, in the thread that runs it; for other threads, take "
                "it first: mcp = self.mcp"
            )
        return execution.first_session()

    @property
    def amcp(self) -> AwaitedSession:
        """The same session for an `async def` function: with `await`.

        Raises:
            ConfigurationError: As `mcp`.
            SessionError: This is not the event loop on which `async def` tasks run.
        """
        session = self.mcp.awaited
        if not session.is_here():
            raise SessionError(NOT_HERE)
        return session

    def _get_request(self) -> Any:
        """Return the request of this execution; Celery knows it by thread, and coroutines share one."""
        found = self.request_stack.top
        if found is None:
            found = request_in_context(self.name)
        return super()._get_request() if found is None else found

    request = property(_get_request)

    # -- Around it

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Execute the task, for a worker or as a plain function call; then its sessions go on or end."""
        if not self.request.called_directly and execution_of(self.request) is None:
            return self._execute(args, kwargs)
        awaited = await_task(self, partial(self._call_directly, args, kwargs))
        return self._call_directly(args, kwargs) if awaited is None else awaited

    def _call_directly(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        # Called as a function, perhaps within another execution of this very task, whose request would be copied.
        given = Given(kwargs.pop(KEY, None))
        own = {"args": args, "kwargs": kwargs, "called_directly": True}
        self.push_request(**own, callbacks=None, errbacks=None, chain=None, chord=None)
        self.request.mcp_session = given
        try:
            mapping = execution_of(current_task.request) if current_task and current_task.name in MAPS else None
            if mapping is None or mapping.is_handed_on:  # by now: this is an errback
                return self._execute(args, kwargs)
            return self._execute_item(mapping, args, kwargs)
        finally:
            self.pop_request()

    def _execute(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        brought = brought_by(self.request)
        self._check_servers(brought.given, kwargs)
        if (store := get_store(self.app.conf)) is not None:
            store.check()  # a mistake in its settings shows before anything is sent
        execution = self.request.mcp_execution = Execution(self, self.request, brought, canvas_of(self.app))
        try:
            execution.begin()
            # Not super().__call__, which would push a second request. autoretry_for wraps run.
            result = call_function(self, args, self._with_session(kwargs, execution))
            execution.check()
            execution.succeed()
        except BaseException as exc:
            if (instead := execution.superseded_by(exc)) is not None:
                raise instead from exc
            execution.end(exc)
            raise
        else:
            return result
        finally:
            execution.release()

    def _execute_item(self, mapping: Execution, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Execute the task for one item of a mapped list: all items share the sessions of Celery's task that maps."""
        self.request.mcp_execution = mapping
        try:
            mapping.begin_item()
            result = call_function(self, args, self._with_session(kwargs, mapping))
            mapping.check()
        except BaseException as exc:
            if (instead := mapping.superseded_by(exc)) is not None:
                raise instead from exc
            if not isinstance(exc, TaskPredicate):  # Retry, Ignore or Reject: no errback is called
                mapping.fail(exc)
            raise
        mapping.bind_ahead()
        return result

    def _with_session(self, kwargs: dict[str, Any], execution: Execution) -> dict[str, Any]:
        return {**kwargs, KEY: execution.given_handle()} if _asks_for_session(type(self).run) else kwargs

    # -- On the way to a worker

    def apply_async(
        self, args: Any = None, kwargs: Any = None, task_id: str | None = None, *rest: Any, **options: Any
    ) -> Any:
        """Publish the task, as Celery does. A handle in `mcp_session` is checked, and shown only as a hash.

        Raises:
            SessionHandleError: The handle cannot be read or is of another server than this task's.
        """
        value = (kwargs or {}).get(KEY)
        if value is None:
            return super().apply_async(args, kwargs, task_id, *rest, **options)
        brought = read(value)
        self._check_servers(brought.given, kwargs)
        task_id = task_id or uuid()
        with hold_given(self, brought, task_id, in_group=bool(options.get("group_id"))) as carried:
            kwargs = {**kwargs, KEY: carried.to_json()}
            options["kwargsrepr"] = shown(kwargs)
            try:
                return super().apply_async(args, kwargs, task_id, *rest, **options)
            except REFUSED:
                if brought.holder is not None:
                    never_published(self, brought.holder, options)
                raise

    def _check_servers(self, given: Sequence[SessionHandle], kwargs: dict[str, Any]) -> None:
        """A handle that was given to this very task has to be of one of its servers; carried ones need not."""
        names = {server_name(server) for server in self._servers_for(kwargs)}
        for handle in given:
            if handle.server not in names:
                known = ", ".join(sorted(names)) or "none"
                raise SessionHandleError(
                    f"The session handle is of server {handle.server!r}, and task {self.name} uses {known}"
                )

    def server_names(self) -> tuple[str, ...]:
        """Return the servers of this task as they are written in its options, the first one first."""
        return tuple(self.mcp_servers) if self.mcp_server is None else (self.mcp_server, *self.mcp_servers)

    def _servers_for(self, _kwargs: dict[str, Any]) -> tuple[str, ...]:
        """Return the servers of an execution with these arguments."""
        return self.server_names()

    def signature_from_request(self, request: Any = None, *args: Any, **options: Any) -> Any:
        """Return the signature of a retry, with the session of this attempt."""
        request = self.request if request is None else request
        signature = super().signature_from_request(request, *args, **options)
        execution = execution_of(request)
        # In the worker's main process (a lost worker is retried there) nothing was executed.
        carried = execution.carried() if execution else brought_by(request)
        if carried.all:
            signature["kwargs"] = {**signature["kwargs"], KEY: carried.to_json()}
        return signature

    def retry(self, *args: Any, **kwargs: Any) -> Any:
        """Retry the task, as Celery does; the next attempt resumes the session of this one."""
        if self.request.is_eager or is_green():
            # The next attempt is executed right now; or what publishes it is made for greenlets.
            defer(partial(self.retry, *args, **kwargs))
        execution = execution_of(self.request)
        if execution is not None and (instead := execution.superseded_by(None)) is not None:
            raise instead
        retry = super().retry(*args, **kwargs)
        # With throw=False: the next attempt is on its way while this one goes on.
        if execution is not None:
            execution.retry()
        return retry

    def on_replace(self, sig: Any) -> Any:
        """Replace the task, as Celery does; the replacement gets the session.

        Celery has put into *sig* by now what followed this task, and the task IDs.
        """
        defer(partial(self.on_replace, sig))
        if (execution := execution_of(self.request)) is not None:
            execution.bind_replacement(sig)
        return super().on_replace(sig)

    def add_to_chord(self, sig: Any, lazy: bool = False) -> Any:
        """Add *sig* to the chord of this task, as Celery does; it gets the session, which this task keeps as well."""
        if self.request.chord and (execution := execution_of(self.request)) is not None:
            execution.branch(sig)
        return super().add_to_chord(sig, lazy)


def _shield_maps(sender: Any, **_: object) -> None:
    """Keep handles out of what workers show of Celery's tasks that map."""
    for name in MAPS:
        sender.tasks[name].Request = MCPTask.Request


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
    required = [parameter for parameter in signature.parameters.values() if parameter.default is parameter.empty]
    takes_failure = sum(parameter.kind <= parameter.POSITIONAL_OR_KEYWORD for parameter in required) > 1
    # Celery knows bound tasks by this class, and publishes them as errbacks with the ID of the failed task alone. Those
    # that cannot run so, since they want the request, the exception and the traceback, are called in place as others.
    return check if takes_failure or not isinstance(header, partial) else partial(check)
