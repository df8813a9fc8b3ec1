"""Durable tasks on real workers whose processes are killed: the workflow ends as if nothing had happened."""

import gc
import importlib
import itertools
import json
import os
import re
import signal
import sys
from collections import Counter
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

import pytest
from billiard.exceptions import TimeLimitExceeded, WorkerLostError
from calls import is_call
from celery import chain, chord, group, uuid
from celery.exceptions import TaskRevokedError
from celery_versions import needs_celery_5_7, skip_without_quick_redelivery
from peers.recorder import Recorder
from processes import wait_until
from worker_process import Worker

from mcp_celery import CallInterruptedError, ConfigurationError, JournalMismatchError, SessionHandle
from mcp_celery.redis_store import get_store
from mcp_celery.settings import ServerSettings
from mcp_celery.sync_session import new_session

HERE = Path(__file__).parent
#: The servers, each as `start_peer` takes it.
KINDS = {
    "store": ("python", "--event-store"),
    "plain": ("python",),
    "typescript": ("typescript", "--event-store"),
    "everything": ("everything",),
}
DATABASE, QUICK_DATABASE, UNSTORED_DATABASE = 6, 7, 11
RESULT_SECONDS = 20
#: No two workers have the same name, and so none has the log of another.
NUMBERS = itertools.count()


class Durable:
    """The app as a publisher sees it, its servers with a recorder before each, and its workers."""

    def __init__(self, module, peers, recorders, env, folder):
        self.tasks = module
        self.app = module.app
        self.recorders = recorders
        self.workers = []
        self._peers = peers
        self._env = env
        self._folder = folder
        self._marks = {}

    def start_worker(self, name, *options, **env):
        path, env = self._folder / f"{name}.log", {**self._env, **env}
        self.workers.append(Worker("durable", name, "-c", "2", *options, folder=HERE, log_path=path, env=env))
        return self.workers[-1]

    def begin(self):
        """Forget what was recorded and logged so far, and all that is stored."""
        self.tasks.redis.flushdb()
        for recorder in self.recorders.values():
            recorder.clear()
        self._marks = {worker.name: len(worker.log()) for worker in self.workers}

    def close(self):
        for worker in self.workers:
            worker.kill()
        gc.collect()  # results unsubscribe when they are collected, for which the server has to be there
        consumer = self.app.backend.result_consumer
        consumer.stop()
        consumer.subscribed_to.clear()  # and those that the traceback of a failed test keeps are collected too late
        self.app.close()
        self.tasks.redis.close()

    def logs(self):
        """What each worker has logged in this test, by name."""
        return {worker.name: worker.log()[self._marks.get(worker.name, 0) :] for worker in self.workers}

    def is_logged(self, text, times=1):
        return sum(log.count(text) for log in self.logs().values()) >= times

    def worker_of(self, name):
        """The worker that gave its name to a run."""
        return next(worker for worker in self.workers if worker.name == name.partition("@")[0])

    def recorder(self, server="store"):
        if server not in self.recorders:
            pytest.skip("Node.js is not installed")
        return self.recorders[server]

    def get(self, result):
        return result.get(timeout=RESULT_SECONDS)

    def wait_until_under_way(self, *results):
        """Wait until each of these tasks has begun its slow call, and can continue it."""

        def begun():
            return sum(is_call(exchange) and exchange.rpc_params["name"] == "slow" for exchange in recorder.exchanges)

        recorder = self.recorder()
        wait_until(lambda: begun() == len(results), what="the slow calls")
        wait_until(lambda: all(self.tasks.has_token(result.id) for result in results), what="their tokens")

    def runs(self, result):
        """The worker and the process of each run of a task, in order."""
        return self.tasks.runs_of(result.id)

    def executions(self, server):
        """How often a server has started its slow tool; None where it does not count."""
        if server == "everything":
            return None
        session = new_session(ServerSettings(name="peer", url=self._peers[server].url))
        try:
            return int(session.call_tool("executions").content[0].text)
        finally:
            session.close()
            session.release()

    def assert_ended(self, server="store", sessions=1):
        """So many sessions were opened; each was ended by one DELETE, after which nothing was asked in it.

        Nothing is left in the store, but that the tasks are done.
        """
        recorder = self.recorder(server)
        wait_until(self.is_idle, what="the workers to be idle")

        def deletes():
            return [exchange for exchange in recorder.exchanges if exchange.method == "DELETE" and exchange.ended]

        wait_until(lambda: len(deletes()) >= sessions, what=f"the end of all sessions; {recorder.methods()}")
        wait_until(lambda: not self.stored(), what=f"an empty store; it has {self.stored()}")
        assert len(recorder.session_ids) == sessions, recorder.methods()
        assert sorted(delete.session_id for delete in deletes()) == sorted(recorder.session_ids)
        for delete in deletes():
            own = [exchange.number for exchange in recorder.exchanges if exchange.session_id == delete.session_id]
            assert own[-1] == delete.number, recorder.methods()

    def is_idle(self):
        """Whether all messages are done with, those that came twice among them."""
        if self.has_messages():
            return False
        # Whoever has taken a message off the queue, and not noted it yet, does so before it answers.
        running = sum(worker.running for worker in self.workers)
        inspect = self.app.control.inspect(timeout=1, limit=running)
        active, reserved = inspect.active() or {}, inspect.reserved() or {}
        if not 0 < running == len(active) == len(reserved):
            return False
        return not any([*active.values(), *reserved.values()]) and not self.has_messages()

    def has_messages(self):
        return self.tasks.redis.exists("unacked", "celery") > 0

    def stored(self):
        """The keys of the store, without the journals of tasks that are known to be done, and those of workers."""
        redis = self.tasks.redis
        names = {name for name in redis.keys("{mcp_celery}*") if not re.search(":leader:|:tasks$", name)}
        done = {name for name in names if ":journal:" in name and set(redis.hkeys(name)) == {"v", "done"}}
        assert all(redis.ttl(name) > 0 for name in done)
        return names - done


@contextmanager
def started(peers, recorders, broker, folder, **env):
    servers = {name: (recorder.url, KINDS[name]) for name, recorder in recorders.items()}
    env = {"BROKER": broker, "SERVERS": json.dumps(servers), **env}
    with pytest.MonkeyPatch.context() as patch:
        for name, value in env.items():
            patch.setenv(name, value)
        patch.syspath_prepend(str(HERE))
        sys.modules.pop("durable", None)
        module = importlib.import_module("durable")
    durable = Durable(module, peers, recorders, env, folder)
    try:
        yield durable
    finally:
        durable.close()


@pytest.fixture(scope="module")
def peers(session_peers):
    """The servers that can be started here, by name."""
    peers = {}
    for name, kind in KINDS.items():
        with suppress(pytest.skip.Exception):
            peers[name] = session_peers.shared(*kind)
    return peers


@pytest.fixture(scope="module")
def recorders(peers):
    with ExitStack() as stack:
        yield {name: stack.enter_context(Recorder(peer.url)) for name, peer in peers.items()}


@pytest.fixture(scope="module")
def one_worker(peers, recorders, valkey_server, tmp_path_factory):
    broker, folder = f"{valkey_server.connection_url}/{DATABASE}", tmp_path_factory.mktemp("durable")
    with started(peers, recorders, broker, folder) as durable:
        durable.start_worker("a")
        yield durable


def used(durable):
    """Have a test use it, and show what its workers have logged where the test fails."""
    durable.begin()
    try:
        yield durable
    finally:
        for name, log in durable.logs().items():
            print(f"--- worker {name}\n{log}")


@pytest.fixture
def durable(one_worker):
    """One worker of two processes, and recorders that have seen nothing yet."""
    yield from used(one_worker)


@pytest.fixture(scope="module")
def quick_app(peers, recorders, valkey_server, tmp_path_factory):
    """Messages come again after a second, while leases last for two."""
    skip_without_quick_redelivery()
    broker, folder = f"{valkey_server.connection_url}/{QUICK_DATABASE}", tmp_path_factory.mktemp("quick")
    with started(peers, recorders, broker, folder, VISIBILITY="1", LEASE="2") as durable:
        yield durable


@pytest.fixture
def quick(quick_app):
    """Two workers, with enough processes for all the copies of some messages."""
    if not quick_app.is_idle():  # after a test that has failed, which is to be the only one
        for worker in quick_app.workers:
            worker.kill()
    quick_app.workers = [worker for worker in quick_app.workers if worker.running]
    while len(quick_app.workers) < 2:
        quick_app.start_worker(f"quick{next(NUMBERS)}", "-c", "6")
    yield from used(quick_app)


def calls_of(recorder):
    """How often each tool was called; `echo` by its text, without the ID of the task."""
    counts = Counter()
    for exchange in filter(is_call, recorder.exchanges):
        name, arguments = exchange.rpc_params["name"], exchange.rpc_params.get("arguments", {})
        text = arguments.get("text", arguments.get("message"))
        counts[name if text is None else text.partition(" ")[2]] += 1
    return counts


def requests(recorder):
    """The requests in short, without the listings of tools."""
    return [name for name in recorder.methods() if name != "POST tools/list"]


HANDSHAKE = ["POST initialize", "POST notifications/initialized"]
CALL = "POST tools/call"
SLOW = {"everything": "trigger-long-running-operation"}


# A process is killed


@pytest.mark.parametrize("server", ["store", "typescript", "everything"])
def test_a_call_under_way_when_the_process_is_killed_is_continued_by_the_next_one(durable, server):
    recorder, before = durable.recorder(server), durable.executions(server)
    result = durable.tasks.works.delay(server, "within", seconds=0.3)
    outcome = durable.get(result)
    assert outcome["texts"][0] == "first"
    assert outcome["texts"][2] == "last"
    assert outcome["reports"][-1] == 3, "progress goes on"
    assert outcome["reports"] == sorted(set(outcome["reports"]))
    assert len(set(durable.runs(result))) == 2
    assert calls_of(recorder) == {"first": 1, SLOW.get(server, "slow"): 1, "last": 1}
    if before is not None:
        assert durable.executions(server) == before + 1
    gets = [exchange for exchange in recorder.exchanges if exchange.method == "GET"]
    assert requests(recorder) == [*HANDSHAKE, CALL, CALL, *["GET"] * len(gets), CALL, "DELETE"]
    durable.assert_ended(server)


def test_a_process_killed_while_its_task_is_asked_leaves_the_question_to_the_next_one(durable):
    result = durable.tasks.is_asked.delay()
    assert durable.get(result) == "accept: to why"
    assert len(set(durable.runs(result))) == 2
    assert calls_of(durable.recorder()) == {"ask_user": 1}
    durable.assert_ended()


def test_a_tool_that_has_finished_before_its_answer_was_read_is_not_called_again(durable):
    recorder = durable.recorder()
    result = durable.tasks.notes.delay()
    durable.get(result)
    durable.assert_ended()

    recorder.clear()
    recorder.stall(rpc_method="tools/call", after_events=1)
    result = durable.tasks.notes.delay()
    call = recorder.wait_for(is_call)
    ((_, pid),) = wait_until(lambda: durable.runs(result))
    key = f"{{mcp_celery}}:journal:{result.id}"
    wait_until(lambda: durable.tasks.redis.hexists(key, "token:0"), what="the token")
    # The server answers a later call of this session only now and then after the first; so ask until it has.
    assert call.ended is None
    os.kill(pid, signal.SIGKILL)
    assert durable.get(result) == 1
    assert calls_of(recorder) == {"note": 1}
    durable.assert_ended()


def test_calls_that_have_finished_are_not_repeated(durable):
    result = durable.tasks.works.delay("plain", "between")
    assert durable.get(result) == {"texts": ["first", "done", "last"], "reports": [1, 2, 3]}
    assert len(durable.runs(result)) == 2
    assert requests(durable.recorder("plain")) == [*HANDSHAKE, CALL, CALL, CALL, "DELETE"]
    durable.assert_ended("plain")


@pytest.mark.parametrize("where", ["before", "after"])
def test_a_task_killed_before_its_first_call_or_after_its_last_makes_it_once(durable, where):
    result = durable.tasks.notes.delay(where=where)
    assert durable.get(result) == 1
    assert len(durable.runs(result)) == 2
    assert requests(durable.recorder()) == [*HANDSHAKE, CALL, "DELETE"]
    durable.assert_ended()


@pytest.mark.parametrize("task", ["is_retried", "is_retried_anew"])
def test_a_lost_process_may_be_a_retry_too(durable, task):
    recorder = durable.recorder()
    result = getattr(durable.tasks, task).delay("store", "within")
    assert durable.get(result)["texts"] == ["first", "done", "last"]
    assert len(durable.runs(result)) == 2
    assert calls_of(recorder) == {"first": 1, "slow": 1, "last": 1}
    durable.assert_ended()


# A call that cannot be continued


def test_a_call_that_cannot_be_continued_raises_in_the_caller(durable):
    result = durable.tasks.works.delay("plain", "without a token")
    with pytest.raises(CallInterruptedError, match="tool 'slow' was under way") as caught:
        durable.get(result)
    assert caught.value.tool == "slow"
    assert calls_of(durable.recorder("plain")) == {"first": 1, "slow": 1}
    durable.assert_ended("plain")


@pytest.mark.parametrize(
    ("task", "tool"), [("works", "slow_look"), ("works", "slow_put"), ("calls_again", "slow")], ids=str
)
def test_a_call_that_may_run_twice_is_made_again(durable, task, tool):
    result = getattr(durable.tasks, task).delay("plain", "without a token", tool)
    assert durable.get(result) == {"texts": ["first", "done", "last"], "reports": [1, 2, 3]}
    assert calls_of(durable.recorder("plain")) == {"first": 1, tool: 2, "last": 1}
    durable.assert_ended("plain")


def test_another_path_than_before_raises_in_the_caller(durable):
    result = durable.tasks.strays.delay()
    with pytest.raises(JournalMismatchError, match="Call 2") as caught:
        durable.get(result)
    assert (caught.value.number, caught.value.before, caught.value.now) == (2, "tool 'echo'", "tool 'add'")
    assert calls_of(durable.recorder()) == {"1 of 2": 1, "2 of 2": 1}
    durable.assert_ended()


# Retries


def test_a_retry_repeats_no_call_but_those_that_failed(durable):
    result = durable.tasks.retries.delay(2)
    assert durable.get(result) == 2
    assert calls_of(durable.recorder()) == {"once": 1, "fail": 3}
    durable.assert_ended()


def test_an_automatic_retry_continues_the_call_that_broke_off(durable):
    recorder = durable.recorder()
    result = durable.tasks.retries_by_itself.s("breaks off")
    recorder.cut(rpc_method="tools/call", after_events=100)  # the first call passes unharmed
    recorder.cut(rpc_method="tools/call", after_events=1)
    recorder.answer(http_method="GET", status=405)
    result = result.delay()
    assert durable.get(result).endswith("breaks off")
    assert len(durable.runs(result)) == 2
    assert calls_of(recorder) == {"once": 1, "breaks off": 1}
    assert requests(recorder) == [*HANDSHAKE, CALL, CALL, "GET", "GET", "DELETE"]
    durable.assert_ended()


def test_a_retry_of_a_task_that_is_durable_for_redeliveries_only_makes_all_calls_anew(durable):
    result = durable.tasks.retries_anew.delay(2)
    assert durable.get(result) == 2
    assert calls_of(durable.recorder()) == {"once": 3, "fail": 3}
    durable.assert_ended()


@needs_celery_5_7
def test_of_two_retries_only_that_which_the_task_has_asked_for_makes_all_calls_anew(durable):
    result = durable.tasks.retries_anew.delay(2, "between")
    assert durable.get(result) == 2
    assert len(durable.runs(result)) == 3
    assert calls_of(durable.recorder()) == {"once": 2, "fail": 2}
    durable.assert_ended()


def test_an_attempt_that_goes_on_beside_its_retry_leaves_the_task_to_that(durable):
    result = durable.tasks.retries_beside.delay()
    wait_until(lambda: len(durable.runs(result)) == 2, what="the second attempt")
    durable.assert_ended()
    assert requests(durable.recorder()) == [*HANDSHAKE, CALL, CALL, "DELETE"]


@pytest.mark.parametrize("opens", [True, False])
def test_a_message_that_was_put_back_continues_in_the_same_session(durable, opens):
    t = durable.tasks
    before = [] if opens else [t.notes.si()]
    result = chain(*before, t.rejects.si(requeue=True)).delay()
    assert durable.get(result) == "right"
    assert len(durable.runs(result)) == 2
    assert requests(durable.recorder()) == [*HANDSHAKE, *[CALL] * len(before), CALL, CALL, "DELETE"]
    durable.assert_ended()


# Sessions that the task itself opens and ends


@pytest.mark.parametrize("where", ["opened", "closed", "opened again", "within"])
def test_what_a_killed_task_did_to_its_sessions_is_not_done_again(durable, where):
    recorder, before = durable.recorder(), durable.executions("store")
    result = durable.tasks.closes.delay(where)
    assert durable.get(result) == "right"
    assert len(durable.runs(result)) == 2
    assert durable.executions("store") == before + 1
    continued = ["GET"] * requests(recorder).count("GET")
    first = [*HANDSHAKE, CALL, "DELETE"]
    assert requests(recorder) == [*first, *HANDSHAKE, CALL, *continued, CALL, "DELETE"]
    assert bool(continued) == (where == "within")
    durable.assert_ended(sessions=2)


def test_a_killed_task_that_had_detached_its_session_gets_the_same_handle(durable):
    recorder = durable.recorder()
    result = durable.tasks.detaches.delay()
    durable.get(result)
    first, second = map(SessionHandle.load, durable.tasks.redis.lrange(f"detached:{result.id}", 0, -1))
    assert first == second
    wait_until(lambda: "DELETE" in recorder.methods())
    assert requests(recorder) == [*HANDSHAKE, CALL, *HANDSHAKE, CALL, "DELETE"]
    assert recorder.exchanges[-1].session_id != first.session_id
    wait_until(lambda: not durable.stored(), what="an empty store")


# Tasks that do not run again


def test_a_message_that_was_rejected_leaves_nothing(durable):
    result = durable.tasks.rejects.delay(requeue=False)
    durable.assert_ended()
    assert len(durable.runs(result)) == 1


def test_a_task_that_came_to_its_hard_time_limit_leaves_nothing(durable):
    result = durable.tasks.works.apply_async(("store",), {"seconds": 10}, time_limit=1)
    with pytest.raises(TimeLimitExceeded):
        durable.get(result)
    durable.assert_ended()
    assert len(durable.runs(result)) == 1


def test_a_killed_task_whose_message_was_acknowledged_before_leaves_nothing(durable):
    result = durable.tasks.is_acked_early.delay("store", "within")
    with pytest.raises(WorkerLostError):
        durable.get(result)
    durable.assert_ended()
    assert len(durable.runs(result)) == 1


def test_a_task_that_is_revoked_while_it_runs_leaves_nothing(durable):
    result = durable.tasks.works.delay("store", seconds=10)
    durable.wait_until_under_way(result)
    durable.app.control.revoke(result.id, terminate=True)
    with pytest.raises(TaskRevokedError):
        durable.get(result)
    durable.assert_ended()
    assert len(durable.runs(result)) == 1


def test_a_task_that_is_revoked_before_its_retry_leaves_nothing(durable):
    result = durable.tasks.retries_later.delay()
    wait_until(lambda: durable.tasks.redis.lrange("retries", 0, -1), what="a retry")
    durable.app.control.revoke(result.id)
    with pytest.raises(TaskRevokedError):
        durable.get(result)
    durable.assert_ended()
    assert calls_of(durable.recorder()) == {"once": 1}


# In workflows


def test_members_of_a_chord_that_are_killed_count_once(durable):
    t = durable.tasks
    workflow = chain(
        t.notes.s(), chord([t.notes.s(where="before"), t.notes.s(where="after"), t.notes.s()], t.totals.s())
    )
    assert durable.get(workflow.delay()) == 3
    assert calls_of(durable.recorder()) == {"note": 4, "total": 1}
    durable.assert_ended()


def test_members_of_a_group_that_are_killed_each_give_their_result(durable):
    t = durable.tasks
    result = group(t.works.s("store", "within"), t.works.s("store", "between"), t.notes.s(where="after")).delay()
    texts = {"texts": ["first", "done", "last"]}
    outcomes = durable.get(result)
    assert [outcome if outcome == 1 else {"texts": outcome["texts"]} for outcome in outcomes] == [texts, texts, 1]
    assert calls_of(durable.recorder()) == {"first": 2, "slow": 2, "last": 2, "note": 1}
    durable.assert_ended(sessions=3)


def test_a_session_that_came_with_the_message_goes_on_after_a_kill(durable):
    t = durable.tasks
    result = chain(t.notes.s(), t.works.si("store", "within"), t.notes.s(where="after"), t.notes.s()).delay()
    assert durable.get(result) == 1
    assert calls_of(durable.recorder()) == {"note": 3, "first": 1, "slow": 1, "last": 1}
    durable.assert_ended()


@pytest.mark.parametrize("when", ["before", "after"])
def test_a_link_runs_once_where_the_process_is_killed_around_its_publishing(durable, when):
    t = durable.tasks
    result = t.begets.apply_async((when,), link=t.notes.s())
    durable.get(result)
    durable.assert_ended()
    assert len(durable.runs(result)) == 2
    assert calls_of(durable.recorder()) == {"begets": 1, "note": 1}


@pytest.mark.parametrize("nth", [1, 2, 3])
@pytest.mark.parametrize("opens", [True, False])
def test_the_members_of_a_chord_run_once_where_the_process_is_killed_while_they_are_published(durable, opens, nth):
    t = durable.tasks
    before = [] if opens else [t.notes.si()]
    members = chord([t.notes.s(), t.notes.s(), t.notes.s()], t.totals.s())
    result = chain(*before, t.begets.si("after", nth), members).delay()
    assert durable.get(result) == 3
    durable.assert_ended()
    assert calls_of(durable.recorder()) == {"begets": 1, "note": 3 + len(before), "total": 1}


@pytest.mark.parametrize("opens", [True, False])
def test_a_next_step_that_ends_before_the_killed_one_runs_again_has_closed_the_session(durable, opens):
    t = durable.tasks
    before = [] if opens else [t.notes.si()]
    result = chain(*before, t.begets.si("after"), t.notes.si()).delay()
    assert durable.get(result) == 1
    wait_until(lambda: len(durable.runs(result.parent)) == 2, what="the second run")
    durable.assert_ended()
    assert calls_of(durable.recorder()) == {"begets": 1, "note": 1 + len(before)}


@pytest.mark.parametrize("when", [None, "before", "after"])
@pytest.mark.parametrize("where", ["within", None])
def test_what_replaces_a_task_has_a_journal_of_its_own(durable, where, when):
    result = durable.tasks.replaces.delay("task", where, when)
    assert durable.get(result)["texts"] == ["first", "done", "last"]
    if when == "after":
        wait_until(durable.is_idle, what="the workers to be idle")  # the killed task may run again until then
        # The replacement has given the result, which tells Celery that the killed task is done.
        durable.tasks.redis.delete(f"{{mcp_celery}}:journal:{result.id}")
    durable.assert_ended()
    assert calls_of(durable.recorder()) == {"replaced": 1, "first": 1, "slow": 1, "last": 1}


@pytest.mark.parametrize("where", ["before", "after"])
def test_a_chain_may_replace_a_task_and_be_killed(durable, where):
    result = durable.tasks.replaces.delay("chain", where)
    assert durable.get(result)["texts"] == ["first", "done", "last"]
    durable.assert_ended()
    assert calls_of(durable.recorder()) == {"replaced": 1, "note": 1, "first": 1, "slow": 1, "last": 1}


@pytest.mark.parametrize("where", [None, "after"])
@pytest.mark.parametrize(
    ("kind", "notes"), [("chord", 2), ("chain with a chord", 3), ("chain with a group", 3)], ids=str
)
def test_each_task_of_a_workflow_that_replaces_a_task_has_a_journal_of_its_own(durable, kind, notes, where):
    result = durable.tasks.replaces.delay(kind, where)
    assert durable.get(result) == 4
    durable.assert_ended()
    assert calls_of(durable.recorder()) == {"replaced": 1, "note": notes, "total": 1, "double": 1}


def test_the_items_of_a_mapped_task_are_calls_of_one_execution(durable):
    assert durable.get(durable.tasks.takes_items.map([0, 1, 2]).delay()) == [0, 1, 2]
    durable.assert_ended()
    assert calls_of(durable.recorder()) == {"item 0": 1, "item 1": 1, "item 2": 1}


# The whole worker, and two runs at once


@pytest.mark.parametrize("cold", [False, True], ids=["killed", "shut down at once"])
def test_another_worker_goes_on_where_a_whole_worker_has_ended(quick, cold):
    before = quick.executions("store")
    result = quick.tasks.works.delay("store", seconds=1)
    quick.wait_until_under_way(result)
    # The second run may wait already, since the message has come again.
    ((name, _),) = quick.runs(result)
    worker = quick.worker_of(name)
    if cold:
        os.kill(worker.pid, signal.SIGQUIT)
    else:
        worker.kill()
    assert quick.get(result)["texts"] == ["first", "done", "last"]
    (other,) = (other for other in quick.workers if other is not worker)
    assert [quick.worker_of(name) for name, _ in quick.runs(result)] == [worker, other]
    assert calls_of(quick.recorder()) == {"first": 1, "slow": 1, "last": 1}
    assert quick.executions("store") == before + 1
    wait_until(lambda: not worker.running, 20, "the end of a worker")
    quick.assert_ended()


def test_tasks_go_on_where_a_worker_of_threads_was_killed(quick):
    for worker in quick.workers:
        worker.kill()
    quick.start_worker(f"threads{next(NUMBERS)}", "-P", "threads")
    results = [quick.tasks.works.delay("store", seconds=0.5) for _ in range(2)]
    quick.wait_until_under_way(*results)
    quick.workers[-1].kill()
    quick.start_worker(f"threads{next(NUMBERS)}", "-P", "threads")
    for result in results:
        assert quick.get(result)["texts"] == ["first", "done", "last"]
        assert len({worker for worker, _ in quick.runs(result)}) == 2
    assert calls_of(quick.recorder()) == {"first": 2, "slow": 2, "last": 2}
    quick.assert_ended(sessions=2)
    quick.workers[-1].kill()


def test_a_second_run_beside_the_first_one_waits_and_has_nothing_to_do(quick):
    result = quick.tasks.works.delay("store", seconds=1)
    assert quick.get(result) == {"texts": ["first", "done", "last"], "reports": [1, 2, 3]}
    assert len(quick.runs(result)) == 1, "only one has come to the function"
    wait_until(lambda: quick.is_logged("goes no further here: The task has ended before"))
    assert quick.is_logged("waiting for its lease")
    assert calls_of(quick.recorder()) == {"first": 1, "slow": 1, "last": 1}
    assert quick.get(result)["texts"] == ["first", "done", "last"], "the result stays"
    quick.assert_ended()


@pytest.mark.parametrize("until", ["runs", "has ended"])
@pytest.mark.parametrize("ends", [("returns",), ("calls", "raises", "retries", "rejects")], ids=" ".join)
def test_a_run_that_was_frozen_until_another_one_has_no_effect(quick, ends, until):
    t = quick.tasks
    results = [t.freezes.apply_async((how,), link_error=t.told.si(how)) for how in ends]
    try:
        for result in results:
            wait_until(lambda result=result: len(quick.runs(result)) == 2, 20, "a second run")
            if until == "has ended":
                assert quick.get(result) == "right"
    finally:
        for result in results:
            _, pid = quick.runs(result)[0]
            os.kill(pid, signal.SIGCONT)
    assert [quick.get(result) for result in results] == ["right"] * len(ends)
    quick.assert_ended(sessions=len(ends))
    assert calls_of(quick.recorder()) == {"first": len(ends), "slow": len(ends)}
    assert [len(quick.runs(result)) for result in results] == [2] * len(ends)
    assert t.redis.lrange("told", 0, -1) == []
    assert t.redis.lrange("retries", 0, -1) == []


def test_a_soft_time_limit_that_comes_while_a_run_waits_for_the_lease_puts_the_message_back(durable):
    t, store, task_id = durable.tasks, get_store(durable.app.conf), uuid()
    assert store.claim_journal(task_id, "another run", 60).standing == "mine"
    result = t.notes.apply_async(task_id=task_id, soft_time_limit=1, link_error=t.told.si("notes"))
    wait_until(lambda: durable.is_logged(f"Task durable.notes[{task_id}] received", 2) or result.ready())
    assert not result.ready()
    assert durable.is_logged("Soft time limit (1s) exceeded")
    store.release_journal(task_id, "another run")
    assert durable.get(result) == 1
    assert calls_of(durable.recorder()) == {"note": 1}
    assert t.redis.lrange("told", 0, -1) == []
    durable.assert_ended()


# Not durable


@pytest.mark.parametrize("task", ["keeps", "keeps_over_retries"])
def test_a_task_that_is_not_durable_resumes_the_session_that_its_killed_run_had_opened(durable, task):
    result = getattr(durable.tasks, task).delay()
    assert durable.get(result) == "kept"
    assert len(durable.runs(result)) == 2
    assert requests(durable.recorder()) == [*HANDSHAKE, CALL, CALL, "DELETE"]
    durable.assert_ended()
    assert durable.tasks.redis.keys("{mcp_celery}:journal:*") == []


def test_a_durable_task_without_a_store_is_a_mistake(peers, recorders, valkey_server, tmp_path):
    broker = f"{valkey_server.connection_url}/{UNSTORED_DATABASE}"
    with started(peers, recorders, broker, tmp_path, STORE="") as durable:
        durable.begin()
        durable.start_worker("d", "-P", "solo")
        with pytest.raises(ConfigurationError, match=r"Task durable.notes is durable, .* set mcp_store_url"):
            durable.get(durable.tasks.notes.delay())
        assert durable.recorder().exchanges == []
