"""Agents of openai-agents in tasks of one workflow, on two workers: the session goes on, and the conversation too."""

import json

import pytest
from celery import chain
from celery.exceptions import SoftTimeLimitExceeded

from mcp_celery import SessionLostError

REMEMBER = [["set_variable", {"name": "x", "value": "41"}]]
RECALL = [["get_variable", {"name": "x"}]]


def test_an_agent_continues_the_session_and_the_conversation_of_another_on_another_worker(project):
    t = project.tasks
    steps = chain(
        t.converse.s([], "remember 41", [REMEMBER, "I will."]).set(queue="a"),
        t.converse.s("what was it?", [RECALL, "It was {}."]).set(queue="b"),
        t.converse_async.s("and now?", [RECALL, "It is {}."]).set(queue="a"),
        t.add.si(1, 2).set(queue="b"),
    )
    conversation = steps.apply_async()
    assert conversation.get(timeout=30) == 3
    told = conversation.parent.get()
    assert [item["content"] for item in told if item.get("role") == "user"] == [
        "remember 41",
        "what was it?",
        "and now?",
    ]
    assert [item["content"][0]["text"] for item in told if item.get("role") == "assistant"] == [
        "I will.",
        "It was 41.",
        "It is 41.",
    ]

    names = project.sessions_closed()
    assert (names.count("POST initialize"), names.count("POST tools/call"), names.count("DELETE")) == (1, 4, 1)
    (session_id,) = project.recorder.session_ids
    assert {exchange.session_id for exchange in project.recorder.exchanges[1:]} == {session_id}


def test_a_soft_time_limit_ends_an_awaited_agent_and_the_call_also_at_the_server(project):
    t = project.tasks
    project.run(t.converse.s([], "hello", ["Hello."]).set(queue="a"), timeout=30)  # loads what agents take
    project.begin()
    calls = [["slow", {"steps": 100, "seconds": 0.1}]]
    step = t.converse_async.s([], "take long", [calls, "done"]).set(queue="a", soft_time_limit=1.5)
    with pytest.raises(SoftTimeLimitExceeded):
        project.run(step)
    names = project.sessions_closed()
    assert names.index("POST tools/call") < names.index("POST notifications/cancelled") < names.index("DELETE")


def test_an_agent_whose_session_is_lost_fails_its_task_and_tells_nobody_its_id(project):
    t = project.tasks
    project.recorder.answer(rpc_method="tools/call", status=404)
    with pytest.raises(SessionLostError, match="no longer knows session"):
        project.run(t.converse.s([], "remember 41", [REMEMBER, "I will."]), timeout=30)
    (session_id,) = project.recorder.session_ids
    assert session_id not in json.dumps(project.logs())
