"""Handles given by hand, sessions detached and closed by hand, and what `session_id` says."""

import pytest
from celery import chain
from test_chain import CALL, HANDSHAKE, calls_and_handshake, on

from mcp_celery import ConfigurationError, SessionHandle, SessionHandleError


@pytest.fixture
def kept(project):
    """A session that a task has opened, detached, and given out."""
    handle = SessionHandle.load(project.run(project.tasks.keeps.s()))
    assert calls_and_handshake(project.recorder.methods()) == [*HANDSHAKE, CALL]
    project.recorder.clear()
    return handle


def test_a_detached_session_outlives_its_task_and_is_resumed_by_its_handle(project, kept):
    t = project.tasks
    rows = project.run(t.recall.s([], "kept", mcp_session=kept).set(queue="b"))
    assert (rows[0]["value"], rows[0]["resumed"], rows[0]["session"]) == ("yes", True, kept.short_id)
    assert calls_and_handshake(project.sessions_closed()) == [CALL, "DELETE"]


@pytest.mark.parametrize("form", [lambda handle: handle, SessionHandle.dumps, SessionHandle.to_json])
def test_a_handle_can_be_given_in_each_of_its_forms(project, kept, form):
    rows = project.run(project.tasks.recall.s([], "kept", mcp_session=form(kept)))
    assert rows[0]["value"] == "yes"


def test_a_handle_given_to_the_first_step_goes_on_to_the_later_ones(project, kept):
    t = project.tasks
    steps = chain(t.recall.s([], "kept", mcp_session=kept), t.tag.s(), t.recall.s("kept"))
    rows = project.run(on(steps, "a", "b", "a"))
    assert [row if isinstance(row, str) else row["session"] for row in rows] == [kept.short_id, "plain", kept.short_id]
    assert calls_and_handshake(project.sessions_closed()) == [CALL, CALL, "DELETE"]


def test_a_handle_given_to_a_later_step_takes_the_place_of_the_one_that_came(project, kept):
    t = project.tasks
    steps = chain(t.remember.s([], "x", "1"), t.recall.s("kept", mcp_session=kept))
    rows = project.run(on(steps, "a", "b"))
    assert rows[0]["session"] != rows[1]["session"] == kept.short_id
    names = calls_and_handshake(project.sessions_closed(2))
    assert names.count("DELETE") == 2


def test_a_function_that_asks_for_the_handle_gets_it(project, kept):
    t = project.tasks
    assert project.run(t.sees_handle.s(mcp_session=kept)) == kept.short_id
    assert project.run(t.sees_handle.s()) is None
    assert calls_and_handshake(project.sessions_closed()) == ["DELETE"]


def test_a_session_closed_by_hand_is_gone_and_not_closed_again(project):
    assert project.run(project.tasks.keeps_after_close.s()) == [True, None, None]
    assert calls_and_handshake(project.recorder.methods()) == [*HANDSHAKE, CALL, "DELETE"]


def test_a_task_that_never_uses_its_server_opens_no_session(project):
    assert project.run(project.tasks.idle.s(1)) == 1
    assert project.recorder.methods() == []


def test_a_handle_of_another_server_is_refused_by_the_publisher(project):
    handle = SessionHandle("other", "secret-id", {"protocolVersion": "2025-11-25"})
    with pytest.raises(SessionHandleError, match=r"'other'.*uses peer"):
        project.tasks.recall.s([], "x", mcp_session=handle).apply_async()
    assert project.recorder.methods() == []


def test_a_handle_of_another_server_is_refused_by_the_worker(project):
    handle = SessionHandle("other", "secret-id", {"protocolVersion": "2025-11-25"})
    result = project.app.send_task("project.recall", ([], "x"), {"mcp_session": handle})
    with pytest.raises(SessionHandleError, match="'other'"):
        result.get(timeout=60)
    assert project.recorder.methods() == []


@pytest.mark.parametrize("bad", ["no json", 5, {"v": 99}, {"v": 1, "sum": "00000000"}])
def test_a_bad_handle_is_refused_by_the_publisher_and_by_the_worker(project, bad):
    with pytest.raises(SessionHandleError):
        project.tasks.recall.s([], "x", mcp_session=bad).apply_async()
    with pytest.raises(SessionHandleError):
        project.app.send_task("project.recall", ([], "x"), {"mcp_session": bad}).get(timeout=60)
    assert project.recorder.methods() == []


def test_a_task_sent_by_name_takes_a_handle(project, kept):
    rows = project.app.send_task("project.recall", ([], "kept"), {"mcp_session": kept}).get(timeout=60)
    assert rows[0]["session"] == kept.short_id


def test_a_task_called_as_a_function_has_a_session_of_its_own(project):
    assert project.tasks.add(2, 3) == 5
    assert calls_and_handshake(project.recorder.methods()) == [*HANDSHAKE, CALL, "DELETE"]


def test_a_task_that_calls_itself_as_a_function_keeps_both_sessions_apart(project):
    t = project.tasks
    rows = project.run(on(chain(t.calls_itself.s([], 1), t.remember.s("x", "1")), "a", "b"))
    inner, outer, following = rows
    assert inner["session"] != outer["session"] == following["session"]
    names = project.sessions_closed(2)
    assert (names.count("POST initialize"), names.count("DELETE")) == (2, 2)


def test_arguments_are_still_checked_when_publishing(project, kept):
    with pytest.raises(TypeError, match="name"):
        project.tasks.recall.apply_async(([],), {"mcp_session": kept})
    with pytest.raises(TypeError, match="unknown"):
        project.tasks.recall.apply_async(([], "x"), {"mcp_session": kept, "unknown": 1})


def test_a_task_may_use_several_servers_and_each_session_goes_its_own_way(project):
    t = project.tasks
    steps = chain(t.remember.si([], "x", "ab"), t.copies.si("x"), t.tag.si([]), t.recalls_second.si(True, "x"))
    assert project.run(on(steps, "a", "b", "a", "b")) == [True, "abab"]
    names = calls_and_handshake(project.sessions_closed(2))
    assert sorted(names) == sorted([*HANDSHAKE * 2, *[CALL] * 4, "DELETE", "DELETE"])


def test_a_server_that_the_task_does_not_name_is_refused(project):
    with pytest.raises(ConfigurationError, match="names peer"):
        project.run(project.tasks.uses_unnamed.s())
