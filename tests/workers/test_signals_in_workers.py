"""`mcp_celery.signals` in real workers: each process of a pool tells what its own tasks do."""

import json
import re

import pytest
from celery import chain
from processes import wait_until


def told_by(project):
    """The signals that the workers have logged, those of each worker in order."""
    return [
        json.loads(text)
        for log in project.logs().values()
        for text in re.findall(r"signal (\{.*\})$", log, re.MULTILINE)
    ]


def of_sessions(project):
    return sorted(
        (told["task"].removeprefix("project."), told["worker"][0], told["signal"], told.get("why"))
        for told in told_by(project)
        if told["signal"] != "call_finished"
    )


def test_one_task_opens_the_next_one_resumes_and_the_last_one_closes(project):
    t = project.tasks
    steps = chain(t.remember.s([], "x", "1").set(queue="a"), t.recall.s("x").set(queue="b"))
    result = steps.apply_async()
    result.get(timeout=60)
    project.sessions_closed()
    wait_until(lambda: len(of_sessions(project)) == 3, what="the end to be logged")
    assert of_sessions(project) == [
        ("recall", "b", "session_closed", "workflow"),
        ("recall", "b", "session_resumed", None),
        ("remember", "a", "session_opened", None),
    ]
    told = told_by(project)
    assert [(call["tool"], call["error"]) for call in told if call["signal"] == "call_finished"] == [
        ("set_variable", None),
        ("get_variable", None),
    ]
    assert {call["task_id"] for call in told} == {result.id, result.parent.id}
    assert len({call["session"] for call in told}) == 1


def test_the_end_of_a_failed_workflow_is_told_by_the_task_that_failed(project):
    t = project.tasks
    with pytest.raises(ValueError, match="no"):
        project.run(chain(t.add.s(1, 1).set(queue="a"), t.fails.si("no").set(queue="a"), t.add.s(1)))
    project.sessions_closed()
    wait_until(lambda: len(of_sessions(project)) == 3, what="the end to be logged")
    assert ("fails", "a", "session_closed", "workflow") in of_sessions(project)


def test_a_loss_is_told_by_the_task_that_finds_it(project):
    t = project.tasks
    project.recorder.answer(status=404, rpc_method="tools/call")
    project.run(t.loses.s([]).set(queue="a"))
    wait_until(lambda: len(of_sessions(project)) == 2, what="the loss to be logged")
    assert of_sessions(project) == [("loses", "a", "session_lost", None), ("loses", "a", "session_opened", None)]
