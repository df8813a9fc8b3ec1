"""No Redis at all, or none that answers: chains end their sessions all the same, and branches leave theirs."""

import importlib
import sys

import pytest
from celery import chain, group
from conftest import HERE
from processes import wait_until
from test_chain import CALL, HANDSHAKE, calls_and_handshake, on
from test_peers_and_pools import start  # noqa: F401 - a fixture
from worker_process import Worker

LEFT = "no store counts who still holds it"


class ProjectOnFiles:
    """The app as a publisher sees it, its two workers, and the recorder before their server."""

    def __init__(self, tasks, workers, recorder):
        self.tasks = tasks
        self.workers = workers
        self.recorder = recorder

    def send(self, workflow, tasks):
        """Send a workflow; return its result and, once so many *tasks* of it have ended, what was requested."""
        self.recorder.clear()
        before = self._count_ended()
        result = workflow.apply_async()
        wait_until(lambda: self._count_ended() == before + tasks, what=f"{tasks} tasks to end")
        return result, calls_and_handshake(self.recorder.methods())

    def _count_ended(self):
        return sum(worker.log().count("] succeeded in ") + worker.log().count("] raised ") for worker in self.workers)


@pytest.fixture(params=[True, False], ids=["with results", "without results"])
def project_on_files(request, start_peer, record, tmp_path, monkeypatch):
    """A project whose broker is a folder; with a result backend or without one."""
    recorder = record(start_peer("python").url)
    env = {"BROKER": "filesystem://", "PEER": recorder.url, "FOLDER": str(tmp_path)}
    env["RESULTS"] = "yes" if request.param else "no"
    for folder in ("messages", "control"):
        (tmp_path / folder).mkdir()
    workers = [
        Worker("project_on_files", name, "-Q", name, folder=HERE, log_path=tmp_path / f"{name}.log", env=env)
        for name in "ab"
    ]
    for name, value in env.items():
        monkeypatch.setenv(name, value)
    monkeypatch.syspath_prepend(str(HERE))
    for module in ("project", "project_on_files"):
        sys.modules.pop(module, None)
    tasks = importlib.import_module("project_on_files")
    yield ProjectOnFiles(tasks, workers, recorder)
    for worker in workers:
        worker.kill()
        print(f"--- worker {worker.name}\n{worker.log()}")
    tasks.app.close()


def test_without_any_redis_chains_end_their_sessions_and_branches_leave_theirs(project_on_files):
    t, send = project_on_files.tasks, project_on_files.send
    has_results = t.app.conf.result_backend is not None

    flow = chain(t.remember.s([], "x", "1"), t.recall.s("x"), t.add.si(1, 1), t.tag.si(["plain"]), t.recall.s("x"))
    result, requests = send(on(flow, *"ababa"), tasks=5)
    assert requests == [*HANDSHAKE, *[CALL] * 4, "DELETE"]
    assert not has_results or result.get(timeout=60)[2]["value"] == "1"

    result, requests = send(on(chain(t.remember.s([], "x", "1"), t.fails.si("no")), *"ab"), tasks=2)
    assert requests == [*HANDSHAKE, CALL, CALL, "DELETE"]
    if has_results:
        with pytest.raises(ValueError, match="no"):
            result.get(timeout=60)

    first = t.remember.s([], "x", "1").set(queue="a", link=t.recall.s("x").set(queue="b"))
    for _ in range(2):
        result, requests = send(on(chain(first, t.recall.s("x")), *"aa"), tasks=3)
        assert requests == [*HANDSHAKE, CALL, CALL, CALL]
        assert not has_results or result.get(timeout=60)[1]["value"] == "1"
    assert [worker.log().count(LEFT) for worker in project_on_files.workers] == [1, 1]


def test_without_a_store_a_fan_out_leaves_its_session_to_the_server_and_says_so(start):  # noqa: F811
    project = start(("python",), {"STORE": ""})
    project.begin()
    t = project.tasks
    first = t.remember.s([], "x", "1").set(queue="a", link=t.recall.s("x").set(queue="b"))
    rows = project.run(chain(first, t.recall.s("x").set(queue="a")))
    assert rows[1]["value"] == "1"
    project.recorder.wait_for(lambda _: project.recorder.methods().count(CALL) == 3)
    project.idle()
    assert calls_and_handshake(project.recorder.methods()) == [*HANDSHAKE, CALL, CALL, CALL]
    assert project.logs()["a"].count("no store counts who still holds it") == 1


def test_a_store_that_does_not_answer_loses_no_result(start):  # noqa: F811
    project = start(("python",), {"STORE": "redis://127.0.0.1:9/0"})
    t = project.tasks
    members = group(t.recall.si([], "x").set(queue=queue) for queue in ("a", "b"))
    value, parts = project.run(chain(t.remember.si([], "x", "1").set(queue="a"), members, t.gather.s().set(queue="a")))
    assert (value, len(parts)) == ("1", 2)
    project.idle()
    assert project.recorder.methods().count("DELETE") == 0
