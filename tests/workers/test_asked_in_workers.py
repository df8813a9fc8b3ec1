"""On real workers: what servers ask, log and report while a task calls them, and who listens between the calls."""

import pytest
from celery import chain, group
from conftest import Project, start_project
from peers.recorder import Recorder
from processes import wait_until
from test_chain import on
from test_secrets import Events


@pytest.fixture
def stateless_project(start_peer, valkey_server, tmp_path):
    """Two workers on a server of the protocol 2026-07-28."""
    with Recorder(start_peer("python", "--modern-only").url) as recorder:
        module, workers = start_project(recorder.url, f"{valkey_server.connection_url}/13", tmp_path)
        project = Project(module, workers, recorder)
        yield project
        project.close()


def test_progress_is_the_state_of_the_task_until_it_ends(project):
    result = project.tasks.reports.delay(30, 0.05)
    wait_until(lambda: result.state == "PROGRESS", what="progress")
    info = result.info
    assert (info["tool"], info["total"], info["message"]) == ("slow", 30, f"step {info['progress']:g}")
    assert result.get(timeout=60) == "done"
    assert result.state == "SUCCESS"
    project.sessions_closed()


def kind_of(event):
    return event["type"], event.get("uuid")


def test_monitors_are_told_of_progress_where_events_are_on_and_of_the_end_after_it(project):
    app, seen = project.app, []
    with Events(app) as events:
        assert project.tasks.reports_unmonitored.delay(2, 0.05).get(timeout=60) == "done"
        told = project.tasks.reports.delay(30, 0.05)
        assert told.get(timeout=60) == "done"
        wait_until(lambda: ("task-succeeded", told.id) in map(kind_of, events.seen.copy()), what="the last event")
    state = app.events.State()
    for event in events.seen:
        state.event(event)
        if event.get("uuid") == told.id:
            seen.append((state.tasks[told.id].state, state.tasks[told.id].result))
    progress = [event for event in events.seen if event["type"] == "task-progress"]
    assert {event["uuid"] for event in progress} == {told.id}
    first = progress[0]["progress"]
    assert progress[0].items() >= {"total": 30, "message": f"step {first:g}", "tool": "slow"}.items()
    assert ("PROGRESS", f"{first:g}/30 step {first:g}") in seen
    assert seen[-1] == ("SUCCESS", "'done'")
    project.sessions_closed(2)


def test_where_results_are_ignored_the_server_is_not_asked_for_progress(project):
    project.tasks.reports.apply_async((2, 0.05), ignore_result=True)
    project.sessions_closed()
    call = next(exchange for exchange in project.recorder.exchanges if exchange.rpc_method == "tools/call")
    assert "progressToken" not in (call.rpc_params.get("_meta") or {})


def test_each_step_is_asked_for_itself_in_the_session_of_the_chain(project):
    t = project.tasks
    steps = chain(t.is_asked.s([]), t.says.s("mind the gap"), t.is_asked.s())
    result = on(steps, "a", "b", "b").apply_async()
    assert result.get(timeout=60) == [
        f"accept: {result.parent.parent.id} to why",
        "decline",
        f"accept: {result.id} to why",
    ]
    project.sessions_closed()
    assert project.recorder.methods().count("POST initialize") == 1
    log = project.logs()["b"]
    assert f"project.says[{result.parent.id}]: peer say: mind the gap" in log


def test_of_the_holders_of_a_session_one_listens_and_the_others_do_without(project):
    t = project.tasks
    # Not at the same moment: this server answers 200 to both of two GETs that come together.
    branches = group(t.listens.s(30, 0.1).set(queue="a"), t.listens.s(20, 0.1).set(queue="b", countdown=1))
    result = chain(t.listens.s([], 1, 0.1).set(queue="a"), branches).apply_async()
    assert result.get(timeout=60) == [["done", "done"]] * 2
    project.sessions_closed()
    streams = [exchange for exchange in project.recorder.exchanges if exchange.method == "GET"]
    assert [exchange.status for exchange in streams].count(200) >= 2
    assert {exchange.status for exchange in streams} == {200, 409}
    assert project.recorder.methods().count("POST initialize") == 1


def test_a_call_that_needs_input_is_continued_by_a_process_that_was_not_asked(stateless_project):
    project = stateless_project
    t = project.tasks
    rows = project.run(on(chain(t.is_to_confirm.s("x"), t.confirms.s("yes")), "a", "b"), 30)
    assert [row["worker"].split("@")[0] for row in rows] == ["a", "b"]
    assert len({row["pid"] for row in rows}) == 2
    assert rows[1]["text"] == "x: accept yes"
    calls = [exchange for exchange in project.recorder.exchanges if exchange.rpc_method == "tools/call"]
    assert [exchange.rpc_params.get("requestState") for exchange in calls] == [None, rows[0]["state"]]
    assert project.recorder.methods().count("POST server/discover") == 1
