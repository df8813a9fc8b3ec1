"""Ends that no task function sees, only the main process of its worker or nobody: the reaper ends such sessions.

All workflows run side by side, since the reaper gives a session that was abandoned some time.
"""

from socket import gethostname

import pytest
from celery import chain, group
from celery_versions import parameters
from conftest import Project, start_project
from peers.recorder import Recorder
from processes import wait_until
from recorded import assert_well_kept, calls_of, exchanges_of, session_named, texts_of
from redis import Redis
from signatures import Steps, failed_by

from mcp_celery.handle import short_hash
from mcp_celery.redis_store import get_store

#: When a session ends that nobody comes for.
TTL_SECONDS = 15
#: A queue to which nobody listens at first.
LATE = "late"
#: A queue to which nobody ever listens.
NOBODY = "nobody"
#: The session of a first step that is killed and delivered again.
SECOND = "second delivery"


class UnseenSteps(Steps):
    """Steps, and those that are to be revoked."""

    def __init__(self, tasks):
        super().__init__(tasks)
        self.revoked_ids = []
        self.terminated_ids = {}

    def revoked(self, step):
        """*step*, which is revoked while it waits in its queue."""
        step.freeze()
        self.revoked_ids.append(step.id)
        return step.set(queue=LATE)

    def terminated(self, step, signal="SIGTERM"):
        """*step*, which is revoked while it hangs."""
        step.freeze()
        self.terminated_ids[step.id] = signal
        return step


#: Name: what follows a step that opens the session, and the number of calls.
ENDS = {
    # The process of the task is killed.
    "killed": (lambda s: chain(s.ends("kill"), s.add(1)), 2),
    "killed at the end": (lambda s: s.ends("kill"), 2),
    "killed plain task": (lambda s: chain(s.ends_plainly("kill"), s.add(1)), 1),
    "killed in a header": (lambda s: chain(group(s.ends("kill"), s.add(1)), s.total()), 3),
    "killed with an errback that is called in place": (lambda s: failed_by(s.ends("kill"), s.on_error()), 3),
    "killed with an errback that is published": (lambda s: failed_by(s.ends("kill"), s.on_error_of()), 3),
    "killed plain task with an errback": (
        lambda s: chain(failed_by(s.ends_plainly("kill"), s.on_error()), s.add(1)),
        2,
    ),
    "killed and delivered again": (lambda s: chain(s.ends_once("kill"), s.add(1)), 4),
    "killed and retried": (lambda s: chain(s.dies_once(), s.add(1)), 4),
    # The process of the task is killed since it took too long.
    "past the hard time limit": (lambda s: chain(s.ends("stick").set(time_limit=1), s.add(1)), 2),
    "plain task past the hard time limit": (lambda s: chain(s.ends_plainly("stick").set(time_limit=1), s.add(1)), 1),
    "past the hard time limit, and acknowledged late": (
        lambda s: chain(s.ends_once("stick").set(time_limit=1), s.add(1)),
        2,
    ),
    "past the hard time limit with an errback": (
        lambda s: failed_by(s.ends("stick").set(time_limit=1), s.on_error()),
        3,
    ),
    "past the hard time limit in a header": (
        lambda s: chain(group(s.ends("stick").set(time_limit=1), s.add(1)), s.total()),
        3,
    ),
    # It is ended by hand.
    "terminated with an errback, which is not called": (
        lambda s: failed_by(s.terminated(s.ends("hang")), s.on_error()),
        2,
    ),
    "terminated by SIGKILL": (lambda s: chain(s.terminated(s.ends("hang"), "SIGKILL"), s.add(1)), 2),
    # The task never starts.
    "revoked": (lambda s: chain(s.revoked(s.add(1)), s.add(1)), 1),
    "revoked plain task": (lambda s: chain(s.revoked(s.plus_one()), s.add(1)), 1),
    "revoked in a header": (lambda s: chain(group(s.revoked(s.add(1)), s.add(1)), s.total()), 2),
    "revoked plain task with an errback, which is not called": (
        lambda s: chain(failed_by(s.revoked(s.plus_one()), s.on_error()), s.add(1)),
        1,
    ),
    "revoked in a header whose body has an errback": (
        lambda s: chain(group(s.revoked(s.add(1)), s.add(1)), failed_by(s.total(), s.on_error())),
        3,
    ),
    "expired": (lambda s: chain(s.add(1).set(queue=LATE, expires=0.5), s.add(1)), 1),
    "expired plain task": (lambda s: chain(s.plus_one().set(queue=LATE, expires=0.5), s.add(1)), 1),
    "expired in a header": (lambda s: chain(group(s.add(1).set(queue=LATE, expires=0.5), s.add(1)), s.total()), 2),
    "purged": (lambda s: chain(s.add(1).set(queue=NOBODY), s.add(1)), 1),
    "purged in a header": (lambda s: chain(group(s.add(1).set(queue=NOBODY), s.add(1)), s.total()), 2),
    # Nor can its message be made: too many arguments.
    "second member": (lambda s: chain(group(s.add(1), s.add(1, 2)), s.total()), 2),
    "body": (lambda s: chain(group(s.add(1), s.add(1)), s.total(5), s.add(1)), 3),
    "body with an errback": (lambda s: chain(group(s.add(1), s.add(1)), failed_by(s.total(5), s.on_error())), 4),
    # Errbacks are called in the main process, after the session has ended.
    "rejected with an errback": (lambda s: failed_by(s.ends("reject"), s.on_error()), 2),
}


@pytest.fixture(scope="module")
def unseen(session_peers, valkey_server, tmp_path_factory):
    """A project in which all these workflows have run, and all their sessions have ended."""
    with Recorder(session_peers.shared("python", "--event-store").url) as recorder:
        broker = f"{valkey_server.connection_url}/5"
        environment = {"TTL": str(TTL_SECONDS), "HISTORY": "600"}
        module, workers = start_project(
            recorder.url,
            broker,
            tmp_path_factory.mktemp("unseen"),
            environment,
            ("-c", "3", "-I", "mcp_celery.session"),
        )
        project = Project(module, workers, recorder)
        try:
            run_all(project)
            yield project
        finally:
            for name, log in project.logs().items():
                print(f"--- worker {name}\n{log}")
            project.close()


def run_all(project):
    s, control = UnseenSteps(project.tasks), project.app.control
    for name, (flow, *_) in ENDS.items():
        chain(s.names(0, name), flow(s)).apply_async()
    chain(s.ends_once(0, "kill"), s.names(SECOND)).apply_async()
    with Redis.from_url(project.app.conf.broker_url) as client:
        never = [name for name in ENDS if name.startswith(("revoked", "expired"))]
        wait_until(lambda: client.llen(LATE) == len(never) and client.llen(NOBODY) == 2, 20, "the waiting steps")
        client.delete(NOBODY)
    for task_id in s.revoked_ids:
        control.revoke(task_id)
    wait_until(
        lambda: texts_of(project.recorder.exchanges).count("hang") == len(s.terminated_ids), 30, "the steps that hang"
    )
    for task_id, signal in s.terminated_ids.items():
        control.revoke(task_id, terminate=True, signal=signal)
    control.add_consumer(LATE, reply=True, destination=[f"a@{gethostname()}"])
    store = get_store(project.app.conf)
    wait_until(lambda: not list(store.sessions()), 3 * TTL_SECONDS, "all sessions to end")
    project.rest()


@pytest.mark.parametrize("name", parameters(ENDS, new=["killed and retried"]))
def test_a_session_ends_though_no_task_function_sees_the_end(unseen, name):
    session_id = session_named(unseen.recorder, name)
    assert calls_of(unseen.recorder, session_id) == ENDS[name][1]
    assert_well_kept(unseen.recorder, session_id)


def test_a_session_that_a_killed_task_had_opened_is_gone_on_with_by_its_second_delivery(unseen):
    session_id = session_named(unseen.recorder, SECOND)
    assert texts_of(exchanges_of(unseen.recorder, session_id)) == ["kill", "kill"]
    assert_well_kept(unseen.recorder, session_id)


def test_the_history_of_each_session_says_once_that_it_was_closed(unseen):
    store = get_store(unseen.app.conf)
    for session_id in unseen.recorder.session_ids:
        (record,) = store.find(short_hash(session_id))
        assert [event["what"] for event in store.history(record.key)].count("closed") == 1
