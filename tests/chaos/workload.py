"""What runs while workers are killed: durable tasks whose calls must not be executed twice, in several shapes."""

import json
import os
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from functools import partial
from random import Random
from typing import Any, Self

from broker_settings import LOOKS_SOON
from celery import Celery, chain, chord, group
from celery.canvas import Signature

from mcp_celery import MCPTask

#: A call of server-everything takes so long, and a millionth of a second more for each number.
EVERYTHING_SECONDS = 0.4
#: A worker that was killed loses its messages for so long.
VISIBILITY_SECONDS = 5


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What a worker has to know. `kind` is that of the server: "python" or "everything"."""

    broker: str
    store: str
    server: str
    kind: str
    #: The server's log of what it has executed.
    executions: str
    #: A folder: see `points`.
    armed: str
    gives_tokens: bool = True
    conf: dict[str, Any] = field(default_factory=dict)

    def to_environment(self) -> dict[str, str]:
        return {"CHAOS": json.dumps(asdict(self))}

    @classmethod
    def from_environment(cls) -> Self:
        return cls(**json.loads(os.environ["CHAOS"]))


#: The marker of the call that this process makes now.
current = {"marker": ""}


def marker_of(kind: str, number: int) -> str:
    """What the server's log calls the call of this number."""
    return str(number) if kind == "python" else str(duration_of(number))


def duration_of(number: int) -> float:
    return round(EVERYTHING_SECONDS + number / 1_000_000, 6)


def call(mcp: Any, kind: str, number: int, seconds: float) -> int:
    """Make the call of this number, which must not be made twice; return the number that the server gave back."""
    current["marker"] = marker_of(kind, number)
    if kind == "python":
        result = mcp.call_tool("mark", {"marker": str(number), "seconds": seconds, "steps": 4}, on_progress=ignore)
        return int(result.content[0].text)
    duration = {"duration": duration_of(number), "steps": 4}
    text = mcp.call_tool("trigger-long-running-operation", duration, on_progress=ignore).content[0].text
    return round((float(text.split()[5]) - EVERYTHING_SECONDS) * 1_000_000)


def ignore(*_: object) -> None:
    """Progress is asked for, so that there are events in the middle of a call."""


def plain(earlier: Any) -> Any:
    """A task that knows nothing of sessions."""
    return earlier


def flat(values: Any) -> Iterable[int]:
    if isinstance(values, list):
        for value in values:
            yield from flat(value)
    else:
        yield values


def new_app(settings: Settings) -> Celery:
    """Return the app, as a user who needs durable tasks configures it; with shorter times."""
    app = Celery("workload", broker=settings.broker, backend=settings.broker, set_as_current=False)
    transport = {
        "visibility_timeout": VISIBILITY_SECONDS,
        **LOOKS_SOON,
        "socket_keepalive": True,
    }
    app.conf.update(
        mcp_servers={"peer": {"url": settings.server, "read_timeout_seconds": 20, "keepalive_seconds": 0}},
        mcp_store_url=settings.store,
        mcp_durable=True,
        mcp_session_ttl_seconds=30,
        mcp_reaper_interval_seconds=0.5,
        task_acks_late=True,
        task_reject_on_worker_lost=True,
        worker_prefetch_multiplier=1,
        broker_transport_options=transport,
        result_backend_transport_options=transport,
        broker_connection_retry_on_startup=True,
        broker_connection_max_retries=None,
        # By this, Celery reckons how long who publishes the body of a chord keeps others from doing so.
        broker_connection_timeout=1,
        task_allow_error_cb_on_chord_header=True,
    )
    app.conf.update(settings.conf)
    durable = {"base": MCPTask, "mcp_server": "peer", "bind": True, "shared": False}

    def step(self: Any, earlier: Any, *, name: str, numbers: list[int], seconds: float) -> list[int]:
        """Make a call for each number; return the numbers that came back behind those of the steps before."""
        return [*flat(earlier), *(call(self.mcp, settings.kind, number, seconds) for number in numbers)]

    def tally(self: Any, earlier: Any, *, name: str) -> dict[str, list[int]]:
        """Return the numbers of all steps before, and those that the server saw in this session."""
        if settings.kind != "python":
            self.mcp.call_tool("echo", {"message": "the end"})
            return {"said": list(flat(earlier)), "seen": []}
        seen = self.mcp.call_tool("marks").structured_content["result"]
        return {"said": list(flat(earlier)), "seen": [int(marker) for marker in seen]}

    app.task(step, name="workload.step", **durable)
    app.task(tally, name="workload.tally", **durable)
    app.task(plain, name="workload.plain", shared=False)
    app.finalize()
    return app


@dataclass
class Workflow:
    """A workflow that was made, and what is right for it."""

    name: str
    signature: Signature
    #: For each of its results: the numbers that its steps have to say, and those that its session has to have seen.
    right: list[tuple[list[int], list[int]]]
    #: The names of its steps, in order; a branch after the other.
    steps: list[str]
    numbers: list[int]


SHAPES = ("chain", "fan", "chord", "group", "plain between")


class Author:
    """Makes workflows. Numbers are given out once."""

    def __init__(self, app: Celery, kind: str, random: Random) -> None:
        self._app = app
        self._kind = kind
        self._random = random
        self._numbers = 0
        self._workflows = 0

    def write(self, shape: str | None = None, *, calls: int = 2, seconds: float | None = None) -> Workflow:
        """Return a workflow of this shape, or of any."""
        shape = shape or self._random.choice(SHAPES)
        self._workflows += 1
        flow = Workflow(f"w{self._workflows}", Signature(), [], [], [])
        step = partial(self._step, flow, calls, seconds)
        tally = partial(self._tally, flow)
        width = self._random.randint(2, 3)
        match shape:
            case "chain":
                flow.signature = chain(step([]), step(), step(), tally())
                flow.right = [(flow.numbers, flow.numbers)]
            case "plain between":
                flow.signature = chain(step([]), self._app.tasks["workload.plain"].s(), step(), tally())
                flow.right = [(flow.numbers, flow.numbers)]
            case "fan":
                flow.signature = chain(step([]), group([step() for _ in range(width)]), step(), tally())
                # Each member says what came before it as well.
                first, rest = flow.numbers[:calls], flow.numbers[calls:]
                flow.right = [(first * width + rest, flow.numbers)]
            case "chord":
                flow.signature = chord([step([]) for _ in range(width)], tally())
                flow.right = [(flow.numbers, [])]
            case "group":
                flow.signature = group([chain(step([]), step(), tally()) for _ in range(width)])
                own = [flow.numbers[n * 2 * calls : (n + 1) * 2 * calls] for n in range(width)]
                flow.right = [(numbers, numbers) for numbers in own]
            case _:
                raise ValueError(shape)
        if self._kind != "python":
            flow.right = [(said, []) for said, _ in flow.right]
        return flow

    def _step(self, flow: Workflow, calls: int, seconds: float | None, *args: Any) -> Signature:
        numbers = list(range(self._numbers, self._numbers + calls))
        self._numbers += calls
        flow.numbers += numbers
        name = f"{flow.name}.{len(flow.steps)}"
        flow.steps.append(name)
        seconds = self._random.uniform(0.05, 0.6) if seconds is None else seconds
        return self._app.tasks["workload.step"].s(*args, name=name, numbers=numbers, seconds=seconds)

    def _tally(self, flow: Workflow) -> Signature:
        name = f"{flow.name}.{len(flow.steps)}"
        flow.steps.append(name)
        return self._app.tasks["workload.tally"].s(name=name)
