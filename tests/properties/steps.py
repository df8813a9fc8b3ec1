"""The tasks of which random canvases are made: each does what its step says, and notes what it was given."""

import time
import zlib
from collections.abc import Callable
from typing import Any

from canvases import MAX_RETRIES, SERVERS, Step, from_json, signature
from celery import Celery, Task
from celery.exceptions import Ignore, Reject

from mcp_celery import MCPTask

#: Takes what happens, as JSON types.
Note = Callable[[dict[str, Any]], object]


class StepError(Exception):
    """Raised by a step that is to fail."""


class NotYetError(Exception):
    """Raised by a step that is to be retried by itself."""


def new_app(
    broker: str, backend: str, url: str, note: Note, *, pause: Callable[[], object], has_sessions: bool
) -> Celery:
    """Return an app with the tasks; without sessions, all of them are plain ones.

    A step calls *pause* between its start and its end.
    """
    app = Celery("steps", broker=broker, backend=backend, set_as_current=False)
    app.conf.update(
        mcp_servers={server: {"url": url} for server in SERVERS},
        mcp_history_seconds=0,
        # A message that is given back is delivered again.
        task_acks_late=True,
        task_allow_error_cb_on_chord_header=True,
        broker_connection_retry_on_startup=True,
        worker_prefetch_multiplier=1,
    )

    def step(self: Task, *inputs: Any, spec: dict[str, Any]) -> Any:
        return Run(self, spec, inputs, note, pause).run()

    def called_back(request: Any, exc: BaseException, traceback: Any, spec: dict[str, Any]) -> Any:
        task = app.tasks["mcp.called_back" if spec["is_mcp"] else "plain.called_back"]
        return Run(task, spec, (), note, pause, failed=request.id).run()

    def declare(kind: str, base: type[Task], **options: Any) -> None:
        task = {"base": base, "shared": False, **options}
        app.task(step, bind=True, name=f"{kind}.step", **task)
        retried = {"autoretry_for": (NotYetError,), "retry_backoff": False, "default_retry_delay": 0}
        app.task(step, bind=True, name=f"{kind}.auto_step", max_retries=MAX_RETRIES, **retried, **task)
        app.task(called_back, name=f"{kind}.called_back", **task)

    declare("plain", Task)
    declare("mcp", *((MCPTask,) if has_sessions else (Task,)), **({"mcp_servers": SERVERS} if has_sessions else {}))
    app.finalize()
    return app


class Run:
    """One run of one step."""

    def __init__(
        self,
        task: Any,
        spec: dict[str, Any],
        inputs: tuple[Any, ...],
        note: Note,
        pause: Callable[[], object],
        failed: str | None = None,
    ) -> None:
        self._task = task
        self._step: Step = from_json(spec)
        self._inputs = inputs
        self._note = note
        self._pause = pause
        self._is_direct = failed is not None
        request = task.request
        self._has_sessions = isinstance(task, MCPTask)
        self._known = {
            "label": self._step.label,
            "id": None if self._is_direct else request.id,
            "parent": failed if self._is_direct else request.parent_id,
            "attempt": 0 if self._is_direct else request.retries,
            "redelivered": not self._is_direct and bool(request.delivery_info.get("redelivered")),
            # Of a failed task, an errback gets the ID, which is another one each time.
            "inputs": 0 if self._step.role != "step" else zlib.crc32(repr(inputs).encode()),
        }

    def run(self) -> Any:
        self._say("starts")
        self._use(self._step.at_start)
        self._pause()
        self._use(self._step.at_end)
        if self._known["attempt"] < self._step.retries:
            self._say("ends", how="retries")
            if self._step.is_auto:
                raise NotYetError(self._step.label)
            raise self._task.retry(exc=NotYetError(self._step.label), countdown=0, max_retries=MAX_RETRIES)
        if self._step.replacement is not None:
            self._say("ends", how="is replaced")
            return self._task.replace(signature(self._step.replacement, self._task.app))
        is_again = self._known["redelivered"]
        self._say("ends", how="returns" if self._step.end == "requeues" and is_again else self._step.end)
        match self._step.end:
            case "raises":
                raise StepError(self._step.label)
            case "ignores":
                raise Ignore
            case "rejects":
                raise Reject(self._step.label, requeue=False)
            case "requeues" if not is_again:
                raise Reject(self._step.label, requeue=True)
        return f"{self._step.label}:{self._known['inputs']:08x}"

    def _use(self, servers: tuple[str, ...]) -> None:
        if self._has_sessions:
            for server in servers:
                self._task.mcp[server].call_tool("echo", {"text": "x"})

    def _say(self, what: str, **more: Any) -> None:
        self._note({"what": what, "at": time.monotonic(), **self._known, "sessions": self._sessions(), **more})

    def _sessions(self) -> dict[str, str]:
        """What the task holds: server to session, in its short form."""
        if not self._has_sessions:
            return {}
        handles = {server: self._task.mcp[server].handle for server in SERVERS}
        return {server: handle.short_id for server, handle in handles.items() if handle is not None}
