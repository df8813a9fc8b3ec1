"""The reaper on a real Valkey and real servers: what it ends, what it pings, what it leaves alone; and its program."""

import asyncio
import json
import logging
import os
import re
import signal
import subprocess
import sys
from collections import Counter
from contextlib import asynccontextmanager
from dataclasses import asdict, replace

import anyio
import psutil
import pytest
from processes import free_port, wait_until

from mcp_celery import reaper as reaper_module
from mcp_celery.exceptions import SessionLostError
from mcp_celery.handle import SessionHandle
from mcp_celery.reaper import Reaper, Swept
from mcp_celery.redis_store import RedisStore
from mcp_celery.settings import ServerSettings, StoreSettings, places
from mcp_celery.store import Change

pytestmark = pytest.mark.anyio

NEGOTIATED = {"protocolVersion": "2025-11-25", "capabilities": {}, "serverInfo": {"name": "sink", "version": "1"}}


#: The servers of the tests, wherever they are.
ANYWHERE = dict.fromkeys(("server", "sink", "away", "silent"), "")


class ParkingStore(RedisStore):
    """A store whose sessions live for a day, unless they are parked."""

    def __init__(self, url):
        super().__init__(StoreSettings(url=url))
        self._expiring = RedisStore(StoreSettings(url=url, session_ttl_seconds=0.001))

    def park(self, *handles, keepalive_seconds=0.0, place=""):
        """Store sessions that are past their deadline, or that are idle, when this returns."""
        store = self if keepalive_seconds else self._expiring
        held = Change(joining={"id": "task"}, create=True, keepalive_seconds=keepalive_seconds, place=place)
        for handle in handles:
            store.change(handle, held)
        servers = {handle.server: place for handle in handles}
        wait_until(lambda: store.has_due(servers), what="a session to be due")


@pytest.fixture
def store(valkey):
    return ParkingStore(valkey)


@pytest.fixture
async def new_reaper(store):
    """`new_reaper(*servers)` returns a reaper for these `ServerSettings`."""
    reapers = []

    def new(*servers, store=store):
        reapers.append(Reaper(store, {server.name: server for server in servers}))
        return reapers[-1]

    yield new
    for reaper in reapers:
        await reaper.aclose()


@pytest.fixture
def opened(new_session):
    """`opened(url, **options)` opens a session of server "server" and, awaited, returns its handle."""

    async def opened(url, **options):
        session = new_session(url, **options)
        await session.open()
        return await session.detach()

    return opened


def server(url, name="server", **options):
    return ServerSettings(name=name, url=url, **options)


def handle(number, name="sink"):
    return SessionHandle(name, f"session-{number}", NEGOTIATED)


class Sink:
    """An MCP server with any session: counts the DELETEs, and answers whatever is POSTed with a JSON-RPC error."""

    def __init__(self):
        self.deleted = Counter()
        self.url = ""

    async def serve(self, reader, writer):
        while head := await reader.readuntil(b"\r\n\r\n"):
            length = re.search(rb"(?i)content-length: (\d+)", head)
            body = await reader.readexactly(int(length[1])) if length else b""
            if head.startswith(b"DELETE"):
                self.deleted[re.search(rb"(?i)mcp-session-id: (\S+)", head)[1].decode()] += 1
                answer = b""
            else:
                error = {"code": -32601, "message": "Method not found"}
                answer = json.dumps({"jsonrpc": "2.0", "id": json.loads(body)["id"], "error": error}).encode()
            headers = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n" % len(answer)
            writer.write(headers + answer)
            await writer.drain()


@asynccontextmanager
async def listening(sink):
    """Run *sink* on this event loop."""
    writers = set()

    async def serve(reader, writer):
        writers.add(writer)
        try:
            await sink.serve(reader, writer)
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        finally:
            writers.discard(writer)
            writer.close()

    # Leaving waits for all connections since Python 3.12, and clients keep theirs open.
    async with await asyncio.start_server(serve, "127.0.0.1", 0) as running:
        sink.url = f"http://127.0.0.1:{running.sockets[0].getsockname()[1]}/mcp"
        yield sink
        for writer in writers:
            writer.close()


@pytest.fixture
async def sink():
    async with listening(Sink()) as sink:
        yield sink


# What it ends


async def test_an_expired_session_is_ended_once_with_the_credentials_of_its_server(
    recorded_peer, opened, store, new_reaper, new_session
):
    recorder = recorded_peer("python")
    url = recorder.url.replace("://", "://user:pass-word@")
    options = {"headers": (("X-Key", "s3cret"),)}
    expired = await opened(url, **options)
    store.park(expired)
    recorder.clear()
    reaper = new_reaper(server(url, **options))
    assert await reaper.sweep() == Swept(closed=1)
    assert await reaper.sweep() == Swept()
    (delete,) = recorder.exchanges
    assert (delete.method, delete.session_id, delete.headers["x-key"]) == ("DELETE", expired.session_id, "s3cret")
    assert delete.headers["authorization"].startswith("Basic ")
    (record,) = store.find(expired.key)
    assert (record.state, record.holders, record.deadline) == ("closed", {}, None)
    event = store.history(expired.key)[-1]
    assert (event["what"], event["by"], event["why"]) == ("closed", "reaper", "expired")
    with pytest.raises(SessionLostError):
        await new_session(url, expired, **options).ping()


async def test_a_session_that_was_used_meanwhile_is_not_ended(sink, store, new_reaper):
    store.park(handle(1), handle(2))
    store.change(handle(1), Change(joining={"id": "task"}))
    assert await new_reaper(server(sink.url, "sink")).sweep() == Swept(closed=1)
    assert sink.deleted == {"session-2": 1}


async def test_a_session_of_a_running_task_is_not_ended(sink, store, new_reaper):
    store.park(handle(1))
    store.renew(["id"])
    assert await new_reaper(server(sink.url, "sink")).sweep() == Swept()
    assert not sink.deleted


@pytest.mark.parametrize("status", [404, 405])
async def test_a_session_that_its_server_will_not_end_counts_as_ended(recorded_peer, opened, store, new_reaper, status):
    recorder = recorded_peer("python")
    expired = await opened(recorder.url)
    store.park(expired)
    recorder.answer(http_method="DELETE", status=status)
    assert await new_reaper(server(recorder.url)).sweep() == Swept(closed=1)
    assert store.find(expired.key)[0].state == "closed"


@pytest.mark.timeout(300)  # 20 s where nothing else runs
async def test_ten_thousand_expired_sessions_are_swept(sink, store, new_reaper):
    store.park(*map(handle, range(10_000)))
    assert await new_reaper(server(sink.url, "sink")).sweep() == Swept(closed=10_000)
    assert len(sink.deleted) == sink.deleted.total() == 10_000
    assert list(store.sessions()) == []


async def test_two_reapers_at_once_end_each_session_once(sink, store, valkey, new_reaper):
    store.park(*map(handle, range(400)))
    swept = []

    async def sweep(reaper):
        swept.append(await reaper.sweep())

    async with anyio.create_task_group() as tasks:
        for _ in range(2):
            tasks.start_soon(sweep, new_reaper(server(sink.url, "sink"), store=RedisStore(StoreSettings(url=valkey))))
    assert all(one.closed for one in swept)
    assert sum(one.closed for one in swept) == 400
    assert set(sink.deleted.values()) == {1}
    assert len(sink.deleted) == 400


# What it pings


async def test_an_idle_session_is_pinged_again_and_again(recorded_peer, opened, store, new_reaper):
    recorder = recorded_peer("python")
    idle = await opened(recorder.url)
    store.park(idle, keepalive_seconds=0.5)
    recorder.clear()
    reaper = new_reaper(server(recorder.url))
    assert await reaper.sweep() == Swept(pinged=1)
    wait_until(lambda: store.has_due(ANYWHERE))
    assert await reaper.sweep() == Swept(pinged=1)
    assert recorder.methods() == ["POST ping", "POST ping"]
    assert {exchange.session_id for exchange in recorder.exchanges} == {idle.session_id}
    assert store.lost_at(idle.key) is None


async def test_a_ping_that_finds_the_session_gone_records_it(recorded_peer, opened, store, new_reaper, new_session):
    recorder = recorded_peer("python")
    gone = await opened(recorder.url)
    await new_session(recorder.url, gone).close()
    store.park(gone, keepalive_seconds=0.05)
    assert await new_reaper(server(recorder.url)).sweep() == Swept(lost=1)
    assert store.lost_at(gone.key) is not None
    assert store.history(gone.key)[-1]["what"] == "lost"
    assert store.find(gone.key)[0].state == "lost"
    assert not store.has_due(ANYWHERE)


async def test_a_server_that_knows_no_ping_has_given_a_sign_of_life_all_the_same(sink, store, new_reaper):
    store.park(handle(1), keepalive_seconds=0.5)
    assert await new_reaper(server(sink.url, "sink")).sweep() == Swept(pinged=1)
    assert store.lost_at(handle(1).key) is None


# What it leaves for later


async def test_a_server_that_is_away_holds_up_no_other(recorded_peer, opened, store, new_reaper, caplog):
    recorder = recorded_peer("python")
    away = server(f"http://127.0.0.1:{free_port()}/mcp", "away")
    store.park(*(handle(number, "away") for number in range(150)), await opened(recorder.url))
    assert await new_reaper(away, server(recorder.url)).sweep() == Swept(closed=1, failed=150)
    assert not store.has_due(ANYWHERE), "they are given out again in a minute"
    assert {(record.server, record.state) for record in store.sessions()} == {("away", "closing")}
    (record,) = [record for record in caplog.records if record.levelno >= logging.WARNING]
    assert "150 sessions of server 'away'" in record.getMessage()


async def test_a_server_that_is_silent_is_not_asked_for_each_of_its_sessions(recorded_peer, store, new_reaper, sink):
    recorder = recorded_peer("python")
    recorder.stall(http_method="DELETE", times=200)
    store.park(*(handle(number, "silent") for number in range(150)), handle(150))
    reaper = new_reaper(server(recorder.url, "silent"), server(sink.url, "sink"))
    assert await reaper.sweep() == Swept(closed=1, failed=150)
    assert len(recorder.exchanges) < 50


async def test_a_server_that_refuses_is_asked_for_each_of_its_sessions(
    recorded_peer, opened, store, new_reaper, caplog
):
    recorder = recorded_peer("python")
    store.park(*[await opened(recorder.url) for _ in range(5)])
    recorder.clear()
    recorder.answer(http_method="DELETE", status=403, times=4)
    assert await new_reaper(server(recorder.url)).sweep() == Swept(closed=1, failed=4)
    assert recorder.methods() == ["DELETE"] * 5
    assert "4 sessions of server 'server'" in caplog.text
    assert not store.has_due(ANYWHERE)


async def test_a_ping_that_fails_is_no_loss(recorded_peer, opened, store, new_reaper):
    recorder = recorded_peer("python")
    idle = await opened(recorder.url)
    store.park(idle, keepalive_seconds=0.5)
    recorder.answer(rpc_method="ping", status=503)
    reaper = new_reaper(server(recorder.url))
    assert await reaper.sweep() == Swept(failed=1)
    assert store.lost_at(idle.key) is None
    wait_until(lambda: store.has_due(ANYWHERE))
    assert await reaper.sweep() == Swept(pinged=1)


async def test_a_session_that_was_used_at_another_url_is_left_alone(sink, recorded_peer, store, new_reaper, caplog):
    """Another app shares the store, and has another server of this name."""
    recorder = recorded_peer("python")
    ours, theirs = server(sink.url, "sink"), server(recorder.url, "sink")
    store.park(handle(1), place=theirs.place)
    store.park(handle(2), place=ours.place)
    store.park(handle(3), place=theirs.place, keepalive_seconds=0.05)
    store.park(handle(4))
    assert await new_reaper(ours).sweep() == Swept(closed=2)
    assert sink.deleted == {"session-2": 1, "session-4": 1}
    assert recorder.exchanges == []
    assert not store.has_due(places({"sink": ours}))
    assert store.has_due(places({"sink": theirs}))
    parked = store.take(handle(1).key)
    assert not await new_reaper(ours).close(parked, by="command", why="asked")
    assert "opened at another URL" in caplog.text
    assert sink.deleted == {"session-2": 1, "session-4": 1}


async def test_many_sessions_of_others_keep_nobody_from_their_own(sink, store, new_reaper):
    store.park(*(handle(number, "unknown") for number in range(450)), handle(450))
    assert await new_reaper(server(sink.url, "sink")).sweep() == Swept(closed=1)
    assert len(list(store.sessions())) == 450


async def test_a_standalone_stream_is_not_opened_for_a_ping(recorded_peer, opened, store, new_reaper):
    """There are servers that end a session when its stream goes away."""
    recorder = recorded_peer("python")
    idle = await opened(recorder.url)
    store.park(idle, keepalive_seconds=0.5)
    recorder.clear()
    assert await new_reaper(replace(server(recorder.url), listen=True)).sweep() == Swept(pinged=1)
    assert recorder.methods() == ["POST ping"]


async def test_sessions_of_servers_that_are_not_configured_are_left_alone(sink, store, new_reaper):
    store.park(handle(1, "unknown"), handle(2))
    assert await new_reaper(server(sink.url, "sink")).sweep() == Swept(closed=1)
    assert sink.deleted == {"session-2": 1}


async def test_a_handle_that_cannot_be_used_does_not_keep_the_others_from_their_turn(sink, store, new_reaper):
    odd = SessionHandle("sink", "odd", {"protocolVersion": "2025-11-25", "capabilities": 5})
    store.park(odd, handle(1), keepalive_seconds=0.5)
    assert await new_reaper(server(sink.url, "sink")).sweep() == Swept(pinged=1, failed=1)


async def test_without_the_store_a_sweep_ends_and_says_so_once(new_reaper, caplog):
    nowhere = RedisStore(StoreSettings(url=f"redis://:s3cret@127.0.0.1:{free_port()}"))
    reaper = new_reaper(store=nowhere)
    assert await reaper.sweep() == Swept()
    assert await reaper.sweep() == Swept()
    (record,) = [record for record in caplog.records if record.levelno >= logging.WARNING]
    assert "did not answer" in record.getMessage()
    assert "s3cret" not in caplog.text


async def test_a_reaper_that_was_stopped_begins_nothing(sink, store, new_reaper):
    store.park(handle(1))
    reaper = new_reaper(server(sink.url, "sink"))
    reaper.stop()
    assert await reaper.sweep() == Swept()
    assert not sink.deleted


# Ending one by hand


async def test_a_session_is_ended_by_hand_whoever_holds_it(recorded_peer, opened, store, new_reaper):
    recorder = recorded_peer("python")
    held = await opened(recorder.url)
    store.change(held, Change(joining={"id": "task"}, create=True))
    reaper = new_reaper(server(recorder.url))
    recorder.clear()
    assert await reaper.close(store.take(held.key), by="command", why="asked")
    assert recorder.methods() == ["DELETE"]
    event = store.history(held.key)[-1]
    assert (event["by"], event["why"]) == ("command", "asked")
    assert store.take(held.key) is None


async def test_a_session_whose_server_is_away_is_not_ended_by_hand(store, new_reaper):
    store.change(handle(1, "away"), Change(joining={"id": "task"}, create=True))
    parked = store.take(handle(1, "away").key)
    reaper = new_reaper(server(f"http://127.0.0.1:{free_port()}/mcp", "away"))
    assert not await reaper.close(parked, by="command", why="asked")
    assert not await new_reaper().close(parked, by="command", why="asked"), "nor where it is not configured"
    assert store.find(parked.key)[0].state == "closing"


# The program


@pytest.fixture
def start_program(store, valkey):
    """`start_program(*servers, **configuration)` starts the program for these servers; its input stays open."""
    programs = []

    def start(*servers, **configuration):
        configuration = {
            "store": asdict(StoreSettings(url=valkey)),
            "servers": [asdict(one) for one in servers],
            "interval_seconds": 0.1,
            "parent": os.getpid(),
            "level": logging.INFO,
            **configuration,
        }
        program = subprocess.Popen(
            [sys.executable, "-m", "mcp_celery.reaper"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        programs.append(program)
        program.stdin.write(json.dumps(configuration) + "\n")
        program.stdin.flush()
        return program

    yield start
    for program in programs:
        with program:  # closes its pipes
            program.kill()


async def test_the_program_tells_what_it_has_swept_and_shows_no_secret(recorded_peer, store, start_program):
    recorder = recorded_peer("python")
    url = recorder.url.replace("://", "://user:pass-word@")
    program = start_program(server(url, headers=(("Authorization", "Bearer t0ken"),)))
    process = psutil.Process(program.pid)
    recorder.answer(http_method="DELETE", status=500)
    store.park(handle(1, "server"), handle(2, "server"))
    lines = [program.stdout.readline()]
    while '"closed"' not in lines[-1]:
        lines.append(program.stdout.readline())
    assert json.loads(lines[-1]) == {"closed": 1, "pinged": 0, "lost": 0, "failed": 1}
    told = json.loads(lines[0])
    assert told["level"] == logging.WARNING
    assert "refused to end the session" in told["message"]
    shown = str([process.cmdline(), process.environ(), *lines])
    assert not [secret for secret in ("pass-word", "t0ken", "session-1", "session-2") if secret in shown]
    assert recorder.exchanges[0].headers["authorization"]


def begun(program, park):
    """Wait until the program has swept once."""
    park(handle(1))
    assert json.loads(program.stdout.readline())["closed"] == 1


async def test_the_program_ends_with_its_input(sink, store, start_program):
    program = start_program(server(sink.url, "sink"))
    await anyio.to_thread.run_sync(begun, program, store.park)
    program.stdin.close()
    assert await anyio.to_thread.run_sync(program.stdout.read) == ""
    assert program.wait(10) == 0


async def test_the_program_ends_at_sigterm_and_leaves_ctrl_c_to_the_worker(sink, store, start_program):
    program = start_program(server(sink.url, "sink"))
    await anyio.to_thread.run_sync(begun, program, store.park)
    program.send_signal(signal.SIGINT)
    await anyio.to_thread.run_sync(begun, program, lambda _: store.park(handle(2)))
    program.terminate()
    assert await anyio.to_thread.run_sync(program.stdout.read) == ""
    assert program.wait(10) == 0


async def test_the_program_ends_while_a_server_is_silent(recorded_peer, store, start_program):
    recorder = recorded_peer("python")
    recorder.stall(http_method="DELETE", times=100)
    store.park(*(handle(number) for number in range(100)))
    program = start_program(server(recorder.url, "sink"))
    recorder.wait_for(lambda exchange: exchange.method == "DELETE", timeout=20)
    program.terminate()
    assert await anyio.to_thread.run_sync(program.stdout.read) == ""
    assert program.wait(10) == 0


async def test_the_program_ends_when_its_parent_is_gone(start_program):
    program = start_program(parent=1 if os.getpid() != 1 else 2)
    assert program.wait(20) == 0


def test_the_program_ends_when_it_is_told_nothing():
    outcome = subprocess.run(
        [sys.executable, "-m", "mcp_celery.reaper"], input="", capture_output=True, text=True, timeout=20, check=False
    )
    assert (outcome.returncode, outcome.stdout, outcome.stderr) == (0, "", "")


async def test_the_program_ends_by_itself_when_nothing_is_due(new_reaper, monkeypatch):
    monkeypatch.setattr(reaper_module, "IDLE_SECONDS", 0.2)
    with anyio.fail_after(10):
        await reaper_module._sweep_on(new_reaper(), 0.05)
