"""One trial: a canvas run with plain tasks, then with MCP tasks in a chosen order, and all invariants checked."""

import gc
import re
from collections.abc import Callable, Sequence
from typing import Any, Self

import pytest
from canvases import Canvas, signature
from executor import Choose, Executor, gate
from hypothesis import note
from invariants import Event, ViolationError, check_ends, check_flow, check_same, outcome
from quick_server import QuickServer
from redis import Redis
from steps import new_app

from mcp_celery.redis_store import RedisStore


class Trials:
    """What trials need: a quick MCP server, a Valkey for results and sessions, an executor for each kind of task."""

    def __init__(self, url: str) -> None:
        self._client = Redis.from_url(url, decode_responses=True)
        self.journal: list[Event] = []
        self._server = QuickServer(self.journal)
        self._patch = pytest.MonkeyPatch()
        self._url = url

    def __enter__(self) -> Self:
        self._server.__enter__()
        self._plain, self._mcp = (self._new_executor(has_sessions=has_sessions) for has_sessions in (False, True))
        # What a task tells the store may come before or after what others do.
        for name in ("change", "ended"):
            self._patch.setattr(RedisStore, name, _between_gates(getattr(RedisStore, name)))
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._patch.undo()
        for executor in (self._plain, self._mcp):
            executor.close()
        gc.collect()
        self._client.close()
        self._server.__exit__(*exc_info)

    def run_plain(self, canvas: Canvas) -> tuple[list[Event], Any]:
        """Return the journal and the outcome of *canvas* with plain tasks, one after the other."""
        return self._run(self._plain, canvas, lambda _: 0)

    def check(self, canvas: Canvas, choose: Choose) -> None:
        """Run *canvas* in the order that *choose* chooses.

        Raises:
            ViolationError: An invariant does not hold.
        """
        plain = self.run_plain(canvas)
        check_run(canvas, plain, self._run(self._mcp, canvas, choose), stored(self._client))

    def _run(self, executor: Executor, canvas: Canvas, choose: Choose) -> tuple[list[Event], Any]:
        self._client.flushdb()
        self.journal.clear()
        result = executor.run(lambda: signature(canvas, executor.app).apply_async(), choose)
        try:
            return list(self.journal), outcome(result)
        finally:
            executor.forget_results()

    def _new_executor(self, *, has_sessions: bool) -> Executor:
        app = new_app(
            "memory://", self._url, self._server.url, self.journal.append, pause=gate, has_sessions=has_sessions
        )
        # One backend for all threads, which come and go.
        app.conf.result_backend_thread_safe = True
        return Executor(app)


def check_run(
    canvas: Canvas, plain: tuple[Sequence[Event], Any], run: tuple[Sequence[Event], Any], kept: Sequence[str]
) -> None:
    """Check all invariants of a *run* of *canvas* that is over, against one with *plain* tasks.

    Both are a journal and an outcome; *kept* is what the store has by now.

    Raises:
        ViolationError: An invariant does not hold.
    """
    journal, result = run
    for event in journal:
        note(" ".join(str(event[name]) for name in ("what", "label", "session", "sessions", "how") if name in event))
    check_ends(journal)
    check_flow(canvas, journal)
    check_same(plain, journal, result)
    if kept:
        raise ViolationError(f"the store keeps {kept}")


def stored(client: Redis) -> list[str]:
    """The keys of the store, without those that tell of workers."""
    return [name for name in client.scan_iter("{mcp_celery}:*") if not re.search(":leader:|:tasks$", name)]


def _between_gates(method: Callable[..., Any]) -> Callable[..., Any]:
    def gated(*args: Any, **kwargs: Any) -> Any:
        gate()
        try:
            return method(*args, **kwargs)
        finally:
            gate()

    return gated
