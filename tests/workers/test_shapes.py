"""Each shape that a workflow can have, on two workers: the sessions that are meant, and the results of plain Celery."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from celery import chain, chord, group
from celery_versions import parameters
from recorded import CALL, assert_sessions
from signatures import linked, still

from mcp_celery import SessionHandle

HERE = Path(__file__).parent


#: Name: the workflow, its result, and how many calls each of its sessions has.
ONE_SESSION = {
    "chain of chains": (lambda s: chain(chain(s.add(1, 1), s.add(1)), chain(s.add(1), chain(s.add(1)))), 5, 4),
    "immutable steps": (lambda s: chain(s.add(1, 1), still(s.add(5, 5)), still(s.add(7, 7))), 14, 3),
    "plain tasks first, between and last": (
        lambda s: chain(s.plus_one(1), s.add(1), s.plus_one(), s.plus_one(), s.add(1), s.plus_one()),
        7,
        2,
    ),
    "group, then a task": (
        lambda s: chain(s.add(1, 1), group(s.add(1), s.add(2), s.add(3)), s.total()),
        12,
        5,
    ),
    "group, then a chain": (
        lambda s: chain(s.add(1, 1), group(s.add(1), s.add(2)), s.plain_total(), s.add(1), s.plus_one(), s.add(1)),
        10,
        5,
    ),
    "group of plain tasks, then a task": (
        lambda s: chain(s.add(1, 1), group(s.plus_one(), s.plus_one()), s.total()),
        6,
        2,
    ),
    "plain tasks before a group": (
        lambda s: chain(s.add(1, 1), s.plus_one(), s.plus_one(), group(s.add(1), s.add(1)), s.total()),
        10,
        4,
    ),
    "chord written as a chord": (lambda s: chain(s.add(1, 1), chord([s.add(1), s.add(2)], s.total())), 7, 4),
    "chord with a plain body": (lambda s: chain(s.add(1, 1), chord([s.add(1), s.add(2)], s.plain_total())), 7, 3),
    "chord, then a task": (
        lambda s: chain(s.add(1, 1), chord([s.add(1), s.add(2)], s.total()), s.plus_one(), s.add(1)),
        9,
        5,
    ),
    "chord with a plain body, then a task": (
        lambda s: chain(s.add(1, 1), chord([s.add(1), s.add(2)], s.plain_total()), s.plus_one(), s.add(1)),
        9,
        4,
    ),
    "two groups in turn": (
        lambda s: chain(s.add(1, 1), group(s.add(1), s.add(2)), s.total(), group(s.add(1), s.add(2)), s.total()),
        17,
        7,
    ),
    "two groups in turn, with nothing between": (
        lambda s: chain(s.add(1, 1), group(s.add(1), s.add(2)), group(s.total(), s.total())),
        [7, 7],
        5,
    ),
    "nested groups": (
        lambda s: chain(s.add(1, 1), group(group(s.add(1), s.add(2)), s.add(3)), s.total()),
        12,
        5,
    ),
    "nested groups at the end": (
        lambda s: chain(s.add(1, 1), group(group(s.add(1), s.add(1)), s.add(1))),
        [3, 3, 3],
        4,
    ),
    "chord within a chord": (
        lambda s: chain(s.add(1, 1), chord([chord([s.add(1), s.add(2)], s.total()), s.add(3)], s.total())),
        12,
        6,
    ),
    "chord within a chord, with plain bodies": (
        lambda s: chain(s.add(1, 1), chord([chord([s.add(1), s.add(2)], s.plain_total()), s.add(3)], s.plain_total())),
        12,
        4,
    ),
    "chord as the body of a chord": (
        lambda s: chain(s.add(1, 1), chord([s.add(1), s.add(2)], chord([s.total(), s.total()], s.total()))),
        14,
        6,
    ),
    "chains within a header": (
        lambda s: chain(
            s.add(1, 1), group(chain(s.add(1), s.add(1)), chain(s.plus_one(), s.add(1)), s.plus_one()), s.total()
        ),
        11,
        5,
    ),
    "group within a chain within a header": (
        lambda s: chain(s.add(1, 1), group(chain(s.add(1), group(s.add(1), s.add(2))), s.add(1)), s.total()),
        12,
        6,
    ),
    "chord whose body is a group": (
        lambda s: chain(s.add(1, 1), chord([s.add(1), s.add(2)], group(s.total(), s.total()))),
        [7, 7],
        5,
    ),
    "chord whose body is a chain": (
        lambda s: chain(s.add(1, 1), chord([s.add(1), s.add(2)], chain(s.plain_total(), s.add(1), s.add(1)))),
        9,
        5,
    ),
    "chord whose body is a chain with a group": (
        lambda s: chain(s.add(1, 1), chord([s.add(1), s.add(2)], chain(s.total(), group(s.add(1), s.plus_one())))),
        [8, 8],
        5,
    ),
    "group at the end": (lambda s: chain(s.add(1, 1), group(s.add(1), s.add(2), s.plus_one())), [3, 4, 3], 3),
    "group of chains at the end": (
        lambda s: chain(s.add(1, 1), group(chain(s.add(1), s.plus_one(), s.add(1)), chain(s.add(2), s.add(2)))),
        [5, 6],
        5,
    ),
    "group of one": (lambda s: chain(s.add(1, 1), group([s.add(1)]), s.add(1)), 4, 3),
}


@pytest.mark.parametrize("shape", parameters(ONE_SESSION, new=["two groups in turn, with nothing between"]))
def test_a_workflow_of_any_shape_has_one_session(project, s, shape):
    flow, result, calls = ONE_SESSION[shape]
    assert project.run(flow(s)) == result
    assert_sessions(project, calls)


#: Workflows whose first tasks run side by side: no session comes to them, so each opens its own.
SEVERAL_SESSIONS = {
    "group": (lambda s: group(s.add(1, 1), s.add(2, 2), s.plus_one(1)), [2, 4, 2], [1, 1]),
    "group of chains": (
        lambda s: group(chain(s.add(1, 1), s.plus_one(), s.add(1)), chain(s.add(2, 2), s.add(1), s.add(1))),
        [4, 6],
        [2, 3],
    ),
    "group, then a task": (lambda s: chain(group(s.add(1, 1), s.add(2, 2)), s.total()), 6, [1, 1, 1]),
    "chord": (lambda s: chord([s.add(1, 1), s.add(2, 2)], chain(s.total(), s.add(1))), 7, [1, 1, 2]),
    "chord whose body is a group": (
        lambda s: chord([s.add(1, 1), s.plus_one(2)], group(s.total(), s.total())),
        [5, 5],
        [1, 1, 1],
    ),
    "chord within a chord": (
        lambda s: chord([chord([s.plus_one(1), s.plus_one(1)], s.total()), s.add(1, 1)], s.total()),
        6,
        [1, 1, 1],
    ),
    "chain that starts with a plain task and a group": (
        lambda s: chain(s.plus_one(1), group(s.add(1), chain(s.plus_one(), group(s.add(1), s.add(1)))), s.total()),
        11,
        [1, 1, 1, 1],
    ),
}


@pytest.mark.parametrize("shape", SEVERAL_SESSIONS)
def test_branches_without_a_session_before_them_open_and_end_each_its_own(project, s, shape):
    flow, result, calls = SEVERAL_SESSIONS[shape]
    assert project.run(flow(s)) == result
    assert_sessions(project, calls)


# Servers


#: Name: the workflow, its result, and the calls of the sessions of two servers.
SERVERS = {
    "in turn": (lambda s: chain(s.add(1, 1), s.add_second(1), s.plus_one(), s.add(1), s.add_second(1)), 6, [2, 2]),
    "at once": (lambda s: chain(s.add_both(1, 1), s.add_both(1)), 5, [2, 2]),
    "one through steps of the other": (
        lambda s: chain(s.add(1, 1), s.add_second(1), s.add_second(1), s.plus_one(), s.add(1)),
        6,
        [2, 2],
    ),
    "in branches": (
        lambda s: chain(s.add_both(1, 1), group(s.add(1), s.add_second(1), s.add_second(1)), s.total()),
        12,
        [3, 3],
    ),
    "one in each branch": (
        lambda s: chain(s.plus_one(1), group(s.add(1), s.add_second(1)), s.plain_total()),
        6,
        [1, 1],
    ),
    "one opened before branches, one within": (
        lambda s: chain(s.add(1, 1), group(chain(s.add_second(1), s.add(1), s.add_second(1)), s.add(1)), s.total()),
        8,
        [2, 4],
    ),
}


@pytest.mark.parametrize("shape", SERVERS)
def test_sessions_of_several_servers_go_each_their_own_way(project, s, shape):
    flow, result, calls = SERVERS[shape]
    assert project.run(flow(s)) == result
    assert_sessions(project, calls)


def test_a_failure_ends_the_sessions_of_all_servers(project, s):
    with pytest.raises(ValueError, match="failure"):
        project.run(chain(s.add_both(1, 1), group(s.add_second(1), s.ends("failure")), s.add_both()))
    assert_sessions(project, [2, 2])


# Links


#: Name: the workflow, its result, and the number of calls.
LINKS = {
    "several links": (lambda s: linked(s.add(1, 1), s.add(1), s.add(2), s.plus_one()), 2, 3),
    "a chain as a link": (lambda s: linked(s.add(1, 1), chain(s.plus_one(), s.add(1), s.add(1))), 2, 3),
    "a group as a link": (lambda s: linked(s.add(1, 1), group(s.add(1), s.add(1)), s.add(1)), 2, 4),
    "a chord as a link": (lambda s: linked(s.add(1, 1), chord([s.add(1), s.add(2)], s.total())), 2, 4),
    "a link of a link": (lambda s: linked(s.add(1, 1), linked(s.add(1), linked(s.plus_one(), s.add(1)))), 2, 3),
    "links of the first step": (lambda s: chain(linked(s.add(1, 1), s.add(1), s.plus_one()), s.add(1)), 3, 3),
    "links of a plain step": (lambda s: chain(s.add(1, 1), linked(s.plus_one(), s.add(1)), s.add(1)), 4, 3),
    "a link of the last step": (lambda s: chain(s.add(1, 1), linked(s.add(1), s.add(1))), 3, 3),
    "a link of the workflow": (lambda s: linked(chain(s.add(1, 1), s.plus_one()), s.add(1)), 3, 2),
    "a link of a member": (
        lambda s: chain(s.add(1, 1), group(linked(s.add(1), s.add(1)), s.add(2)), s.total()),
        7,
        5,
    ),
    "a link of a chord": (
        lambda s: chain(s.add(1, 1), linked(chord([s.add(1), s.add(2)], s.total()), s.add(1))),
        7,
        5,
    ),
    "a link of a plain body": (
        lambda s: chain(s.add(1, 1), chord([s.add(1), s.add(2)], linked(s.plain_total(), s.add(1)))),
        7,
        4,
    ),
    "a link of a group": (lambda s: chain(s.add(1, 1), linked(group(s.add(1), s.add(1)), s.add(5, 5))), [3, 3], 4),
}


@pytest.mark.parametrize("shape", LINKS)
def test_a_link_continues_the_session(project, s, shape):
    flow, result, calls = LINKS[shape]
    assert project.run(flow(s)) == result
    project.recorder.wait_for(lambda _: project.recorder.methods().count(CALL) == calls)
    assert_sessions(project, calls)


# Tasks that make workflows


#: Name: what a task is replaced by, the result of the workflow, and the number of calls.
REPLACEMENTS = {
    "task": (lambda s: s.add(1, 1), 3, 3),
    "plain task": (lambda s: s.plus_one(1), 3, 2),
    "chain": (lambda s: chain(s.add(1, 1), s.plus_one(), s.add(1)), 5, 4),
    "group": (lambda s: group(s.add(1, 1), s.add(2, 2)), [2, 4], 3),
    "chain with a group at its end": (lambda s: chain(s.add(1, 1), group(s.add(1), s.add(2))), [3, 4], 4),
    "chord": (lambda s: chord([s.add(1, 1), s.add(2, 2)], s.total()), 7, 5),
    "chord with a plain body": (lambda s: chord([s.add(1, 1), s.plus_one(2)], s.plain_total()), 6, 3),
    "task that is replaced again": (lambda s: s.replaced_by(1, s.add(1, 1)), 3, 4),
}


@pytest.mark.parametrize("replacement", REPLACEMENTS)
def test_a_replacement_continues_the_session(project, s, replacement):
    by, result, calls = REPLACEMENTS[replacement]
    after = s.idle() if isinstance(result, list) else s.add(1)
    assert project.run(chain(s.replaced_by(1, by(s)), after)) == result
    assert_sessions(project, calls)


@pytest.mark.parametrize("replacement", ["task", "chain", "group", "chord"])
def test_a_member_of_a_header_may_be_replaced(project, s, replacement):
    by, _, calls = REPLACEMENTS[replacement]
    flow = chain(s.add(1, 1), group(s.replaced_by(by(s)), s.add(1)), s.total(), s.add(1))
    value = {"task": 2, "chain": 4, "group": 6, "chord": 6}[replacement]
    assert project.run(flow) == value + 3 + 1
    assert_sessions(project, calls - 1 + 4 if replacement != "group" else calls + 4)


def test_a_body_may_be_replaced(project, s):
    flow = chain(s.add(1, 1), group(s.add(1), s.add(1)), s.replaced_by(s.add(1, 1)), s.add(1))
    assert project.run(flow) == 3
    assert_sessions(project, 6)


@pytest.mark.parametrize("task", ["add", "plus_one"])
def test_a_task_that_is_added_to_a_chord_shares_the_session(project, s, task):
    added = s.add(10, 10) if task == "add" else s.plus_one(19)
    flow = chain(s.add(1, 1), group(s.adds_to_chord(added), s.add(1)), s.total())
    assert project.run(flow) == 25
    assert_sessions(project, 5 if task == "add" else 4)


def test_a_task_that_is_added_to_a_chord_shares_the_session_that_its_member_opened(project, s):
    flow = chord([s.adds_to_chord(2, s.add(10, 10)), s.add(1, 1)], s.total())
    assert project.run(flow) == 24
    assert_sessions(project, [1, 1, 2])


#: Name: a workflow with Celery's tasks that map, its result, and the calls of each session.
MAPS = {
    "map alone": (lambda s: s.tasks.total.map([[1, 1], [2, 2]]), [2, 4], 2),
    "starmap alone": (lambda s: s.tasks.add.starmap([(1, 1), (2, 2)]), [2, 4], 2),
    "chunks alone": (lambda s: s.tasks.add.chunks([(1, 1), (2, 2), (3, 3)], 2), [[2, 4], [6]], [1, 2]),
    "map between": (lambda s: chain(s.add(1, 1), still(s.tasks.total.map([[1, 1], [2, 2]])), s.total()), 6, 4),
    "starmap between": (lambda s: chain(s.add(1, 1), still(s.tasks.add.starmap([(1, 1), (2, 2)])), s.total()), 6, 4),
    "map first": (lambda s: chain(s.tasks.total.map([[1, 1], [2, 2]]), s.plain_total(), s.add(1)), 7, 3),
    "starmap last": (lambda s: chain(s.add(1, 1), still(s.tasks.add.starmap([(1, 1), (2, 2)]))), [2, 4], 3),
    "map of a plain task between": (lambda s: chain(s.add(1, 1), still(s.tasks.plus_one.map([1, 2])), s.total()), 5, 2),
    "chunks last": (
        lambda s: chain(
            s.add(1, 1), group(still(part) for part in s.tasks.add.chunks([(1, 1), (2, 2)], 1).group().tasks)
        ),
        [[2], [4]],
        3,
    ),
    "chunks between": (
        lambda s: chain(
            s.add(1, 1), group(still(part) for part in s.tasks.add.chunks([(1, 1), (2, 2)], 1).group().tasks), s.total()
        ),
        6,
        4,
    ),
    "map within a header": (
        lambda s: chain(s.add(1, 1), group(still(s.tasks.add.starmap([(1, 1), (2, 2)])), s.add(1)), s.total()),
        9,
        5,
    ),
    "map as a body": (lambda s: chain(s.add(1, 1), chord([s.add(1)], still(s.tasks.total.map([[1], [2]])))), [1, 2], 4),
}


@pytest.mark.parametrize("shape", MAPS)
def test_the_items_of_a_mapped_list_share_a_session(project, s, shape):
    flow, result, calls = MAPS[shape]
    assert project.run(flow(s)) == result
    assert_sessions(project, calls)


# Ways to start a workflow


def test_a_task_that_is_called_as_a_function_has_a_session_of_its_own(project, s):
    assert project.run(chain(s.add(1, 1), s.calls_another(), s.add(1))) == 4
    assert_sessions(project, [1, 3])


def test_a_task_that_is_called_as_a_function_by_a_plain_task_has_a_session_of_its_own(project, s):
    assert project.run(chain(s.add(1, 1), s.calls_plainly(), s.add(1))) == 4
    assert_sessions(project, [1, 2])


def test_steps_that_wait_for_their_time_share_the_session(project, s):
    late = group(s.add(1).set(countdown=1), s.add(2))
    result = chain(s.add(1, 1), s.add(1).set(countdown=1), late, s.total()).apply_async(countdown=0.5)
    assert result.get(timeout=60) == 9
    assert_sessions(project, 5)


def test_steps_of_different_priority_share_the_session(project, s):
    flow = chain(s.add(1, 1).set(priority=9), s.add(1).set(priority=0), group(s.add(1), s.add(1).set(priority=6)))
    assert flow.apply_async(priority=3).get(timeout=60) == [4, 4]
    assert_sessions(project, 4)


def run_bare(project, *arguments):
    """Send a workflow from a process that knows the broker and the names of tasks; return the result."""
    command = [sys.executable, HERE / "bare_publisher.py", project.app.conf.broker_url, *arguments]
    sent = subprocess.run(command, capture_output=True, text=True, check=False, timeout=30)
    assert sent.returncode == 0, sent.stderr
    return json.loads(sent.stdout)


@pytest.mark.parametrize(("workflow", "result", "calls"), [("task", 2, 1), ("branches", 6, 3)])
def test_a_process_without_the_tasks_sends_a_workflow_by_their_names(project, workflow, result, calls):
    assert run_bare(project, workflow) == result
    assert_sessions(project, calls)


def test_a_process_without_the_tasks_gives_a_handle(project):
    kept = project.run(project.tasks.keeps.s())
    rows = run_bare(project, "handle", kept)
    short_id = SessionHandle.load(kept).short_id
    assert [row if isinstance(row, str) else row["session"] for row in rows] == [short_id, "plain", short_id]
    assert_sessions(project, 3)
