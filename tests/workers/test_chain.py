"""A chain of MCP tasks, on two real workers, against a recorded server: one session, closed once."""

from collections import Counter

import pytest
from celery import chain
from kombu.exceptions import EncodeError

HANDSHAKE = ["POST initialize", "POST notifications/initialized"]
CALL = "POST tools/call"


def on(signature, *queues):
    """Route the steps of a chain, in turn."""
    for step, queue in zip(signature.tasks, queues, strict=True):
        step.set(queue=queue)
    return signature


def calls_and_handshake(names):
    """The requests without the listings of tools, of which each process makes one."""
    return [name for name in names if name != "POST tools/list"]


def test_consecutive_steps_on_different_workers_share_one_session(project):
    t = project.tasks
    steps = chain(
        t.remember.s([], "x", "41"), t.recall.s("x"), t.remember.s("y", "1"), t.recall.s("y"), t.recall.s("x")
    )
    rows = project.run(on(steps, "a", "b", "a", "b", "a"))

    assert [row["worker"].split("@")[0] for row in rows] == ["a", "b", "a", "b", "a"]
    assert len({row["pid"] for row in rows}) == 2
    assert len({row["session"] for row in rows}) == 1
    assert [row["resumed"] for row in rows] == [False, True, True, True, True]
    assert [row["value"] for row in rows if "value" in row] == ["41", "1", "41"]

    names = project.sessions_closed()
    assert calls_and_handshake(names) == [*HANDSHAKE, *[CALL] * 5, "DELETE"]
    assert len(project.recorder.session_ids) == 1


def test_a_resumed_step_with_one_call_sends_one_request(project):
    t = project.tasks
    steps = chain(t.remember.s([], "x", "1"), *[t.recall.s("x") for _ in range(5)])
    rows = project.run(on(steps, "a", "b", "a", "b", "a", "b"))

    assert max(row["requests"] for row in rows[1:3]) <= 2
    assert [row["requests"] for row in rows[3:]] == [1, 1, 1]


def test_a_workflow_sends_the_session_header_with_every_request_but_the_first(project):
    t = project.tasks
    project.run(on(chain(t.remember.s([], "x", "1"), t.recall.s("x")), "a", "b"))
    project.sessions_closed()

    (session_id,) = project.recorder.session_ids
    assert [exchange.session_id for exchange in project.recorder.exchanges][1:] == [session_id] * (
        len(project.recorder.exchanges) - 1
    )
    assert "mcp-session-id" not in project.recorder.exchanges[0].headers


def test_a_step_that_does_not_call_passes_the_session_on_without_a_request(project):
    t = project.tasks
    result = project.run(on(chain(t.add.s(1, 2), t.idle.s(), t.add.s(10), t.idle.s()), "a", "b", "a", "b"))

    assert result == 13
    assert calls_and_handshake(project.sessions_closed()) == [*HANDSHAKE, CALL, CALL, "DELETE"]


def test_immutable_steps_share_the_session(project):
    t = project.tasks
    steps = chain(t.remember.si([], "x", "1"), t.recall.si([], "x"), t.recall.si([], "x"))
    rows = project.run(on(steps, "a", "b", "a"))

    assert [row["value"] for row in rows] == ["1"]
    assert calls_and_handshake(project.sessions_closed()) == [*HANDSHAKE, *[CALL] * 3, "DELETE"]


def test_plain_tasks_between_see_and_change_the_value_only(project):
    t = project.tasks
    steps = chain(t.add.s(1, 1), t.plus_one.s(), t.plus_one.s(), t.add.s(10), t.plus_one.s())
    assert project.run(on(steps, "a", "b", "a", "b", "a")) == 15
    assert calls_and_handshake(project.sessions_closed()) == [*HANDSHAKE, CALL, CALL, "DELETE"]


def test_pydantic_tasks_share_the_session_and_keep_their_models(project):
    t = project.tasks
    steps = chain(t.shift.s({"x": 1, "y": 5}, 2), t.shift.s(3))
    assert project.run(on(steps, "a", "b")) == {"x": 6, "y": 5}
    assert calls_and_handshake(project.sessions_closed()) == [*HANDSHAKE, CALL, CALL, "DELETE"]


def test_a_class_based_task_takes_part(project):
    t = project.tasks
    result = project.run(on(chain(t.remember.si([], "x", "7"), t.Recall.si([], "x")), "a", "b"))
    assert result == ["7"]
    assert calls_and_handshake(project.sessions_closed()) == [*HANDSHAKE, CALL, CALL, "DELETE"]


def test_a_server_given_by_its_url_shares_sessions_as_well(project):
    t = project.tasks
    assert project.run(on(chain(t.by_url.s("one"), t.by_url.s()), "a", "b")) == "one"
    assert calls_and_handshake(project.sessions_closed()) == [*HANDSHAKE, CALL, CALL, "DELETE"]


def test_a_chain_within_a_chain_shares_the_session(project):
    t = project.tasks
    inner = chain(t.plus_one.s(), t.add.s(1))
    steps = chain(t.add.s(1, 1), inner, chain(t.add.s(1)), t.plus_one.s())
    for step in steps.tasks:
        step.set(queue="a")
    assert project.run(steps) == 6
    assert calls_and_handshake(project.sessions_closed()) == [*HANDSHAKE, *[CALL] * 3, "DELETE"]


@pytest.mark.parametrize("failures", [1, 3])
def test_a_retried_task_resumes_the_session_its_first_attempt_opened(project, failures):
    t = project.tasks
    assert project.run(on(chain(t.flaky.s(5, failures), t.add.s(1)), "a", "b")) == 6
    names = project.sessions_closed()
    assert calls_and_handshake(names) == [*HANDSHAKE, *[CALL] * (failures + 2), "DELETE"]


def test_autoretry_resumes_the_session(project):
    t = project.tasks
    assert project.run(on(chain(t.add.s(1, 1), t.auto_flaky.s(2), t.add.s(1)), "a", "b", "a")) == 3
    assert calls_and_handshake(project.sessions_closed()) == [*HANDSHAKE, *[CALL] * 5, "DELETE"]


def test_exhausted_retries_close_the_session(project):
    t = project.tasks
    with pytest.raises(RuntimeError, match="not yet"):
        project.run(on(chain(t.add.s(1, 1), t.flaky.s(99)), "a", "b"))
    assert calls_and_handshake(project.sessions_closed()) == [*HANDSHAKE, *[CALL] * 5, "DELETE"]


def test_exhausted_automatic_retries_close_the_session(project):
    t = project.tasks
    with pytest.raises(RuntimeError, match="not yet"):
        project.run(on(chain(t.auto_flaky.s(1, 99), t.add.s(1)), "a", "b"))
    assert calls_and_handshake(project.sessions_closed()) == [*HANDSHAKE, *[CALL] * 3, "DELETE"]


def test_a_failed_step_closes_the_session_and_the_rest_does_not_run(project):
    t = project.tasks
    with pytest.raises(ValueError, match="2"):
        project.run(on(chain(t.add.s(1, 1), t.fails.s(), t.add.s(1)), "a", "b", "a"))
    assert calls_and_handshake(project.sessions_closed()) == [*HANDSHAKE, CALL, CALL, "DELETE"]


def test_a_return_value_that_fits_into_no_message_closes_the_session(project):
    t = project.tasks
    with pytest.raises(EncodeError):
        project.run(on(chain(t.returns_no_json.s(), t.idle.s()), "a", "b"))
    assert calls_and_handshake(project.sessions_closed()) == [*HANDSHAKE, CALL, "DELETE"]


def test_a_replacement_task_continues_the_session(project):
    t = project.tasks
    assert project.run(on(chain(t.replaced_by_task.s(1), t.add.s(1)), "a", "b")) == 12
    assert calls_and_handshake(project.sessions_closed()) == [*HANDSHAKE, *[CALL] * 3, "DELETE"]


def test_a_replacement_at_the_end_gives_the_result_of_the_task_it_replaced(project):
    t = project.tasks
    assert project.run(t.replaced_by_task.s(1)) == 11
    assert project.run(t.replaced_by_chain.s(1)) == 112
    assert project.run(chain(t.add.s(1, 1), t.replaced_by_chain.s())) == 113
    names = calls_and_handshake(project.sessions_closed(3))
    assert (names.count("POST initialize"), names.count("DELETE")) == (3, 3)


def test_a_replacement_chain_continues_the_session(project):
    t = project.tasks
    assert project.run(on(chain(t.replaced_by_chain.s(1), t.add.s(1)), "a", "b")) == 113
    assert calls_and_handshake(project.sessions_closed()) == [*HANDSHAKE, *[CALL] * 4, "DELETE"]


def test_a_plain_replacement_is_looked_past(project):
    t = project.tasks
    assert project.run(on(chain(t.replaced_by_plain.s(1), t.add.s(1)), "a", "b")) == 3
    assert calls_and_handshake(project.sessions_closed()) == [*HANDSHAKE, CALL, CALL, "DELETE"]


def test_a_plain_replacement_at_the_end_closes_the_session(project):
    t = project.tasks
    assert project.run(t.replaced_by_plain.s(1)) == 2
    assert calls_and_handshake(project.sessions_closed()) == [*HANDSHAKE, CALL, "DELETE"]


def test_a_linked_task_continues_the_session(project):
    t = project.tasks
    linked = t.add.s(100).set(queue="b")
    result = t.add.apply_async((1, 1), queue="a", link=linked)
    assert result.get(timeout=60) == 2
    assert calls_and_handshake(project.sessions_closed()) == [*HANDSHAKE, CALL, CALL, "DELETE"]


def test_ignore_ends_the_session(project):
    project.tasks.ignores.delay()
    assert calls_and_handshake(project.sessions_closed()) == [*HANDSHAKE, CALL, "DELETE"]


def test_a_requeued_step_resumes_the_session_that_came_with_it(project):
    t = project.tasks
    rows = project.run(on(chain(t.remember.s([], "x", "1"), t.rejects_once.s()), "a", "b"))
    assert len({row["session"] for row in rows}) == 1
    assert calls_and_handshake(project.sessions_closed()) == [*HANDSHAKE, *[CALL] * 3, "DELETE"]


def test_workflows_side_by_side_have_sessions_of_their_own(project):
    t = project.tasks
    flows = [
        on(chain(t.remember.s([], "x", str(n)), t.recall.s("x"), t.recall.s("x")), "a", "b", "a").apply_async()
        for n in range(8)
    ]
    for number, flow in enumerate(flows):
        rows = flow.get(timeout=60)
        assert [row["value"] for row in rows[1:]] == [str(number)] * 2
    counts = Counter(project.sessions_closed(8))
    assert (counts["POST initialize"], counts["DELETE"], counts["GET"]) == (8, 8, 0)
    assert len(project.recorder.session_ids) == 8


def test_a_plain_task_that_fails_closes_the_session_that_was_carried_past_it(project):
    t = project.tasks
    with pytest.raises(ValueError, match="plain 2"):
        project.run(on(chain(t.add.s(1, 1), t.breaks.s(), t.plus_one.s(), t.add.s(1)), "a", "b", "a", "b"))
    assert calls_and_handshake(project.sessions_closed()) == [*HANDSHAKE, CALL, "DELETE"]
