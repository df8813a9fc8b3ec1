"""What runs in a soak: tasks of all kinds, and workflows of them whose results are known beforehand."""

import asyncio
import json
import os
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from random import Random
from typing import Any, Self

from broker_settings import LOOKS_SOON
from celery import Celery, chain, chord, group
from celery.canvas import Signature

from mcp_celery import MCPTask, tool

#: A worker that was killed loses its messages for so long.
VISIBILITY_SECONDS = 20
#: Results, histories and sessions stay for so long: less than the soak takes, so that they do not pile up in it.
RESULT_SECONDS = 60
HISTORY_SECONDS = 30
SESSION_SECONDS = 45

#: The queue of the workers that are killed, and of those that are not.
QUEUES = ("killed", "spared")


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What a worker has to know."""

    broker: str
    store: str
    server: str

    def to_environment(self) -> dict[str, str]:
        return {"SOAK": json.dumps(asdict(self))}

    @classmethod
    def from_environment(cls) -> Self:
        return cls(**json.loads(os.environ["SOAK"]))


class SoakTask(MCPTask):
    """Has its messages put back where its process is killed."""

    mcp_server = "peer"
    acks_late = True
    reject_on_worker_lost = True
    default_retry_delay = 0


def note(self: Any, earlier: list[int], *, numbers: list[int], seconds: float) -> list[int]:
    """Note the numbers in the session; return them behind those of the steps before."""
    said = [self.mcp.call_tool("note", {"number": number, "seconds": seconds}) for number in numbers]
    return [*earlier, *(result.structured_content["result"] for result in said)]


async def note_at_once(self: Any, earlier: list[int], *, numbers: list[int], seconds: float) -> list[int]:
    """The same, and the calls are made at once."""
    call = partial(self.amcp.call_tool, "note")
    said = await asyncio.gather(*[call({"number": number, "seconds": seconds}) for number in numbers])
    return [*earlier, *(result.structured_content["result"] for result in said)]


def tally(self: Any, earlier: list[Any]) -> list[list[int]]:
    """Return what the steps before have said, and what the session has noted."""
    seen = self.mcp.call_tool("noted").structured_content["result"]
    return [sorted(set(_flat(earlier))), seen]


def total(earlier: list[Any]) -> list[int]:
    """Return what the branches have said; a plain task, and the sessions of the branches are not its own."""
    return sorted(set(_flat(earlier)))


def plain(earlier: Any) -> Any:
    """A task that knows nothing of sessions."""
    return earlier


def fail(self: Any, _: Any) -> None:
    self.mcp.call_tool("fail")


def mourn(self: Any, _: str) -> None:
    """An errback, which has the session of the failed task."""
    self.mcp.call_tool("noted")


def retry(self: Any, earlier: list[int], *, numbers: list[int]) -> list[int]:
    """Fail twice, with a call each time, before it goes well."""
    number = numbers[self.request.retries]
    self.mcp.call_tool("note", {"number": number, "seconds": 0.0})
    if self.request.retries < len(numbers) - 1:
        raise self.retry(exc=RuntimeError("not yet"))
    return [*earlier, *numbers]


def _flat(values: list[Any]) -> list[int]:
    return [number for value in values for number in (_flat(value) if isinstance(value, list) else [value])]


def new_app(settings: Settings) -> Celery:
    """Return the app, as a user who has workers killed configures it; what is kept, is not kept for long."""
    app = Celery("soak", broker=settings.broker, backend=settings.broker)
    transport = {
        "visibility_timeout": VISIBILITY_SECONDS,
        **LOOKS_SOON,
        "socket_keepalive": True,
        # As many as greenlets acknowledge at once.
        "max_connections": 100,
    }
    app.conf.update(
        mcp_servers={"peer": {"url": settings.server, "read_timeout_seconds": 30, "keepalive_seconds": 10}},
        mcp_store_url=settings.store,
        mcp_session_ttl_seconds=SESSION_SECONDS,
        mcp_history_seconds=HISTORY_SECONDS,
        mcp_reaper_interval_seconds=1,
        result_expires=RESULT_SECONDS,
        # One backend for all threads and greenlets of a process. Else each has its own, with connections that only the
        # garbage collector closes.
        result_backend_thread_safe=True,
        task_default_queue=QUEUES[0],
        # So is `mcp_celery.tool`.
        task_annotations={"mcp_celery.tool": {"acks_late": True, "reject_on_worker_lost": True}},
        worker_prefetch_multiplier=1,
        broker_transport_options=transport,
        result_backend_transport_options=transport,
        broker_connection_retry_on_startup=True,
        broker_connection_max_retries=None,
    )
    # Results are asked for, and not waited for. Celery (5.7) keeps those of the members of a group in the process that
    # has published it until they have come, for which nobody looks in a worker: they stay.
    app.backend.add_pending_result = _leave
    for is_durable in (False, True):
        options = {"base": SoakTask, "bind": True, "shared": False, "mcp_durable": is_durable}
        for function in (note, note_at_once, tally, fail, mourn, retry):
            app.task(function, name=_name(function, durable=is_durable), **options)
    for function in (plain, total):
        app.task(function, name=_name(function), shared=False, acks_late=True, reject_on_worker_lost=True)
    app.finalize()
    return app


def _leave(result: Any, **_: object) -> Any:
    return result


def _name(function: Callable[..., Any], *, durable: bool = False) -> str:
    return f"soak.{'durable_' if durable else ''}{function.__name__}"


@dataclass(frozen=True)
class Flow:
    """A workflow that was made, and what is right for it: a result, or the name of an error."""

    shape: str
    signature: Signature
    result: Any = None
    error: str | None = None


class Author:
    """Makes workflows of each shape in turn. Numbers are given out once."""

    def __init__(self, app: Celery, random: Random) -> None:
        self._app = app
        self._random = random
        self._last = 0
        self._made = 0
        #: How many there are in all workflows.
        self.durable_tasks = 0
        self._shapes: list[Callable[[], Flow]] = [
            self._chain,
            self._durable_chain,
            self._async_chain,
            self._durable_async_chain,
            self._fan_out,
            self._chord,
            self._group,
            self._failing,
            self._retried,
            self._tools,
        ]

    def write(self) -> Flow:
        """Return the next workflow."""
        self._made += 1
        return self._shapes[self._made % len(self._shapes)]()

    def _chain(self, *, shape: str = "chain", step: Callable[..., Any] = note, durable: bool = False) -> Flow:
        first, second = self._numbers(), self._numbers()
        signature = chain(
            self._sign(step, [], numbers=first, seconds=self._seconds(), durable=durable),
            self._sign(plain),
            self._sign(step, numbers=second, seconds=self._seconds(), durable=durable),
            self._sign(tally, durable=durable),
        )
        return Flow(shape, signature, [first + second, first + second])

    def _durable_chain(self) -> Flow:
        return self._chain(shape="durable chain", durable=True)

    def _async_chain(self) -> Flow:
        return self._chain(shape="async chain", step=note_at_once)

    def _durable_async_chain(self) -> Flow:
        return self._chain(shape="durable async chain", step=note_at_once, durable=True)

    def _fan_out(self) -> Flow:
        """Members of a group share a session, and so does the step behind them. Durable: a chord counts its members."""
        numbers = [self._numbers() for _ in range(4)]
        first, *members = (
            self._sign(note, *([] if n else [[]]), numbers=numbers[n], seconds=self._seconds(), durable=True)
            for n in range(4)
        )
        all_numbers = sorted(_flat(numbers))
        return Flow(
            "fan-out", chain(first, group(members), self._sign(tally, durable=True)), [all_numbers, all_numbers]
        )

    def _chord(self) -> Flow:
        """Each branch has a session of its own."""
        numbers = [self._numbers() for _ in range(6)]
        steps = [
            self._sign(note, *([] if n % 2 else [[]]), numbers=numbers[n], seconds=self._seconds(), durable=True)
            for n in range(6)
        ]
        branches = [chain(steps[n], steps[n + 1]) for n in (0, 2, 4)]
        return Flow("chord", chord(branches, self._sign(total)), sorted(_flat(numbers)))

    def _group(self) -> Flow:
        flows = [self._chain(), self._async_chain(), self._durable_chain()]
        return Flow("group", group([flow.signature for flow in flows]), [flow.result for flow in flows])

    def _failing(self) -> Flow:
        first = self._sign(note, [], numbers=self._numbers(), seconds=0.0)
        failing = self._sign(fail).on_error(self._sign(mourn))
        return Flow("failing", chain(first, failing, self._sign(plain)), error="ToolError")

    def _retried(self) -> Flow:
        first, second = self._numbers(), self._numbers()
        signature = chain(
            self._sign(note, [], numbers=first, seconds=0.0), self._sign(retry, numbers=second), self._sign(tally)
        )
        return Flow("retried", signature, [first + second, first + second])

    def _tools(self) -> Flow:
        (number, *_) = self._numbers()
        steps = [tool("peer", "note", number=number, seconds=self._seconds()), tool("peer", "noted")]
        return Flow("tools", chain(step.set(queue=self._queue()) for step in steps), {"result": [number]})

    def _sign(self, function: Callable[..., Any], *args: Any, durable: bool = False, **kwargs: Any) -> Signature:
        self.durable_tasks += durable
        task = self._app.tasks[_name(function, durable=durable)]
        return task.signature(args, kwargs, queue=self._queue())

    def _numbers(self) -> list[int]:
        self._last += 3
        return list(range(self._last - 2, self._last + 1))

    def _seconds(self) -> float:
        return self._random.uniform(0.0, 0.4)

    def _queue(self) -> str:
        return self._random.choice(QUEUES)
