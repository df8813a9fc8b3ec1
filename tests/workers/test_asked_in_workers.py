"""On real workers: what servers ask, log and report while a task calls them, and who listens between the calls."""

from celery import chain, group
from processes import wait_until
from test_chain import on


def test_progress_is_the_state_of_the_task_until_it_ends(project):
    result = project.tasks.reports.delay(30, 0.05)
    wait_until(lambda: result.state == "PROGRESS", 10, "progress")
    info = result.info
    assert (info["tool"], info["total"], info["message"]) == ("slow", 30, f"step {info['progress']:g}")
    assert result.get(timeout=15) == "done"
    assert result.state == "SUCCESS"
    project.sessions_closed()


def test_where_results_are_ignored_the_server_is_not_asked_for_progress(project):
    project.tasks.reports.apply_async((2, 0.05), ignore_result=True)
    project.sessions_closed()
    call = next(exchange for exchange in project.recorder.exchanges if exchange.rpc_method == "tools/call")
    assert "progressToken" not in (call.rpc_params.get("_meta") or {})


def test_each_step_is_asked_for_itself_in_the_session_of_the_chain(project):
    t = project.tasks
    steps = chain(t.is_asked.s([]), t.says.s("mind the gap"), t.is_asked.s())
    result = on(steps, "a", "b", "b").apply_async()
    assert result.get(timeout=15) == [
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

    branches = group(t.listens.s(8, 0.1).set(queue=queue) for queue in "ab")
    result = chain(t.listens.s([], 1, 0.1).set(queue="a"), branches).apply_async()
    assert result.get(timeout=15) == [["done", "done"]] * 2
    project.sessions_closed()
    streams = [exchange for exchange in project.recorder.exchanges if exchange.method == "GET"]
    assert [exchange.status for exchange in streams].count(200) >= 2
    assert {exchange.status for exchange in streams} <= {200, 409}
    assert project.recorder.methods().count("POST initialize") == 1
