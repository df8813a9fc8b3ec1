"""The same in every pool of Celery's: what a worker does there, what interrupts a task, and what is left at the end."""

import re

import pytest
from celery import chain, group
from celery.exceptions import SoftTimeLimitExceeded, TaskRevokedError, TimeLimitExceeded
from conftest import Project, start_project
from peers.recorder import Recorder
from processes import wait_until
from test_chain import CALL, HANDSHAKE, calls_and_handshake

DATABASE = 12
#: Options of the worker, what else it is told, and how many sessions are opened there at once.
POOLS = {
    "prefork": (("-P", "prefork", "-c", "2"), {}, 50),
    "spawn": (("-P", "prefork", "-c", "1"), {"START_METHOD": "spawn"}, 10),
    "solo": (("-P", "solo"), {}, 50),
    "threads": (("-P", "threads", "-c", "200"), {"MEETING": "200"}, 200),
    "gevent": (("-P", "gevent", "-c", "200"), {"MEETING": "200"}, 200),
}
#: What a log holds where something has leaked. Not each socket: in the pools threads and gevent, Celery leaves some of
#: its result backend, which each thread has of its own, to the garbage collector. Ours are counted at the worker's end.
LEAKED = re.compile(r"RuntimeWarning|never awaited|was destroyed|unclosed (?!<socket)|Unclosed|LoopExit")


@pytest.fixture(scope="module")
def pool(request, session_peers, valkey_server, tmp_path_factory):
    """A project with one worker, which has all warnings on."""
    options, environment, _ = POOLS[request.param]
    with Recorder(session_peers.shared("python").url) as recorder:
        with valkey_server.client() as client:
            client.select(DATABASE)
            client.flushdb()
        folder = tmp_path_factory.mktemp(request.param)
        environment = {"PYTHONWARNINGS": "default", **environment}
        broker = f"{valkey_server.connection_url}/{DATABASE}"
        module, workers = start_project(recorder.url, broker, folder, environment, options, "pools", ("a",))
        project = Project(module, workers, recorder)
        yield project
        project.close()


@pytest.fixture
def project(pool):
    """The same with nothing recorded. What its worker logs is shown with a failure."""
    pool.begin()
    yield pool
    print(pool.logs()["a"])


def in_pools(*names):
    return pytest.mark.parametrize("pool", names, indirect=True, scope="module")


def is_at_work(exchange):
    return exchange.rpc_method == "tools/call" and exchange.rpc_params["name"] == "slow"


def cancelled_and_closed(project):
    """Wait for what the end of an interrupted call sends, in this order."""
    wait_until(lambda: project.recorder.methods()[-2:] == ["POST notifications/cancelled", "DELETE"])


@in_pools(*POOLS)
def test_a_chain_keeps_its_session(project):
    t = project.tasks
    rows = project.run(chain(t.remember.s([], "x", "1"), t.recall.s("x"), t.recall.s("x")), timeout=30)
    assert len({row["session"] for row in rows}) == 1
    assert [row["value"] for row in rows[1:]] == ["1", "1"]
    assert calls_and_handshake(project.sessions_closed()) == [*HANDSHAKE, *[CALL] * 3, "DELETE"]


@in_pools(*POOLS)
def test_a_chain_of_async_steps_keeps_its_session_and_calls_at_once(project):
    t = project.tasks
    result = chain(t.remembers.s("red"), t.recalls.s()).apply_async()
    _, *rest = result.get(timeout=30)
    assert rest == [[True, "red"], ["red"] * 3, True, result.id]
    assert calls_and_handshake(project.sessions_closed()) == [*HANDSHAKE, *[CALL] * 4, "DELETE"]


@in_pools(*POOLS)
def test_a_fan_out_keeps_its_session(project):
    t = project.tasks
    header = group(t.recall.s("x"), t.recall.s("x"), t.recall.s("x"))
    value, branches = project.run(chain(t.remember.s([], "x", "1"), header, t.gather.s()))
    assert (value, [branch[-1]["value"] for branch in branches]) == ("1", ["1", "1", "1"])
    assert calls_and_handshake(project.sessions_closed()) == [*HANDSHAKE, *[CALL] * 5, "DELETE"]


@in_pools(*POOLS)
def test_a_task_sees_no_event_loop(project):
    assert project.run(project.tasks.sees_loop.s()) == [False] * 4


@in_pools(*POOLS)
def test_many_sessions_are_used_at_once_and_all_are_closed(project, request):
    *_, count = POOLS[request.node.callspec.params["pool"]]
    rows = project.run(group(project.tasks.meets.s(number) for number in range(count)), timeout=90)
    assert [row["number"] for row in rows] == [number + 1 for number in range(count)]
    assert len({row["session"] for row in rows}) == count
    assert project.sessions_closed(count).count("DELETE") == count
    assert len(project.recorder.session_ids) == count
    wait_until(lambda: not project.stored(), what="an empty store")


@in_pools("prefork", "spawn")
def test_a_soft_time_limit_cancels_the_call_and_ends_the_session(project):
    with pytest.raises(SoftTimeLimitExceeded):
        project.tasks.slow.apply_async((100, 0.1), soft_time_limit=0.5).get(timeout=60)
    cancelled_and_closed(project)


@in_pools("gevent")
def test_a_hard_time_limit_cancels_the_call_and_ends_the_session(project):
    with pytest.raises(TimeLimitExceeded):
        project.tasks.slow.apply_async((100, 0.1), time_limit=0.5).get(timeout=60)
    cancelled_and_closed(project)


@in_pools("prefork", "spawn", "gevent")
def test_a_task_that_is_revoked_during_a_call_cancels_it_and_ends_the_session(project):
    result = project.tasks.slow.delay(100, 0.1)
    project.recorder.wait_for(is_at_work)
    project.app.control.revoke(result.id, terminate=True)
    with pytest.raises(TaskRevokedError):
        result.get(timeout=60)
    cancelled_and_closed(project)


@in_pools("gevent")
def test_a_durable_task_keeps_its_journal_without_holding_up_others(project):
    rows = project.run(group(project.tasks.adds_durably.s(number) for number in range(20)), timeout=30)
    assert rows == [number + 2 for number in range(20)]
    project.sessions_closed(20)


@in_pools(*POOLS)
def test_a_worker_finishes_a_call_before_it_ends_and_leaves_nothing_behind(project):
    assert project.run(project.tasks.left_over.s()) in ([], ["Portal._run.<locals>.stay"])
    result = project.tasks.slow.delay(10, 0.1)
    project.recorder.wait_for(is_at_work)
    (worker,) = project.workers
    worker.stop(timeout=30)
    assert worker.returncode == 0
    assert len(result.get(timeout=60)) == 10
    assert calls_and_handshake(project.recorder.methods()) == [*HANDSHAKE, CALL, "DELETE"]
    assert LEAKED.findall(worker.log()) == []
    assert "Traceback" not in project.logs()["a"]
    assert "threads left: MainThread event loops left: 0 connections left: 0\n" in worker.log()
