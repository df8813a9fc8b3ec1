"""`async def` tasks on real workers: workflows, retries, replacements, limits, and many of them on one loop."""

import importlib

import pytest
from calls import is_call, is_cancellation
from celery import chain, chord
from celery.exceptions import SoftTimeLimitExceeded, TaskRevokedError
from conftest import HERE, Project
from peers.recorder import Recorder
from processes import wait_until
from worker_process import Worker


@pytest.fixture(scope="module")
def workers(session_peers, valkey_server, tmp_path_factory):
    """A worker of processes, `a`, and one of threads, `b`; each has a queue, and there is one for both."""
    folder = tmp_path_factory.mktemp("asynchronous")
    with Recorder(session_peers.shared("python").url) as recorder, pytest.MonkeyPatch.context() as patch:
        env = {"BROKER": f"{valkey_server.connection_url}/6", "PEER": recorder.url, "PYTHONWARNINGS": "default"}
        pools = {"a": ("prefork", "2"), "b": ("threads", "50")}
        started = [
            Worker(
                "asynchronous",
                name,
                "-Q",
                f"{name},common",
                "-P",
                pool,
                "-c",
                size,
                folder=HERE,
                log_path=folder / name,
                env=env,
            )
            for name, (pool, size) in pools.items()
        ]
        for name, value in env.items():
            patch.setenv(name, value)
        patch.syspath_prepend(str(HERE))
        project = Project(importlib.import_module("asynchronous"), started, recorder)
        yield project
        project.close()


@pytest.fixture
def project(workers):
    """Two idle workers, which have nothing in the store at the end and have logged no mishap of asyncio."""
    workers.begin()
    yield workers
    for name, log in workers.logs().items():
        print(f"--- worker {name}\n{log}")
        for word in ("never awaited", "never retrieved", "was destroyed", "ResourceWarning", "RuntimeWarning"):
            assert word not in log
    try:
        wait_until(lambda: not workers.stored(), what="an empty store")
    finally:
        workers.empty_store()


@pytest.fixture(params=["a", "b"], ids=["prefork", "threads"])
def s(request, project):
    """`s.add(1, 2)` is a signature for a worker of each pool."""
    tasks = project.tasks

    class Signatures:
        def __getattr__(self, name):
            return lambda *args, **kwargs: getattr(tasks, name).s(*args, **kwargs).set(queue=request.param)

    return Signatures()


def sessions(project, count=1):
    """How many sessions were opened and ended, once *count* have ended."""
    methods = project.sessions_closed(count)
    return methods.count("POST initialize"), methods.count("DELETE")


def test_async_and_plain_tasks_share_the_session_of_a_chain(project, s):
    t = project.tasks
    steps = chain(s.remember("red"), t.recall.s().set(queue="a"), t.plainly.s().set(queue="b"), s.recall())
    assert project.run(steps) == ["red", True]
    assert sessions(project) == (1, 1)


def test_calls_are_made_at_once_over_one_session(project, s):
    assert project.run(s.fan_out(20)) == list(range(1, 21))
    assert sessions(project) == (1, 1)


def test_the_items_of_a_mapped_task_share_a_session(project):
    assert project.run(project.tasks.add.starmap([(1, 2), (3, 4)]).set(queue="b")) == [3, 7]
    assert sessions(project) == (1, 1)


@pytest.mark.parametrize(("name", "attempts"), [("retries", 2), ("retries_for", 1)])
def test_the_attempts_of_a_retried_task_share_a_session(project, s, name, attempts):
    assert project.run(getattr(s, name)()) == attempts
    assert sessions(project) == (1, 1)


def test_a_task_that_has_no_retries_left_is_told_so(project, s):
    assert project.run(s.gives_up()) == "gave up"


@pytest.mark.parametrize("by_plain", [True, False], ids=["plain", "chain"])
def test_what_replaces_a_task_gets_its_session_or_it_is_ended(project, s, by_plain):
    result = project.run(s.replaced(1, by_plain=by_plain))
    assert result == (2 if by_plain else ["1", True])
    assert sessions(project) == (1, 1)


def test_a_member_may_be_added_to_a_chord(project, s):
    assert project.run(chord([s.adds_to_chord(1), s.adds_to_chord(2)], s.total())) == 26
    assert sessions(project, 2)[1] >= 2


def test_what_a_coroutine_publishes_has_its_task_for_a_parent(project, s):
    published = s.publishes().apply_async()
    child = project.app.AsyncResult(published.get(timeout=60))
    assert child.get(timeout=60) == [published.id, published.id]


def test_a_soft_limit_ends_the_call_and_the_task_or_is_caught(project):
    t = project.tasks
    caught, failed = [task.apply_async(queue="a") for task in (t.partial_result, t.limited)]
    assert caught.get(timeout=60) == "partial"
    with pytest.raises(SoftTimeLimitExceeded):
        failed.get(timeout=60)
    sessions(project, 2)
    assert sum(map(is_cancellation, project.recorder.exchanges)) == 3


def test_a_revoked_task_is_ended_and_its_call_too(project):
    result = project.tasks.slow.apply_async(queue="a")
    project.recorder.wait_for(is_call)
    result.revoke(terminate=True)
    with pytest.raises(TaskRevokedError):
        result.get(timeout=60)
    project.recorder.wait_for(is_cancellation)
    assert sessions(project) == (1, 1)


def test_all_tasks_of_a_worker_of_threads_run_on_one_loop(project):
    results = [project.tasks.meets.apply_async((50,), queue="b") for _ in range(50)]
    answers = [result.get(timeout=30) for result in results]
    assert [text for text, _ in answers] == [result.id for result in results]
    assert len({pid for _, pid in answers}) == 1
    assert sessions(project, 50) == (50, 50)


def test_both_workers_end_cleanly(project):
    """Last here: it ends them."""
    project.run(project.tasks.remember.s(1).set(queue="a"))
    project.app.control.shutdown()
    for worker in project.workers:
        wait_until(lambda worker=worker: not worker.running, 20, "the end of a worker")
        assert worker.returncode == 0
        assert "Traceback" not in project.logs()[worker.name]
