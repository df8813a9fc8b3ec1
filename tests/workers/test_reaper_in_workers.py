"""What workers do for sessions beside their tasks: end those that nobody comes for, and keep the others alive."""

import gc
import importlib
import json
import re
import signal
import sys
from pathlib import Path

import psutil
import pytest
from celery import chain
from processes import free_port, wait_until
from properties.quick_server import QuickServer
from redis import Redis

from mcp_celery import SessionHandle, SessionLostError
from mcp_celery.handle import short_hash
from mcp_celery.known_tasks import usable_servers_of
from mcp_celery.redis_store import RedisStore, get_store
from mcp_celery.settings import StoreSettings, places
from mcp_celery.store import Change

DATABASE = 4
POOLS = [("prefork",), ("solo",), ("threads", "-c", "2")]
#: What a log holds where something has leaked or broken, here or in a reaper. Not each socket: the threads pool leaves
#: one of Celery's result backend to the interpreter's end, now and then.
BAD = re.compile(
    r"Traceback|RuntimeWarning|never awaited|was destroyed|unclosed file|subprocess \d+ is still|"
    r"(WARNING|ERROR)/MainProcess\] Reaper"
)


class Reaped:
    """The app `reaped` as a publisher sees it, the server that it uses, and the way to start its workers."""

    def __init__(self, recorder, start_worker, env):
        self.recorder = recorder
        self.env = env
        self._start_worker = start_worker
        with pytest.MonkeyPatch.context() as patch:
            for name, value in env.items():
                patch.setenv(name, value)
            patch.syspath_prepend(str(Path(__file__).parent))
            sys.modules.pop("reaped", None)
            self.tasks = importlib.import_module("reaped")
        self.app = self.tasks.app
        self.store = get_store(self.app.conf)

    def start_worker(self, name, *options, **conf):
        """Start a worker with its own queue and the common one; *conf* is its own configuration."""
        conf = json.loads(self.env["CONF"]) | conf
        return self._start_worker(
            "reaped", name, "-Q", f"{name},celery", *options, env={**self.env, "CONF": json.dumps(conf)}
        )

    def close(self):
        """Close what the publisher has open."""
        gc.collect()  # results unsubscribe when they are collected, for which the server has to be there
        self.app.backend.result_consumer.stop()
        self.app.close()

    def leave_behind(self, queue="celery"):
        """Run a task that opens a session for a next step which nobody runs; return what the store knows of it."""
        known = {record.key for record in self.store.sessions()}
        steps = chain(self.tasks.remember.s("1").set(queue=queue), self.tasks.recall.s().set(queue="nobody"))
        steps.apply_async().parent.get(timeout=60)
        return next(record for record in self.store.sessions() if record.key not in known)

    def expire(self, session_ids):
        """Have the store hold sessions that are past their deadline."""
        store = RedisStore(StoreSettings(url=self.app.conf.broker_url, session_ttl_seconds=0.001))
        for session_id in session_ids:
            handle = SessionHandle("peer", session_id, {"protocolVersion": "2025-11-25", "capabilities": {}})
            store.change(handle, Change(joining={"id": "task"}, create=True))

    def count(self, name):
        """How many requests there were, such as "DELETE"."""
        return self.recorder.methods().count(name)

    @property
    def servers(self):
        """What its workers ask the store for."""
        return places(usable_servers_of(self.app))

    def leader(self):
        """Which worker leads, if any."""
        with Redis.from_url(self.app.conf.broker_url, decode_responses=True) as client:
            return next((client.get(name) for name in client.keys("{mcp_celery}:leader:*")), None)

    def ended(self, record):
        """Wait until a session has ended at its server and in the store."""
        wait_until(lambda: self.store.find(record.key)[0].state == "closed", 20, "the end of a session")


@pytest.fixture
def start(start_peer, record, valkey_server, start_worker):
    """`start(*options of the server, keepalive_seconds=0, **conf)` returns a `Reaped`, its store empty."""
    apps = []

    def start(*options, keepalive_seconds=0, **conf):
        with valkey_server.client() as client:
            client.select(DATABASE)
            client.flushdb()
        recorder = record(start_peer("python", *options).url)
        env = {
            "BROKER": f"{valkey_server.connection_url}/{DATABASE}",
            "PEER": recorder.url,
            "KEEPALIVE": str(keepalive_seconds),
            "CONF": json.dumps(conf),
            "PYTHONWARNINGS": "default",
        }
        apps.append(Reaped(recorder, start_worker, env))
        return apps[-1]

    yield start
    for app in apps:
        app.close()


def is_reaper(process):
    try:
        return "mcp_celery.reaper" in process.cmdline()
    except psutil.Error:  # it has ended
        return False


def reapers(*workers):
    """The reapers that run as children of these workers."""
    children = [child for worker in workers if worker.running for child in psutil.Process(worker.pid).children()]
    return [child for child in children if is_reaper(child)]


def bad_lines(worker):
    return [line for line in worker.log().splitlines() if BAD.search(line)]


def threads_left(worker):
    """The threads of this package that a worker's main process had at the very end."""
    _, told, names = worker.log().partition("threads left:\n")
    assert "MainThread" in names, f"it has told: {told!r}"
    return re.findall(r"^\t(.*mcp_celery.*)", names, re.MULTILINE)


# Between two steps


def test_a_session_outlives_the_wait_for_a_late_step_at_a_server_that_drops_idle_ones(start):
    app = start("--idle", "2", keepalive_seconds=0.5)
    worker = app.start_worker("a")
    app.leave_behind()
    app.recorder.wait_for(lambda exchange: exchange.rpc_method == "ping")  # a reaper takes its time to start
    steps = chain(app.tasks.remember.s("kept"), app.tasks.recall.s().set(countdown=10))
    assert steps.apply_async().get(timeout=40) == "kept"
    _, session_id = app.recorder.session_ids
    delete = app.recorder.wait_for(lambda exchange: exchange.method == "DELETE")
    names = [exchange.name for exchange in app.recorder.exchanges if exchange.session_id == session_id]
    assert names.count("POST ping") >= 5
    assert (names.count("DELETE"), delete.session_id) == (1, session_id)
    assert bad_lines(worker) == []


def test_without_keepalive_such_a_session_is_lost(start):
    app = start("--idle", "2")
    app.start_worker("a")
    steps = chain(app.tasks.remember.s("kept"), app.tasks.recall.s().set(countdown=6))
    with pytest.raises(SessionLostError):
        steps.apply_async().get(timeout=40)
    assert app.count("POST ping") == 0


def test_a_ping_that_finds_the_session_gone_is_told_to_the_next_step(start):
    app = start(keepalive_seconds=0.5)
    app.start_worker("a")
    app.leave_behind()
    app.recorder.wait_for(lambda exchange: exchange.rpc_method == "ping")
    app.recorder.answer(rpc_method="ping", status=404, times=100)
    steps = chain(app.tasks.remember.s("kept"), app.tasks.recall.s().set(countdown=4))
    with pytest.raises(SessionLostError, match="a ping found it gone"):
        steps.apply_async().get(timeout=40)
    assert app.recorder.methods()[-1] == "POST ping", "the step has sent nothing"


# What is ended


def test_a_session_whose_next_step_never_runs_is_ended_once_after_its_deadline(start):
    app = start(mcp_session_ttl_seconds=1)
    worker = app.start_worker("a")
    record = app.leave_behind()
    app.ended(record)
    assert app.count("DELETE") == 1
    (delete,) = [exchange for exchange in app.recorder.exchanges if exchange.method == "DELETE"]
    assert delete.headers["x-key"] == "t0ken"
    wait_until(lambda: "Reaper: closed 1, pinged 0, lost 0, failed 0" in worker.log(), what="the log")
    (reaper,) = reapers(worker)
    assert "t0ken" not in str([reaper.cmdline(), reaper.environ(), worker.log()])
    assert bad_lines(worker) == []


@pytest.mark.parametrize("pool", POOLS, ids=lambda pool: pool[0])
def test_a_task_that_runs_for_longer_than_sessions_live_keeps_its_session(start, pool):
    app = start(mcp_session_ttl_seconds=1)
    worker = app.start_worker("a", "-P", *pool)
    assert app.tasks.works.delay(4).get(timeout=30) == "kept"
    app.recorder.wait_for(lambda exchange: exchange.method == "DELETE")
    assert app.count("DELETE") == 1
    app.ended(app.leave_behind())
    assert bad_lines(worker) == []


def test_a_worker_that_may_not_lead_keeps_the_sessions_of_its_tasks_and_ends_none(start):
    app = start(mcp_session_ttl_seconds=1)
    leader = app.start_worker("a")
    app.ended(app.leave_behind())
    follower = app.start_worker("b", mcp_reaper=False)
    deleted = app.count("DELETE")
    assert app.tasks.works.apply_async((4,), queue="b").get(timeout=30) == "kept"
    wait_until(lambda: app.count("DELETE") == deleted + 1)
    leader.stop()
    record = app.leave_behind()
    wait_until(lambda: app.store.has_due(app.servers), 20, "a deadline")
    assert reapers(follower) == []
    assert app.store.find(record.key)[0].state == "open"
    leader = app.start_worker("c")
    app.ended(record)


def test_thousands_of_expired_sessions_are_ended_once_each_and_hold_no_task_up(start):
    ids = [f"{number:032x}" for number in range(2000)]
    expired = {short_hash(session_id) for session_id in ids}
    journal = []
    with QuickServer(journal, ids, delete_seconds=0.15) as server:  # so that the tasks end in the middle of it
        app = start(mcp_servers={"peer": {"url": server.url}})
        app.expire(ids)
        worker = app.start_worker("a")
        wait_until(lambda: journal, 20, "the sweep")
        results = [task.delay("x") for task in (app.tasks.plain, app.tasks.echo) * 5]
        assert [result.get(timeout=30) for result in results[1::2]] == ["x"] * 5
        assert [result.get(timeout=30)[0] for result in results[::2]] == ["x"] * 5
        swept_meanwhile = sum(event["session"] in expired for event in journal)
        wait_until(lambda: not list(app.store.sessions()), 60, "the end of the sweep")
    assert 0 < swept_meanwhile < len(ids)
    sweep = [(event["what"], event["session"]) for event in journal if event["session"] in expired]
    assert sorted(sweep) == [("deleted", session) for session in sorted(expired)]
    assert [event["session"] in expired for event in journal][-1], "the sessions of the tasks have ended before"
    assert bad_lines(worker) == []


# Who leads


def test_one_worker_leads_and_another_takes_over_when_it_is_killed(start):
    app = start(mcp_session_ttl_seconds=1)
    workers = [app.start_worker(name) for name in ("a", "b")]
    for _ in range(3):
        app.ended(app.leave_behind())
    (orphan,) = reapers(*workers)
    leader, other = workers if reapers(workers[0]) else reversed(workers)
    psutil.Process(leader.pid).kill()
    app.ended(app.leave_behind(other.name))
    assert len(reapers(other)) == 1
    wait_until(lambda: not is_reaper(orphan), what="the end of the orphan")
    assert app.count("DELETE") == 4
    assert bad_lines(other) == []


def test_a_leader_that_stops_resigns(start):
    app = start(mcp_reaper_interval_seconds=2)
    worker = app.start_worker("a")
    wait_until(app.leader, what="a leader")
    worker.stop()
    assert app.leader() is None, "it would be there for 6 s"


# How it ends


@pytest.mark.parametrize("pool", [*POOLS, ("gevent", "-c", "10")], ids=lambda pool: pool[0])
def test_a_warm_shutdown_ends_the_reaper_and_leaves_nothing(start, pool):
    app = start(mcp_session_ttl_seconds=1)
    worker = app.start_worker("a", "-P", *pool)
    app.ended(app.leave_behind())
    (reaper,) = reapers(worker)
    worker.stop()
    assert worker.returncode == 0
    assert not is_reaper(reaper)
    assert threads_left(worker) == []
    assert bad_lines(worker) == []


def test_a_warm_shutdown_right_after_the_start_leaves_nothing(start):
    app = start()
    worker = app.start_worker("a")
    worker.stop()
    assert worker.returncode == 0
    assert threads_left(worker) == []
    assert bad_lines(worker) == []


def test_tasks_that_a_warm_shutdown_waits_for_keep_their_sessions(start):
    app = start(mcp_session_ttl_seconds=1)
    leader = app.start_worker("a")
    app.ended(app.leave_behind())
    deleted = app.count("DELETE")
    worker = app.start_worker("b")
    result = app.tasks.works.apply_async((5,), queue="b")
    app.recorder.wait_for(lambda exchange: exchange.rpc_method == "tools/call" and "kept" in str(exchange.rpc_params))
    worker.stop(timeout=30)
    assert worker.returncode == 0
    assert result.get(timeout=60) == "kept"
    assert app.count("DELETE") == deleted + 1
    assert len(reapers(leader)) == 1
    assert bad_lines(worker) == []


def test_a_soft_shutdown_ends_the_reaper_and_leaves_nothing(start):
    app = start(mcp_session_ttl_seconds=1, worker_soft_shutdown_timeout=3)
    worker = app.start_worker("a")
    app.ended(app.leave_behind())
    (reaper,) = reapers(worker)
    result = app.tasks.works.delay(1)
    wait_until(lambda: app.count("POST initialize") == 2, what="the task to begin")
    psutil.Process(worker.pid).send_signal(signal.SIGQUIT)
    wait_until(lambda: not worker.running, 20, "the end of the worker")
    assert result.get(timeout=60) == "kept"
    assert not is_reaper(reaper)
    assert threads_left(worker) == []
    assert bad_lines(worker) == []


def test_children_of_the_pool_that_are_forked_beside_a_reaper_do_no_harm(start):
    app = start(mcp_session_ttl_seconds=1)
    worker = app.start_worker("a", "-c", "2", "--max-tasks-per-child", "1")
    app.ended(app.leave_behind())
    pids = {app.tasks.plain.delay(1).get(timeout=60)[1] for _ in range(5)}
    assert len(pids) == 5
    app.ended(app.leave_behind())
    (reaper,) = reapers(worker)
    worker.stop()
    assert worker.returncode == 0
    assert not is_reaper(reaper)
    assert bad_lines(worker) == []


def test_a_reaper_that_dies_is_replaced(start):
    app = start(mcp_session_ttl_seconds=1)
    worker = app.start_worker("a")
    app.ended(app.leave_behind())
    (reaper,) = reapers(worker)
    reaper.terminate()
    wait_until(lambda: not is_reaper(reaper), what="the end of the reaper")
    app.ended(app.leave_behind())
    assert len(reapers(worker)) == 1


# What is wrong


def test_without_an_answer_from_the_store_tasks_go_on_and_the_worker_says_so_once(start):
    app = start(mcp_store_url=f"redis://127.0.0.1:{free_port()}")
    worker = app.start_worker("a")
    wait_until(lambda: "neither renews nor ends MCP sessions" in worker.log(), what="the log")
    assert [app.tasks.echo.delay("x").get(timeout=60) for _ in range(3)] == ["x"] * 3
    worker.stop()
    assert worker.returncode == 0
    assert worker.log().count("neither renews nor ends MCP sessions") == 1
    assert bad_lines(worker) == []


def test_a_wrong_setting_costs_no_more_than_the_reaper(start):
    app = start(mcp_reaper_interval_seconds="often")
    worker = app.start_worker("a")
    assert app.tasks.echo.delay("x").get(timeout=60) == "x"
    assert "mcp_reaper_interval_seconds is a number" in worker.log()


# What it shows


def test_inspect_shows_the_sessions_that_running_tasks_hold(start):
    app = start()
    app.start_worker("a", "-c", "2")
    inspect = app.app.control.inspect(timeout=30, limit=1)
    assert list(inspect._request("mcp_sessions").values()) == [[]]
    results = [app.tasks.works.delay(5) for _ in range(2)]
    wait_until(lambda: len(list(app.store.sessions())) == 2, 20, "two sessions")
    ((shown),) = inspect._request("mcp_sessions").values()
    assert {one["id"] for one in shown} == {result.id for result in results}
    assert {one["session"] for one in shown} == {record.short_id for record in app.store.sessions()}
    assert {(one["server"], one["task"], one["state"]) for one in shown} == {("peer", "reaped.works", "open")}
    assert all(one["opened_at"] <= one["used_at"] < one["deadline"] for one in shown)
    assert shown == sorted(shown, key=lambda one: one["session"])
    assert [result.get(timeout=60) for result in results] == ["kept", "kept"]


def test_inspect_says_why_it_cannot_show_sessions(start):
    app = start(mcp_store_url="")
    app.start_worker("a")
    inspect = app.app.control.inspect(timeout=30, limit=1)
    ((shown),) = inspect._request("mcp_sessions").values()
    assert "no store" in shown["error"]
