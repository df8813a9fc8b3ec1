"""Progress of servers becomes the state of the task: throttled, in its thread, and only while it runs."""

import asyncio
import logging
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
from calls import is_call, text_of
from celery import Celery, uuid
from celery.backends.base import BaseBackend
from celery.exceptions import SoftTimeLimitExceeded
from processes import wait_until

from mcp_celery import ConfigurationError, MCPTask
from mcp_celery.portal import Caller, Callers, close_portal
from mcp_celery.progress import TaskProgress

SLOW = "slow", {"steps": 5, "seconds": 0.01}


class Noting(MCPTask):
    """Notes what it writes into its state, and in which thread."""

    mcp_server = "peer"

    def update_state(self, task_id=None, state=None, meta=None, **options):
        self.app.states.append((task_id, state, meta, threading.current_thread()))
        super().update_state(task_id, state, meta, **options)


class InOneDict(BaseBackend):
    """A result backend that is no key-value store of Celery's, as those of databases are not."""

    def __init__(self, *args, **options):
        super().__init__(*args, **options)
        self.metas = {}

    def _store_result(self, task_id, result, state, traceback=None, request=None, **_):
        self.metas[task_id] = self._get_result_meta(result, state, traceback, request)

    def _get_task_meta_for(self, task_id):
        return self.metas.get(task_id, {"status": "PENDING", "result": None})


@pytest.fixture
def make(recorded_peer):
    """`make(function, **conf)` returns a task of an app that stores the results of eager tasks as well."""
    apps = []

    def make(function, backend="cache+memory://", peer=("python",), **conf):
        recorder = recorded_peer(*peer)
        app = Celery("progress", broker="memory://", backend=backend, set_as_current=False)
        app.conf.update(
            mcp_servers={"peer": {"url": recorder.url}}, task_store_eager_result=True, mcp_store_url="", **conf
        )
        app.states, app.recorder = [], recorder
        apps.append(app)
        return app.task(function, base=Noting, bind=True, shared=False, name="progress.task")

    yield make
    for app in apps:
        app.close()
    close_portal()


def slow(self, **options):
    return text_of(self.mcp.call_tool(*SLOW, **options))


def wants_progress(task):
    """Whether each call has asked for progress."""
    calls = filter(is_call, task.app.recorder.exchanges)
    return ["progressToken" in (call.rpc_params.get("_meta") or {}) for call in calls]


@pytest.mark.parametrize(
    "peer", [("python",), ("python1",), ("typescript",), ("python", "--modern-only")], ids=" ".join
)
def test_each_report_becomes_the_state_of_the_task_where_the_interval_is_0(make, peer):
    task = make(slow, peer=peer, mcp_progress_interval_seconds=0)
    task_id = uuid()
    assert task.apply(task_id=task_id).get() == "done"
    ids, states, metas, threads = zip(*task.app.states, strict=True)
    assert (set(ids), set(states), set(threads)) == ({task_id}, {"PROGRESS"}, {threading.current_thread()})
    assert [meta["progress"] for meta in metas] == [1, 2, 3, 4, 5]
    assert metas[0] == {"progress": 1, "total": 5, "message": "step 1", "tool": "slow"}
    assert task.AsyncResult(task_id).state == "SUCCESS"


def test_others_see_it_while_the_call_goes_on(make):
    task_id = uuid()

    def look():
        return wait_until(lambda: (info := task.AsyncResult(task_id).info) and info["progress"] >= 3 and info)

    def slow_enough(self):
        with ThreadPoolExecutor() as pool:
            looked = pool.submit(look)
            self.mcp.call_tool("slow", {"steps": 10, "seconds": 0.1})
            return looked.result()

    task = make(slow_enough, mcp_progress_interval_seconds=0)
    assert task.apply(task_id=task_id).get()["tool"] == "slow"


def test_a_burst_is_written_once_an_interval_and_its_last_report_is_not_lost(make):
    def burst(self):
        # 20 reports at once, then nothing for longer than an interval.
        self.mcp.call_tool("burst", {"reports": 20, "seconds": 0.5})

    task = make(burst, mcp_progress_interval_seconds=0.2)
    task.apply().get()
    progress = [meta["progress"] for _, _, meta, _ in task.app.states]
    assert progress[-1] == 20
    assert len(progress) <= 3


def test_a_session_id_in_a_message_does_not_get_into_the_state(make):
    def say(self):
        self.mcp.call_tool("say", {"level": "info", "text": "at {session}"})
        return self.mcp.handle.short_id

    task = make(say, mcp_progress_interval_seconds=0)
    short_id = task.apply().get()
    assert [meta["message"] for _, _, meta, _ in task.app.states] == [f"at {short_id}"]


def test_on_progress_takes_over(make):
    reports = []

    def own(self):
        self.mcp.call_tool(*SLOW, on_progress=lambda *report: reports.append(report))

    task = make(own, mcp_progress_interval_seconds=0)
    task.apply().get()
    assert len(reports) == 5
    assert not task.app.states


@pytest.mark.parametrize("value", [None, False])
def test_it_can_be_turned_off_and_then_servers_are_not_asked(make, value):
    task = make(slow, mcp_progress_interval_seconds=value)
    task.apply().get()
    assert not task.app.states
    assert wants_progress(task) == [False]


@pytest.mark.parametrize("value", [-1, "often", True])
def test_a_wrong_interval_is_refused(make, value):
    task = make(slow, mcp_progress_interval_seconds=value)
    with pytest.raises(ConfigurationError, match="mcp_progress_interval_seconds is a number of seconds"):
        task.apply(throw=True)


def test_without_a_state_that_others_can_look_at_there_is_no_progress(make):
    called = make(slow)
    assert called() == "done", "as a function"
    ignored = make(slow, task_ignore_result=True)
    ignored.apply(ignore_result=True).get()  # Celery 5.6 asks eager tasks for this one only
    eager = make(slow)
    eager.app.conf.task_store_eager_result = eager.store_eager_result = False
    eager.apply().get()
    without_backend = make(slow, backend=None)
    without_backend.apply().get()
    tasks = (called, ignored, eager, without_backend)
    assert [(task.app.states, wants_progress(task)) for task in tasks] == [([], [False])] * 4


@pytest.mark.filterwarnings("ignore:Call to deprecated setex")
@pytest.mark.parametrize("backend", ["cache+memory://", "redis", f"{__name__}:InOneDict"])
def test_a_final_state_is_not_written_over(make, valkey, backend):
    def ends_elsewhere(self):
        # As the main process of a worker does, whose time limit has struck.
        self.backend.mark_as_failure(self.request.id, RuntimeError("ended"))
        self.mcp.call_tool(*SLOW)
        return self.AsyncResult(self.request.id).state

    task = make(ends_elsewhere, backend=valkey if backend == "redis" else backend, mcp_progress_interval_seconds=0)
    assert task.apply().get() == "FAILURE"
    assert not task.app.states


def test_a_result_backend_that_fails_is_reported_once_and_fails_no_task(make, caplog):
    def cut_off(self):
        def refuse(*_args, **_options):
            raise ConnectionError("gone")

        self.mcp.open()
        store, self.backend.store_result = self.backend.store_result, refuse
        try:
            return slow(self)
        finally:
            self.backend.store_result = store

    task = make(cut_off, mcp_progress_interval_seconds=0)
    with caplog.at_level(logging.WARNING, "mcp_celery"):
        assert task.apply().get() == "done"
    assert [record.getMessage() for record in caplog.records].count(
        f"The progress of task progress.task[{task.app.states[0][0]}] is not shown: the result backend has failed "
        "(ConnectionError)"
    ) == 1
    assert len(task.app.states) == 1


def test_a_time_limit_that_strikes_meanwhile_is_not_taken_for_a_failure_of_the_backend(make):
    def interrupted(self):
        def strike(*_args, **_options):
            raise SoftTimeLimitExceeded

        self.mcp.open()
        store, self.backend.store_result = self.backend.store_result, strike
        try:
            with pytest.raises(SoftTimeLimitExceeded):
                self.mcp.call_tool("slow", {"steps": 100, "seconds": 0.1})
        finally:
            self.backend.store_result = store
        return "interrupted"

    task = make(interrupted, mcp_progress_interval_seconds=0)
    assert task.apply().get() == "interrupted"


def test_what_a_call_reported_is_not_written_once_it_has_ended(make):
    def two_calls(self):
        # The first of its reports is written at once; the last one is due while the second call has reported nothing.
        self.mcp.call_tool("burst", {"reports": 3, "seconds": 0.05})
        self.mcp.call_tool("slow", {"steps": 3, "seconds": 0.6})

    task = make(two_calls, mcp_progress_interval_seconds=0.5)
    task.apply().get()
    first, *later = [meta["tool"] for _, _, meta, _ in task.app.states]
    assert (first, set(later)) == ("burst", {"slow"})


@pytest.mark.parametrize("is_superseded", [False, True])
def test_the_state_of_another_execution_that_has_taken_over_is_left_alone(make, is_superseded):
    task, task_id, callers, caller = make(slow), uuid(), Callers(), Caller()
    task.push_request(id=task_id, called_directly=False)
    progress = TaskProgress(
        task,
        task.request,
        callers,
        interval_seconds=0,
        current_call=lambda: None,
        is_superseded=lambda: is_superseded,
    )
    asyncio.run(progress.of("slow")(1, 2))
    with callers.waiting(caller):
        caller.done()
        caller.serve()
    task.pop_request()
    assert len(task.app.states) == (0 if is_superseded else 1)
    assert task.AsyncResult(task_id).state == ("PENDING" if is_superseded else "PROGRESS")
