"""What a worker does for the sessions in the store beside its tasks: a bootstep, in each worker's main process.

It renews the sessions of the tasks that run here. One of all workers leads: that one has a reaper at work, which ends
sessions past their deadline and pings idle ones. The reaper is a child process (`reaper`), so the main process asks
the store and nobody else.

Celery imports this module by its name, as a step of the apps that have MCP tasks.
"""

import json
import logging
import math
import os
import subprocess
import sys
import threading
import time
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from celery import Celery
from celery.bootsteps import StartStopStep
from celery.signals import worker_shutdown
from celery.worker import state as worker_state
from celery.worker.control import inspect_command

from .exceptions import ConfigurationError, StoreError
from .known_tasks import is_mcp_task, settings_of_journal, usable_servers_of
from .redis_store import PAUSE_SECONDS, get_store
from .settings import Conf, ServerSettings, StoreSettings, places, reaper_settings, store_settings

logger = logging.getLogger(__name__)

#: The sessions of a running task are renewed at least so often.
RENEWAL_SECONDS = 30.0
#: However soon a server has to be pinged.
LEAST_INTERVAL_SECONDS = 0.2
#: The MCP tasks of a worker are announced so often.
ANNOUNCEMENT_SECONDS = 300.0
#: How long a reaper may take to end before it is killed, and the thread of the step to end.
STOP_SECONDS = 3.0
#: After a reaper has failed, none is started for so long.
RESTART_SECONDS = 30.0

#: Held while a child is started. A child of the pool that is forked in these milliseconds would keep the pipes of the
#: start open, and whoever waits at their other ends would wait for the end of that child. An RLock, since gevent starts
#: a child by forking, where these very hooks are called.
_starting = threading.RLock()
os.register_at_fork(before=_starting.acquire, after_in_parent=_starting.release, after_in_child=_starting.release)


class ReaperStep(StartStopStep):
    """Looks after sessions, in workers whose app has a store for them."""

    # The pool forks before there is a thread, and ends after the last sweep.
    requires = ("celery.worker.components:Pool",)
    label = "MCP reaper"

    def include_if(self, parent: Any) -> bool:
        """Whether there are servers and a store. A wrong setting is logged, and costs no more than this step."""
        if not any(is_mcp_task(task) and task.server_names() for task in list(parent.app.tasks.values())):
            return False  # `mcp_celery.tool` is in every app
        try:
            reaper_settings(parent.app.conf)
            store = get_store(parent.app.conf)
            if store is not None:
                store.check()
        except ConfigurationError as exc:
            logger.error("MCP sessions are not looked after by this worker: %s", exc)  # noqa: TRY400 - it says all
            return False
        _warn_of_durable_tasks(parent.app, has_store=store is not None)
        return store is not None

    def create(self, parent: Any) -> "Watch":
        """Return what `start`, `stop` and `terminate` go to."""
        return Watch(parent)


def _warn_of_durable_tasks(app: Celery, *, has_store: bool) -> None:
    """Say, when a worker starts, which of its durable tasks cannot be what they are to be."""
    durable: list[Any] = []
    for task in list(app.tasks.values()):
        try:
            if is_mcp_task(task) and settings_of_journal(task) is not None:
                durable.append(task)
        except ConfigurationError as exc:
            logger.error("Task %s will fail: %s", task.name, exc)  # noqa: TRY400 - it says all
    if durable and not has_store:
        names = ", ".join(sorted(task.name for task in durable))
        logger.error("Durable tasks need a Redis or Valkey (mcp_store_url), and will fail: %s", names)
    # Celery 5.6 knows no retry where the worker is lost.
    early = [task.name for task in durable if not (task.acks_late or getattr(task, "retry_on_worker_lost", False))]
    if early:
        names = ", ".join(sorted(early))
        logger.warning("Durable tasks do not run again where their worker is killed, without acks_late: %s", names)


class Watch:
    """A thread that looks after sessions every `mcp_reaper_interval_seconds`.

    A thread, not a timer of the worker: in a solo pool the worker's main thread runs the tasks.

    Raises:
        ConfigurationError: There is no store, or a setting is wrong.
    """

    def __init__(self, worker: Any) -> None:
        conf = worker.app.conf
        settings, lives, store = reaper_settings(conf), store_settings(conf), get_store(conf)
        if lives is None or store is None:
            raise ConfigurationError("There is no store of MCP sessions")
        self._worker = worker
        self._store = store
        self._name = f"{worker.hostname} {os.getpid()}"
        self._may_lead = settings.enabled
        self._interval_seconds = settings.interval_seconds
        self._renewal_seconds = min(lives.session_ttl_seconds / 3, RENEWAL_SECONDS)
        self._reaper = ReaperProcess(worker.app, lives)
        #: Between leading and giving that up.
        self._leading = threading.Lock()
        self._announced_at = -math.inf
        #: The servers that this worker knows, by name, with their places.
        self._servers: dict[str, str] = {}
        #: Task ID to when its sessions were renewed.
        self._renewed: dict[str, float] = {}
        self._has_store_failed = False
        #: When all workers will have renewed the sessions of their tasks, after the store was away.
        self._reap_from = 0.0
        self._ended = threading.Event()
        self._thread: threading.Thread | None = None

    @property
    def _pause_seconds(self) -> float:
        return min(self._interval_seconds, self._renewal_seconds)

    @property
    def _lease_seconds(self) -> float:
        return 3 * self._interval_seconds

    # -- In the worker's main thread

    def start(self) -> None:
        """Begin, once the pool runs."""
        self._thread = threading.Thread(target=self._run, name="mcp_celery watch", daemon=True)
        self._thread.start()
        worker_shutdown.connect(self._on_worker_shutdown, sender=self._worker)

    def stop(self) -> None:
        """Lead no more, and end the reaper. The tasks of this worker may take long to end: renewing goes on."""
        with self._leading:
            if not self._may_lead:
                return
            self._may_lead = False
            self._reaper.stop()
            try:
                self._store.resign(self._name, self._servers)
            except StoreError as exc:
                logger.debug("The next worker leads in %g s: %s", self._lease_seconds, exc)

    def terminate(self) -> None:
        """End at once: the tasks do so as well."""
        self.stop()
        self._end()

    def _on_worker_shutdown(self, **_: object) -> None:
        self._end()

    def _end(self) -> None:
        worker_shutdown.disconnect(self._on_worker_shutdown, sender=self._worker)
        self._ended.set()
        if self._thread is not None:
            self._thread.join(STOP_SECONDS)

    # -- In the thread

    def _run(self) -> None:
        while not self._ended.is_set():
            try:
                self._announce()
                self._renew()
                self._lead()
                if self._has_store_failed:
                    self._has_store_failed = False
                    logger.info("The store of MCP sessions answers again")
            except StoreError as exc:
                level = logging.DEBUG if self._has_store_failed else logging.WARNING
                self._has_store_failed = True
                # Deadlines may have passed meanwhile, and each worker asks the store again in its own time.
                self._reap_from = time.monotonic() + PAUSE_SECONDS + 2 * self._pause_seconds
                self._reaper.retire()
                logger.log(level, "Until it answers, this worker neither renews nor ends MCP sessions: %s", exc)
            except Exception:
                logger.exception("Looking after MCP sessions")
            self._ended.wait(self._pause_seconds)

    def _announce(self) -> None:
        """Say which MCP tasks this worker has: others may publish them without knowing what they are."""
        now = time.monotonic()
        if now - self._announced_at >= ANNOUNCEMENT_SECONDS:
            self._store.announce([name for name, task in list(self._worker.app.tasks.items()) if is_mcp_task(task)])
            self._announced_at = now
            servers = usable_servers_of(self._worker.app)
            self._servers = places(servers)
            self._interval_seconds = interval_seconds(self._worker.app.conf, servers)

    def _renew(self) -> None:
        """Renew the sessions of tasks that run: at once where they have just begun, else before it is too late."""
        now = time.monotonic()
        self._renewed = {task_id: self._renewed.get(task_id, -RENEWAL_SECONDS) for task_id in running_tasks()}
        latest = now + self._pause_seconds - self._renewal_seconds
        due = [task_id for task_id, renewed_at in self._renewed.items() if renewed_at < latest]
        if due:
            self._store.renew(due)
            self._renewed |= dict.fromkeys(due, now)

    def _lead(self) -> None:
        with self._leading:
            if not self._may_lead or not self._servers:
                return
            if not self._store.lead(self._name, self._lease_seconds, self._servers):
                self._reaper.retire()
            elif (
                time.monotonic() >= self._reap_from and self._reaper.is_startable and self._store.has_due(self._servers)
            ):
                self._reaper.start()


class ReaperProcess:
    """The reaper as a child of this process, and the thread that starts it, logs what it says, and waits for its end.

    One at a time. It ends by itself when nothing is due.
    """

    def __init__(self, app: Celery, lives: StoreSettings) -> None:
        self._app = app
        self._lives = lives
        self._process: subprocess.Popen[bytes] | None = None
        self._thread: threading.Thread | None = None
        self._is_wanted = False
        self._not_before = 0.0

    @property
    def is_startable(self) -> bool:
        """Whether none runs, and none has failed a moment ago."""
        is_running = self._thread is not None and self._thread.is_alive()
        return not is_running and time.monotonic() >= self._not_before

    def start(self) -> None:
        """Start one. Returns at once."""
        self._is_wanted = True
        self._thread = threading.Thread(target=self._attend, name="mcp_celery reaper", daemon=True)
        self._thread.start()

    def retire(self) -> None:
        """Ask it to end, if one runs. Returns at once."""
        self._is_wanted = False
        process = self._process
        if process is not None:
            # The end of its input would not do: children of the pool that were forked meanwhile keep that open.
            process.terminate()

    def stop(self) -> None:
        """End it, if one runs, and wait for that: `STOP_SECONDS` until it is killed."""
        self.retire()
        if self._thread is None:
            return
        self._thread.join(STOP_SECONDS)
        process = self._process
        if self._thread.is_alive() and process is not None:
            process.kill()
            self._thread.join(STOP_SECONDS)

    def _attend(self) -> None:
        try:
            configuration = self._configuration()
            with _starting:
                process = subprocess.Popen(
                    [sys.executable, "-m", "mcp_celery.reaper"],
                    bufsize=0,
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=subprocess.STDOUT,
                    # It has to find this package where this process did.
                    env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
                    # Ctrl-C is for the worker, which then ends it in good order.
                    process_group=0,
                )
        except (OSError, TypeError, ConfigurationError) as exc:  # TypeError: an option of the store that is no JSON
            self._fail(f"could not be started ({type(exc).__name__}: {exc})")
            return
        with process:
            self._process = process
            if not self._is_wanted:
                process.terminate()
            self._converse(process, configuration)
        self._process = None
        if process.returncode and self._is_wanted:
            self._fail(f"ended with exit status {process.returncode}")

    def _fail(self, what: str) -> None:
        self._not_before = time.monotonic() + RESTART_SECONDS
        logger.warning("The reaper %s; the next one starts in %g s at the earliest", what, RESTART_SECONDS)

    def _configuration(self) -> bytes:
        """Return what the reaper has to know, credentials among it."""
        servers = usable_servers_of(self._app)
        configuration = {
            "store": asdict(self._lives),
            "servers": [asdict(server) for server in servers.values()],
            "interval_seconds": interval_seconds(self._app.conf, servers),
            "parent": os.getpid(),
            "level": logger.getEffectiveLevel(),
        }
        return json.dumps(configuration).encode() + b"\n"

    @staticmethod
    def _converse(process: "subprocess.Popen[bytes]", configuration: bytes) -> None:
        """Tell it what it has to know, and log what it says until its end."""
        if process.stdin is None or process.stdout is None:  # pragma: no cover - both are pipes
            return
        try:
            process.stdin.write(configuration)
        except OSError as exc:
            logger.debug("The reaper has ended before it was told what to do (%s)", type(exc).__name__)
        for line in process.stdout:
            _log(line)


def _log(line: bytes) -> None:
    """Log a line of the reaper: the counts of a sweep, a log record, or what the interpreter writes when it fails."""
    try:
        said = json.loads(line)
    except ValueError:
        said = None
    if not isinstance(said, dict):
        logger.warning("Reaper: %s", line.decode(errors="replace").rstrip())
    elif "message" in said:
        logger.log(said["level"], "Reaper: %s", said["message"])
    else:
        logger.info("Reaper: %s", ", ".join(f"{outcome} {count}" for outcome, count in said.items()))


def interval_seconds(conf: Conf, servers: Mapping[str, ServerSettings]) -> float:
    """Return how often to look for what is due: often enough for the server that has to be pinged first."""
    keepalive = [server.keepalive_seconds for server in servers.values() if server.keepalive_seconds]
    soonest = max(min(keepalive, default=math.inf) / 2, LEAST_INTERVAL_SECONDS)
    return min(reaper_settings(conf).interval_seconds, soonest)


def running_tasks() -> dict[str, str]:
    """Return the tasks that run in this worker now: task ID to task name. Any thread may ask."""
    # Not by the table of requests: a message that comes again, while its task runs, takes the place of the first there.
    while True:
        try:
            return {request.id: request.name for request in worker_state.active_requests}
        except RuntimeError:  # the set has changed while it was read
            continue


@inspect_command()
def mcp_sessions(state: Any, **_: Any) -> list[dict[str, Any]] | dict[str, str]:
    """MCP sessions that running tasks hold."""
    try:
        store = get_store(state.app.conf)
        if store is None:
            return {"error": "There is no store of MCP sessions: mcp_store_url names one"}
        tasks = running_tasks()
        held = store.renew(list(tasks))
    except (ConfigurationError, StoreError) as exc:
        return {"error": str(exc)}
    sessions = [
        {
            "server": record.server,
            "session": record.short_id,
            "task": tasks[task_id],
            "id": task_id,
            "state": record.state,
            "opened_at": record.opened_at,
            "used_at": record.used_at,
            "deadline": record.deadline,
        }
        for task_id, records in held.items()
        for record in records
    ]
    return sorted(sessions, key=lambda session: (session["server"], session["session"], session["id"]))
