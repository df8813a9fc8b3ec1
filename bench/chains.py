"""A chain on two workers, its steps in turn: without MCP, with it, durably, and with a raw POST in each step."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from statistics import median
from time import perf_counter

from celery import Celery, chain

from bench.calls import Counts
from bench.processes import Log, running
from bench.store import RoundTrips

STEPS, WARM_UP, WAIT_SECONDS = 10, 2, 60
#: To count what a step asks: chains of so many steps beside those of `STEPS`, and how many of each.
FEW_STEPS, COUNTED = 4, 11
QUEUES = ("a", "b")
PLAIN, MCP, DURABLE, RAW = "bench.plain", "bench.mcp", "bench.durable", "bench.raw"


@contextmanager
def workers(folder: Path, redis_url: str, environ: dict[str, str]) -> Iterator[Celery]:
    """Give an app that reaches two workers. Where they find the broker goes into *environ*."""
    with ExitStack() as stack:
        environ |= {"CELERY_BROKER_URL": redis_url, "CELERY_RESULT_BACKEND": redis_url}
        for queue in QUEUES:
            log = Log(folder / f"worker-{queue}.log")
            worker = f"celery -A bench.tasks worker -n {queue}@%h -Q {queue} -P prefork -c 1 -l INFO"
            is_ready = lambda log=log: " ready." in log.text()  # noqa: E731 - one line for one look
            stack.enter_context(running(log, *worker.split(), is_ready=is_ready))
        yield stack.enter_context(Celery("bench", broker=redis_url, backend=redis_url))


def run(app: Celery, name: str, *arguments: str, length: int = STEPS) -> float:
    """Run one chain and return its seconds."""
    steps = [
        app.signature(name, args=arguments, immutable=True, queue=QUEUES[number % len(QUEUES)])
        for number in range(length)
    ]
    begun = perf_counter()
    assert chain(steps).apply_async().get(timeout=WAIT_SECONDS) == 3
    return perf_counter() - begun


def measure(app: Celery, url: str, redis_url: str, session_id: str, runs: int) -> dict[str, float]:
    """Run each kind of chain *runs* times, in turn, and compare within each turn."""
    counts = Counts(url)
    requests = 0
    seconds: dict[str, list[float]] = {name: [] for name in (PLAIN, MCP, DURABLE, RAW)}
    for _ in range(WARM_UP + runs):
        for name, taken in seconds.items():
            before = counts.read()["requests"]
            taken.append(run(app, name, *([session_id] if name == RAW else [])))
            if name == MCP:
                requests = counts.read()["requests"] - before
    plain, mcp, durable, raw = (taken[WARM_UP:] for taken in seconds.values())
    return {
        "runs": runs,
        "steps": STEPS,
        "requests": requests,
        "plain_ms": median(plain) * 1000,
        "mcp_ms": median(mcp) * 1000,
        "durable_ms": median(durable) * 1000,
        "raw_ms": median(raw) * 1000,
        "mcp_part_ms": added_ms(mcp, plain),
        "durable_part_ms": added_ms(durable, plain),
        "raw_part_ms": added_ms(raw, plain),
        "step_round_trips": round_trips_of_a_step(app, redis_url, MCP),
        "durable_step_round_trips": round_trips_of_a_step(app, redis_url, DURABLE),
    }


def added_ms(some: list[float], plain: list[float]) -> float:
    return median(one - other for one, other in zip(some, plain, strict=True)) * 1000


def round_trips_of_a_step(app: Celery, redis_url: str, name: str) -> float:
    """Return how often a step asks the store that is neither the first nor the last: what more such steps add.

    Of medians, for the workers ask as well, now and then.
    """
    trips = RoundTrips(redis_url)
    asked: dict[int, list[int]] = {FEW_STEPS: [], STEPS: []}
    for _ in range(COUNTED):
        for length, counted in asked.items():
            before = trips.read()
            run(app, name, length=length)
            counted.append(trips.read_settled() - before)
    return (median(asked[STEPS]) - median(asked[FEW_STEPS])) / (STEPS - FEW_STEPS)
