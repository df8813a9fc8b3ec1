"""Errors reach the caller as what they are, and nothing happens behind the user's back."""

import pytest
from billiard.exceptions import SoftTimeLimitExceeded
from celery import chain
from test_chain import CALL, HANDSHAKE, calls_and_handshake, on

from mcp_celery import ConfigurationError, SessionHandle, SessionLostError, ToolError, TransportError
from mcp_celery.settings import ServerSettings
from mcp_celery.sync_session import new_session


def test_a_tool_that_fails_raises_tool_error_in_the_caller(project):
    with pytest.raises(ToolError, match="it failed") as caught:
        project.run(project.tasks.fails_in_tool.s())
    assert caught.value.tool == "fail"
    assert calls_and_handshake(project.sessions_closed()) == [*HANDSHAKE, CALL, "DELETE"]


@pytest.mark.parametrize(
    ("task", "text"),
    [("uses_stdio", "stdio"), ("uses_unknown", r"'unknown' is not in mcp_servers \(configured: .*peer")],
)
def test_a_configuration_mistake_is_raised_before_anything_is_sent(project, task, text):
    with pytest.raises(ConfigurationError, match=text):
        project.run(getattr(project.tasks, task).s())
    assert project.recorder.methods() == []


def test_an_unreachable_server_raises_transport_error(project):
    with pytest.raises(TransportError, match="'nowhere' could not be reached") as caught:
        project.run(project.tasks.unreachable.s())
    assert caught.value.sent is False


def test_an_unreachable_server_can_be_retried_for(project):
    assert project.run(project.tasks.reaches_in_the_end.s()) == ["here", 1]
    assert calls_and_handshake(project.sessions_closed()) == [*HANDSHAKE, CALL, "DELETE"]


def test_a_lost_session_raises_and_opens_no_other(project):
    t = project.tasks
    project.recorder.answer(rpc_method="tools/call", status=404, body=b"")
    with pytest.raises(SessionLostError, match=r"'peer' no longer knows session [0-9a-f]{8} \(HTTP 404\)") as caught:
        project.run(on(chain(t.add.s(1, 1), t.add.s(1)), "a", "b"))
    assert (caught.value.server, caught.value.status) == ("peer", 404)
    project.idle()
    assert calls_and_handshake(project.recorder.methods()) == [*HANDSHAKE, CALL]


def test_a_session_that_the_server_has_dropped_is_lost_for_the_next_step(project):
    t = project.tasks
    gone = SessionHandle(
        "peer",
        "0" * 32,
        {"protocolVersion": "2025-11-25", "capabilities": {}, "serverInfo": {"name": "x", "version": "1"}},
    )
    with pytest.raises(SessionLostError, match=gone.short_id):
        project.run(t.recall.s([], "x", mcp_session=gone))
    project.idle()
    assert project.recorder.methods() == [CALL]


def test_a_caught_loss_is_not_passed_on(project):
    t = project.tasks
    project.recorder.answer(rpc_method="tools/call", status=404, body=b"")
    rows = project.run(on(chain(t.loses.s([]), t.remember.s("x", "1")), "a", "b"))
    assert "no longer knows session" in rows[0]
    assert rows[1]["resumed"] is False
    names = calls_and_handshake(project.sessions_closed())
    assert names == [*HANDSHAKE, CALL, *HANDSHAKE, CALL, "DELETE"]


def test_a_close_that_fails_does_not_fail_the_task(project):
    project.recorder.answer(http_method="DELETE", status=500, body=b"")
    assert project.run(project.tasks.add.s(1, 1)) == 2
    assert calls_and_handshake(project.sessions_closed()) == [*HANDSHAKE, CALL, "DELETE"]
    project.idle()
    assert "left to the reaper" in str(project.logs())
    project.forget_stored()  # the reaper would try again in a minute


def test_a_soft_time_limit_while_the_session_is_being_closed_costs_no_result(project):
    project.recorder.stall(http_method="DELETE")
    assert project.run(project.tasks.takes_long_to_close.s()) == "done"
    assert "left to the reaper" in str(project.logs())
    project.forget_stored()  # the reaper would try again in a minute


def test_a_soft_time_limit_during_a_call_cancels_it_at_the_server_and_closes_the_session(project):
    with pytest.raises(SoftTimeLimitExceeded):
        project.tasks.slow.apply_async((100, 0.1), soft_time_limit=1).get(timeout=60)
    names = calls_and_handshake(project.sessions_closed())
    assert names == [*HANDSHAKE, CALL, "POST notifications/cancelled", "DELETE"]
    assert project.run(project.tasks.add.s(1, 1)) == 2


def test_a_task_that_is_revoked_and_terminated_closes_its_session(project):
    result = project.tasks.slow.delay(100, 0.1)
    project.recorder.wait_for(lambda exchange: exchange.name == CALL)
    result.revoke(terminate=True)
    names = calls_and_handshake(project.sessions_closed())
    assert names == [*HANDSHAKE, CALL, "POST notifications/cancelled", "DELETE"]


@pytest.mark.parametrize("status", [404, 405])
def test_a_server_that_does_not_let_sessions_be_ended_is_no_error(project, status):
    project.recorder.answer(http_method="DELETE", status=status, body=b"")
    assert project.run(project.tasks.add.s(1, 1)) == 2
    project.idle()
    assert project.deleted() == 1
    assert "left to the idle timeout" not in str(project.logs())


def test_progress_arrives_in_the_thread_and_execution_of_the_task(project):
    result = project.tasks.slow.delay(3, 0.01)
    assert [seen[:3] for seen in result.get(timeout=60)] == [[n, 3, f"step {n}"] for n in (1, 2, 3)]
    assert {seen[3] for seen in result.get()} == {result.id}


def test_a_call_whose_stream_breaks_is_continued_and_runs_once(project):
    before = executions(project)
    project.recorder.clear()
    project.recorder.cut(rpc_method="tools/call", after_events=2)
    seen = project.run(project.tasks.slow.s(4, 0.05))
    assert len(seen) >= 3
    names = calls_and_handshake(project.sessions_closed())
    assert names[:3] == [*HANDSHAKE, CALL]
    assert "GET" in names
    assert executions(project) == before + 1


def executions(project):
    """How many times the server has run `slow`."""
    session = new_session(ServerSettings(name="peer", url=project.recorder.url))
    try:
        return int(session.call_tool("executions").content[0].text)
    finally:
        session.close()
