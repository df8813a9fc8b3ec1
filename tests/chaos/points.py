"""Named points in the life of a task at which its process can be killed, from within and at that very point.

To arm a point for a step of a workflow, put a file `<point>@<step>` into the folder of the harness, with "child" or
"worker" in it: who is to be killed. The first process that comes by takes the file away, notes that in `killed`, and
sends SIGKILL, to itself or to the whole worker. The package knows nothing of this: its methods are wrapped here.
"""

import functools
import os
import signal
import time
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from celery import Celery
from celery.signals import after_task_publish, before_task_publish, task_prerun
from celery.worker.request import Request
from workload import Settings, current

from mcp_celery.exchange import Exchange
from mcp_celery.execution import Execution
from mcp_celery.http import Endpoint
from mcp_celery.redis_store import RedisStore

#: What the main process of a worker comes by; it can only be killed whole.
IN_MAIN = {"before the ack": "the child is done with it", "after the ack": "the message is gone"}
#: What is to come of a kill there, where the server gives tokens: with "interrupted" also a `CallInterruptedError`.
POINTS = {
    "before open": "right",
    "opened, before the record": "right",
    "recorded, before the journal": "right",
    "recorded, before the call": "right",
    "noted, before the call is sent": "interrupted",
    "call sent, before the token": "interrupted",
    "after the token": "right",
    "tool finished, before it is read": "right",
    "read, before the journal": "right",
    "in the journal": "right",
    "before the session goes on": "right",
    "session gone on, before the next step is published": "right",
    "next step published, before the result": "right",
    "result stored, before the chord is told": "right",
    "chord told, before its body is published": "right",
    "body published, before the chord is done": "right",
    "result stored, before the journal ends": "right",
    "journal ended": "right",
    "before DELETE": "right",
    "during DELETE": "right",
    "after DELETE": "right",
    **dict.fromkeys(IN_MAIN, "right"),
}
#: Where a server gives no tokens, a call that is under way at one of these may end in a `CallInterruptedError`.
IN_FLIGHT = {
    "noted, before the call is sent",
    "call sent, before the token",
    "after the token",
    "tool finished, before it is read",
    "read, before the journal",
}
#: Only where a session is opened, or ends.
AT_THE_FIRST_STEP = {name for name in POINTS if "open" in name or "recorded" in name}
AT_THE_LAST_STEP = {name for name in POINTS if "DELETE" in name}
#: Only at the last member of a chord's header to end.
AT_A_MEMBER = {name for name in POINTS if "chord" in name}
#: A session that was opened then is known to nobody: it is left to the idle timeout of its server.
ORPHANING = "opened, before the record"

LOG_SECONDS = 10


class Killer:
    """Kills this process, or the worker that it belongs to, where a point is armed."""

    def __init__(self, settings: Settings) -> None:
        self._armed = Path(settings.armed)
        self._log = Path(settings.executions)
        #: The step that runs in this process, or ran last.
        self.step = ""
        #: Whether the token of a call was kept, and whether the result of the step was stored, since it began.
        self.has_token = self.has_stored = False

    def begin(self, step: str) -> None:
        self.step, self.has_token, self.has_stored = step, False, False

    def reach(self, point: str, step: str | None = None) -> None:
        """Die here, if that was asked for."""
        path = self._armed / f"{point}@{step or self.step}"
        try:
            victim = path.read_text()
            path.unlink()
        except FileNotFoundError:
            return
        with (self._armed / "killed").open("a") as killed:
            killed.write(f"{time.time()} {victim} {path.name}\n")
        if victim == "worker":
            os.killpg(os.getpgrp(), signal.SIGKILL)
        os.kill(os.getpid(), signal.SIGKILL)

    def reach_once_logged(self, point: str, what: str) -> None:
        """Die here, if that was asked for, once the server has logged "start" or "end" of the call.

        Until then nothing goes on in this process, the event loop neither.
        """
        if not (self._armed / f"{point}@{self.step}").exists():
            return
        line = f'"what":"{what}","marker":"{current["marker"]}"'
        deadline = time.monotonic() + LOG_SECONDS
        while line not in self._log.read_text().replace(" ", ""):
            if time.monotonic() > deadline:
                raise TimeoutError(f"the server did not log {line}")
            time.sleep(0.01)
        self.reach(point)


def install(app: Celery, settings: Settings) -> None:
    """Wrap what a point lies before or behind."""
    killer = Killer(settings)
    _watch_celery(app, killer)
    _watch_store(killer)
    _watch_requests(killer, gives_tokens=settings.gives_tokens)
    _wrap(
        Execution,
        "succeed",
        before=lambda *_: killer.reach("before the session goes on"),
        after=lambda *_: killer.reach("session gone on, before the next step is published"),
    )


def _watch_celery(app: Celery, killer: Killer) -> None:
    @task_prerun.connect(weak=False)
    def _begin(kwargs: dict[str, Any], **_: object) -> None:
        killer.begin(kwargs.get("name", ""))

    @before_task_publish.connect(weak=False)
    def _publishes(**_: object) -> None:
        if killer.has_stored:
            killer.reach("chord told, before its body is published")

    @after_task_publish.connect(weak=False)
    def _published(**_: object) -> None:
        if killer.has_stored:
            killer.reach("body published, before the chord is done")
        else:
            killer.reach("next step published, before the result")

    def stored(_backend: Any, _task_id: str, _result: object, state: str, *_: object, **__: object) -> None:
        if state == "SUCCESS":
            killer.has_stored = True
            killer.reach("result stored, before the chord is told")

    _wrap(type(app.backend), "store_result", after=stored)
    _wrap(
        Request,
        "acknowledge",
        before=lambda request: killer.reach("before the ack", request._kwargs.get("name")),
        after=lambda request: killer.reach("after the ack", request._kwargs.get("name")),
    )


def _watch_store(killer: Killer) -> None:
    def before_change(_store: Any, _handle: Any, change: Any) -> None:
        if any(event["what"] == "opened" for event in change.events):
            killer.reach("opened, before the record")

    def reach_for(points: dict[str, str], fields: dict[str, str]) -> None:
        for name in fields:
            kind = name.partition(":")[0]
            if kind in points:
                killer.has_token = killer.has_token or kind == "token"
                killer.reach(points[kind])

    def before_write(_store: Any, _task: str, _owner: str, fields: dict[str, str], *_: object) -> None:
        reach_for({"session": "recorded, before the journal", "end": "read, before the journal"}, fields)

    def after_write(_store: Any, _task: str, _owner: str, fields: dict[str, str], *_: object) -> None:
        reach_for(
            {
                "session": "recorded, before the call",
                "call": "noted, before the call is sent",
                "token": "after the token",
                "end": "in the journal",
            },
            fields,
        )

    _wrap(RedisStore, "change", before=before_change)
    _wrap(RedisStore, "write_journal", before=before_write, after=after_write)
    _wrap(
        RedisStore,
        "end_journal",
        before=lambda *_, **__: killer.reach("result stored, before the journal ends"),
        after=lambda *_, **__: killer.reach("journal ended"),
    )
    _wrap(RedisStore, "ended", before=lambda *_: killer.reach("after DELETE"))


def _watch_requests(killer: Killer, *, gives_tokens: bool) -> None:
    stream, take_event = Endpoint.stream, Exchange._take_event

    @asynccontextmanager
    async def watched_stream(endpoint: Endpoint, method: str, **options: Any) -> Any:
        """The yield is where the server has begun to answer, and nothing of that was read."""
        called = (options.get("json") or {}).get("method")
        if called == "initialize":
            killer.reach("before open")
        elif method == "DELETE":
            killer.reach("before DELETE")
        async with stream(endpoint, method, **options) as response:
            if method == "DELETE":
                killer.reach("during DELETE")
            elif called == "tools/call":
                killer.reach_once_logged("call sent, before the token", "start")
                if not gives_tokens:
                    killer.reach_once_logged("after the token", "start")
                    killer.reach_once_logged("tool finished, before it is read", "end")
            yield response

    async def watched_take_event(exchange: Exchange, event: Any) -> None:
        if killer.has_token and exchange.request.method == "tools/call":
            killer.reach_once_logged("tool finished, before it is read", "end")
        await take_event(exchange, event)

    Endpoint.stream, Exchange._take_event = watched_stream, watched_take_event


def _wrap(owner: type, name: str, *, before: Any = None, after: Any = None) -> None:
    original = getattr(owner, name)

    @functools.wraps(original)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        if before is not None:
            before(*args, **kwargs)
        result = original(*args, **kwargs)
        if after is not None:
            after(*args, **kwargs)
        return result

    setattr(owner, name, wrapper)
