"""Workflows with several branches: all share the session, and the last holder ends it, wherever it runs."""

import pytest
from celery import chain, chord, group
from kombu.exceptions import EncodeError
from processes import wait_until
from test_chain import CALL, HANDSHAKE, calls_and_handshake, on


def assert_one_session(project, calls):
    names = calls_and_handshake(project.sessions_closed())
    project.idle()
    assert names[:3] == [*HANDSHAKE, CALL]
    assert calls_and_handshake(project.recorder.methods()) == [*HANDSHAKE, *[CALL] * calls, "DELETE"]


def test_a_link_beside_a_next_step_shares_the_session(project):
    t = project.tasks
    first = t.remember.s([], "x", "1").set(queue="a", link=t.recall.s("x").set(queue="b"))
    rows = project.run(chain(first, t.recall.s("x").set(queue="a")))
    assert rows[1]["value"] == "1"
    project.recorder.wait_for(lambda _: project.recorder.methods().count(CALL) == 3)
    assert_one_session(project, 3)


def test_a_group_and_its_body_share_the_session(project):
    t = project.tasks
    members = group(t.recall.si([], "x").set(queue=queue) for queue in ("a", "b", "a"))
    flow = chain(t.remember.si([], "x", "1").set(queue="a"), members, t.gather.s().set(queue="b"))
    value, parts = project.run(flow)
    assert value == "1"
    assert len({part[0]["session"] for part in parts}) == 1
    assert_one_session(project, 5)


def test_branches_of_different_length_share_the_session(project):
    t = project.tasks
    short = t.recall.si([], "x").set(queue="a")
    long = on(chain(t.recall.si([], "x"), t.tag.s(), t.recall.s("x")), "b", "a", "b")
    project.run(chain(t.remember.si([], "x", "1").set(queue="a"), group(short, long), t.tag.s(), t.gather.s()))
    assert_one_session(project, 5)


def test_a_trailing_group_closes_the_session_after_its_last_member(project):
    t = project.tasks
    members = group(t.recall.si([], "x").set(queue=queue) for queue in ("a", "b"))
    result = chain(t.remember.si([], "x", "1").set(queue="a"), members).apply_async()
    result.get(timeout=60)
    assert_one_session(project, 3)


def test_a_chord_within_a_chain_shares_the_session_with_what_follows(project):
    t = project.tasks
    inner = chord([t.recall.si([], "x"), t.recall.si([], "x")], t.tag.s())
    value, _ = project.run(chain(t.remember.si([], "x", "1"), inner, t.gather.s()))
    assert value == "1"
    assert_one_session(project, 4)


def test_a_failed_member_does_not_close_the_session_under_the_others(project):
    t = project.tasks
    waits = chain(t.waits_for.si(1, "late"), t.add.s(1))
    on(waits, "b", "b")
    flow = chain(
        t.remember.si([], "x", "1").set(queue="a"),
        group(t.fails.si("member").set(queue="a"), waits),
        t.gather.s(),
    ).apply_async()
    with pytest.raises(ValueError, match="member"):
        flow.get(timeout=60)
    assert project.deleted() == 0
    session_id = project.recorder.session_ids[0]
    project.set_variable(session_id, "late", "1")
    names = project.sessions_closed()
    assert names.count("DELETE") == 1
    assert names[-1] == "DELETE"


def test_a_return_value_that_fits_into_no_message_ends_the_session_for_all_branches(project):
    t = project.tasks
    flow = chain(t.returns_no_json.s(), group(t.idle.s(), t.idle.s()), t.idle.s())
    with pytest.raises(EncodeError):
        flow.apply_async().get(timeout=60)
    assert_one_session(project, 1)


def test_members_that_open_sessions_of_their_own_close_each_its_own(project):
    t = project.tasks
    flow = chord(group(t.remember.si([], "x", str(n)) for n in range(3)), t.tag.s())
    rows = project.run(flow)
    assert len({row[0]["session"] for row in rows[:3]}) == 3
    names = project.sessions_closed(3)
    assert (names.count("POST initialize"), names.count("DELETE")) == (3, 3)


def test_what_the_store_keeps_has_a_time_to_live(project):
    t = project.tasks
    slow = group(t.slow.si(20, 0.1).set(queue=queue) for queue in ("a", "b"))
    result = chain(t.remember.si([], "x", "1").set(queue="a"), slow).apply_async()
    project.recorder.wait_for(lambda _: project.recorder.methods().count(CALL) >= 3)
    kept = wait_until(project.stored)
    assert all(0 < seconds <= 2 * 24 * 3600 for seconds in kept.values())
    assert not any(session_id in key for key in kept for session_id in project.recorder.session_ids)
    result.get(timeout=60)
    assert_one_session(project, 3)
