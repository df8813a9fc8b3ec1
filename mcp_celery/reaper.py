"""The reaper: ends sessions past their deadline at their servers, and pings those that wait for their next step.

Workers run it as a program of its own, `python -m mcp_celery.reaper`, since a worker's main process talks to no MCP
server; see `bootstep`. The program reads one line of JSON from standard input, which holds credentials and so is
neither an argument nor in the environment:

    {"store": {...}, "servers": [{...}, ...], "interval_seconds": 5, "parent": 1234, "level": 20}

and then writes lines of JSON to standard output: the counts of each sweep that did something, and log records as
`{"level": ..., "message": ...}`. It ends when its input does, when its parent is gone, at SIGTERM, and by itself after
`IDLE_SECONDS` in which nothing was due. It never imports the app.
"""

import json
import logging
import os
import signal
import sys
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, NamedTuple, TypeVar

import anyio
import anyio.to_thread
from mcp import MCPError

from .connections import Connections
from .exceptions import ConfigurationError, MCPCeleryError, SessionLostError, StoreError, TransportError
from .redis_store import RedisStore
from .session import AsyncMCPSession
from .settings import ServerSettings, StoreSettings, places
from .store import Parked, Store

T = TypeVar("T")

# By name: as a program this module is called `__main__`.
logger = logging.getLogger("mcp_celery.reaper")

#: Sessions that are taken from the store at once.
BATCH = 100
#: Sessions that are attended to at once.
MAX_AT_ONCE = 32
#: How long one session may take.
SESSION_SECONDS = 10.0
#: After so many requests without an answer, a sweep leaves the other sessions of a server alone.
MAX_UNANSWERED = 3
#: The program ends when nothing was due for so long.
IDLE_SECONDS = 60.0
#: How long what is under way may take when the program is told to end.
GRACE_SECONDS = 1.0
#: How often the program looks whether its parent is there.
PARENT_SECONDS = 0.5


class Swept(NamedTuple):
    """What became of the sessions of one sweep."""

    closed: int = 0
    pinged: int = 0
    #: Pinged, and the server did not know them any more.
    lost: int = 0
    #: Neither: the server could not be reached, or refused. The store gives them out again.
    failed: int = 0


@dataclass
class _Sweep:
    """What one sweep has seen so far."""

    outcomes: Counter[str] = field(default_factory=Counter)
    slots: anyio.Semaphore = field(default_factory=lambda: anyio.Semaphore(MAX_AT_ONCE))
    #: By server: requests without an answer; sessions that failed; and why the first of them did.
    unanswered: Counter[str] = field(default_factory=Counter)
    failures: Counter[str] = field(default_factory=Counter)
    reasons: dict[str, str] = field(default_factory=dict)

    def fail(self, server: str, reason: str) -> None:
        self.outcomes["failed"] += 1
        self.failures[server] += 1
        self.reasons.setdefault(server, reason)


class Reaper:
    """Ends sessions, and keeps sessions alive, at their servers. Lives on one event loop.

    Several may work on one store: each session is given to one of them.

    Args:
        store: Where the sessions are.
        servers: By their names in handles. Sessions of other servers, and those that were opened at another URL, are
            left alone: another app may share the store.
    """

    def __init__(self, store: Store, servers: Mapping[str, ServerSettings]) -> None:
        self._store = store
        # Without their standalone streams: there are servers that end a session when its stream goes away.
        self._servers = {name: replace(settings, listen=False) for name, settings in servers.items()}
        self._places = places(servers)
        self._connections = Connections()
        self._has_store_failed = False
        #: Set once nothing more is to be begun.
        self.stopping = anyio.Event()

    async def sweep(self) -> Swept:
        """End what is past its deadline and ping what is idle, until nothing is due.

        Nothing is raised: what fails is logged, once for each server, and counted. A server that does not answer
        holds the others up no longer than one request takes. Without the store the sweep ends.
        """
        sweep = _Sweep()
        try:
            while not self.stopping.is_set():
                expired = await _in_thread(self._store.take_expired, BATCH, self._places)
                idle = await _in_thread(self._store.take_idle, BATCH, self._places)
                if not expired and not idle:
                    break
                async with anyio.create_task_group() as tasks:
                    for parked in expired:
                        tasks.start_soon(self._attend, sweep, parked, self._end)
                    for parked in idle:
                        tasks.start_soon(self._attend, sweep, parked, self._ping)
            self._has_store_failed = False
        except StoreError as exc:
            level = logging.DEBUG if self._has_store_failed else logging.WARNING
            self._has_store_failed = True
            logger.log(level, "A sweep has ended early: %s", exc)
        for server, count in sweep.failures.items():
            reason = sweep.reasons[server]
            logger.warning("%d sessions of server %r are left for a later sweep: %s", count, server, reason)
        return Swept(**sweep.outcomes)

    async def close(self, parked: Parked, *, by: str, why: str) -> bool:
        """End a session at its server, then in the store; *by* whom and *why* goes into its history.

        A session that the server does not know any more, or does not let clients end, counts as ended.

        Returns:
            False where the server is not configured, could not be reached, or refused: the session stays in the store.

        Raises:
            StoreError: The store did not answer. The session has ended at its server.
        """
        try:
            await self._use(parked, AsyncMCPSession.close)
        except (MCPCeleryError, TimeoutError) as exc:
            logger.warning("Session %s is not ended: %s", parked.handle.short_id, _reason(exc))
            return False
        await self._note_end(parked, by, why)
        return True

    def stop(self) -> None:
        """Begin nothing more: a sweep returns after what is under way."""
        self.stopping.set()

    async def aclose(self) -> None:
        """Close the connections to all servers."""
        await self._connections.aclose()

    # -- One session

    async def _attend(self, sweep: _Sweep, parked: Parked, work: Callable[[Parked], Awaitable[str]]) -> None:
        server = parked.handle.server
        async with sweep.slots:
            if self.stopping.is_set():
                return
            if sweep.unanswered[server] >= MAX_UNANSWERED:
                sweep.fail(server, "it does not answer")
                return
            try:
                sweep.outcomes[await work(parked)] += 1
            except Exception as exc:  # noqa: BLE001 - no session may keep the others from their turn, in each sweep
                if isinstance(exc, TimeoutError) or (isinstance(exc, TransportError) and exc.status is None):
                    sweep.unanswered[server] += 1
                sweep.fail(server, _reason(exc))

    async def _end(self, parked: Parked) -> str:
        await self._use(parked, AsyncMCPSession.close)
        await self._note_end(parked, "reaper", "expired")
        return "closed"

    async def _ping(self, parked: Parked) -> str:
        try:
            await self._use(parked, AsyncMCPSession.ping)
        except MCPError:
            # An error is a sign of life as well: the server knew the session.
            return "pinged"
        except SessionLostError:
            await _in_thread(self._store.note_lost, parked.key)
            return "lost"
        return "pinged"

    async def _use(self, parked: Parked, use: Callable[[AsyncMCPSession], Awaitable[None]]) -> None:
        settings = self._servers.get(parked.handle.server)
        if settings is None:
            raise ConfigurationError(f"Server {parked.handle.server!r} is not configured")
        if parked.place not in {"", settings.place}:
            # Its ID, and the credentials that are configured here, are nothing for another server.
            raise ConfigurationError(f"The session was opened at another URL than server {settings.name!r} has here")
        session = AsyncMCPSession(settings, self._connections, parked.handle)
        try:
            with anyio.fail_after(SESSION_SECONDS):
                await use(session)
        finally:
            await session.release()

    async def _note_end(self, parked: Parked, by: str, why: str) -> None:
        event = {"what": "closed", "at": time.time(), "by": by, "why": why}
        await _in_thread(self._store.ended, parked.key, event)


def _reason(exc: Exception) -> str:
    """Return what may be shown of an error: the texts of this package hold no secret, others may."""
    if isinstance(exc, TimeoutError):
        return f"no answer within {SESSION_SECONDS:g} s"
    return str(exc) if isinstance(exc, MCPCeleryError) else type(exc).__name__


async def _in_thread(function: Callable[..., T], *args: Any) -> T:
    """Ask the store, which blocks, while the loop goes on."""
    return await anyio.to_thread.run_sync(partial(function, *args), abandon_on_cancel=True)


# -- The program


def main() -> None:
    """Sweep, for the worker that has started this program."""
    # Ctrl-C goes to the worker, which ends this program when it has come to that.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    line = sys.stdin.buffer.readline()
    if line:
        anyio.run(_run, json.loads(line))


async def _run(configuration: Mapping[str, Any]) -> None:
    logging.basicConfig(level=logging.WARNING, handlers=[_ToParent()])
    logging.getLogger("mcp_celery").setLevel(configuration["level"])
    servers = [_server(options) for options in configuration["servers"]]
    store = RedisStore(StoreSettings(**configuration["store"]))
    reaper = Reaper(store, {server.name: server for server in servers})
    finished = anyio.Event()

    async def stop_when(happens: Callable[[], Awaitable[object]]) -> None:
        await happens()
        reaper.stop()
        with anyio.move_on_after(GRACE_SECONDS):
            await finished.wait()
        tasks.cancel_scope.cancel()

    async with anyio.create_task_group() as tasks:
        for happens in (_input_ends, _terminated, partial(_parent_is_gone, configuration["parent"])):
            tasks.start_soon(stop_when, happens)
        await _sweep_on(reaper, configuration["interval_seconds"])
        finished.set()
        tasks.cancel_scope.cancel()
    await reaper.aclose()


def _server(options: Mapping[str, Any]) -> ServerSettings:
    headers = tuple((name, value) for name, value in options["headers"])
    return ServerSettings(**{**options, "headers": headers})


async def _sweep_on(reaper: Reaper, interval_seconds: float) -> None:
    """Sweep every *interval_seconds*, until told to stop or until nothing was due for long."""
    busy_at = anyio.current_time()
    while not reaper.stopping.is_set() and anyio.current_time() - busy_at < IDLE_SECONDS:
        swept = await reaper.sweep()
        if any(swept):
            busy_at = anyio.current_time()
            _tell(**swept._asdict())
        with anyio.move_on_after(interval_seconds):
            await reaper.stopping.wait()


async def _input_ends() -> None:
    stdin = sys.stdin.fileno()
    while True:
        await anyio.wait_readable(stdin)
        if not os.read(stdin, 1024):
            return


async def _terminated() -> None:
    with anyio.open_signal_receiver(signal.SIGTERM) as signals:
        async for _ in signals:
            return


async def _parent_is_gone(parent: int) -> None:
    """Return when the parent has died: children that it has forked meanwhile keep our input from ending."""
    while os.getppid() == parent:  # noqa: ASYNC110 - nothing tells of it
        await anyio.sleep(PARENT_SECONDS)


class _ToParent(logging.Handler):
    """Writes log records for the worker to log."""

    def emit(self, record: logging.LogRecord) -> None:
        _tell(level=record.levelno, message=record.getMessage())


def _tell(**message: Any) -> None:
    with suppress(BrokenPipeError):  # the parent is gone
        sys.stdout.write(json.dumps(message) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
