"""Workflows of tools on real workers: with and without tasks of one's own, on one server and on two."""

import os
import subprocess
import sys
from itertools import cycle
from pathlib import Path

import pytest
from celery import chain, chord, current_app, group
from processes import wait_until
from redis import Redis
from signatures import still
from test_chain import CALL, HANDSHAKE, calls_and_handshake

from mcp_celery import ConfigurationError, SessionHandle, ToolError, tool


@pytest.fixture(autouse=True)
def current(project):
    """The app of the project is the current one, as in a program that has no other."""
    before = current_app._get_current_object()
    project.app.set_current()
    yield
    before.set_current()


@pytest.fixture
def on_workers():
    """`on_workers(server, name, ...)` is `tool(...)` for the two workers in turn."""
    queues = cycle("ab")
    return lambda *args, **kwargs: tool(*args, **kwargs).set(queue=next(queues))


def run(project, *steps):
    """Run a chain."""
    return project.run(chain(*steps))


def test_tools_on_two_workers_share_a_session_and_the_last_one_ends_it(project, on_workers):
    steps = (
        on_workers("peer", "set_variable", name="x", value="1"),
        on_workers("peer", "get_variable", name="x"),
        on_workers("peer", "echo", text="x"),
    )
    assert run(project, *steps) == {"result": "x"}
    assert calls_and_handshake(project.sessions_closed()) == [*HANDSHAKE, CALL, CALL, CALL, "DELETE"]
    assert all("mcp_celery.tool" in log for log in project.logs().values())


def test_tools_and_tasks_of_ones_own_share_a_session(project, s, on_workers):
    sets = s.remember([], "x", "7"), on_workers("peer", "set_variable", name="y", value="8")
    rows = run(project, *sets, still(s.nothing()), still(s.idle([])), s.recall("x"), s.recall("y"))
    assert [row["value"] for row in rows] == ["7", "8"]
    assert project.sessions_closed().count("DELETE") == 1


def test_tools_of_two_servers_have_a_session_each(project, on_workers):
    steps = [
        on_workers(server, name, name="x", **more)
        for name, more in (("set_variable", {"value": "1"}), ("get_variable", {}))
        for server in ("peer", "second")
    ]
    assert run(project, *steps) == {"result": "1"}
    assert project.sessions_closed(2).count("POST initialize") == 2


def test_a_chord_of_tools_gives_its_results_to_a_body(project, s, on_workers):
    header = [on_workers("peer", "add", a=number, b=1) for number in range(3)]
    steps = chord(header, s.idle()), on_workers("peer", "echo", text="end")
    assert run(project, on_workers("peer", "set_variable", name="x", value="1"), *steps) == {"result": "end"}
    # The body is a task with the results, and as a tool it takes them into an argument: a list is no text.
    with pytest.raises(ToolError, match="string"):
        run(project, s.add(1, 1), chord(header, on_workers("peer", "echo", into="text")))
    assert project.sessions_closed(2).count("POST initialize") == 2


def test_members_of_a_group_share_the_session_of_the_step_before(project, on_workers):
    members = group(on_workers("peer", "get_variable", name="x") for _ in range(3))
    results = run(project, on_workers("peer", "set_variable", name="x", value="1"), members)
    assert results == [{"result": "1"}] * 3
    assert calls_and_handshake(project.sessions_closed()) == [*HANDSHAKE, CALL, CALL, CALL, CALL, "DELETE"]


def test_a_tool_as_an_errback_gets_the_session(project, s, on_workers):
    failing = s.fails().on_error(on_workers("peer", "echo", text="errback"))
    with pytest.raises(ValueError, match="2"):
        run(project, s.add(1, 1), failing)
    assert calls_and_handshake(project.sessions_closed()) == [*HANDSHAKE, CALL, CALL, CALL, "DELETE"]


def test_a_wrong_argument_is_an_error_for_the_caller_and_ends_the_session(project, on_workers):
    first, last = (on_workers("peer", "echo", text=text) for text in "xy")
    with pytest.raises(ConfigurationError, match=r"tool 'add' takes no argument bb and needs b\. Its arguments: a, b"):
        run(project, first, on_workers("peer", "add", a=1, bb=2), last)
    assert calls_and_handshake(project.sessions_closed()) == [*HANDSHAKE, CALL, "DELETE"]


def test_a_session_that_was_kept_is_continued_by_a_tool_and_then_ended(project, s, on_workers):
    handle = SessionHandle.load(project.run(s.keeps()))
    steps = on_workers("second", "echo", text="x"), on_workers("peer", "get_variable", name="kept", mcp_session=handle)
    assert run(project, *steps) == {"result": "yes"}
    assert project.sessions_closed(2).count("POST initialize") == 2


def test_results_and_logs_show_no_handle(project, on_workers):
    last = chain(on_workers("peer", "echo", text="x"), on_workers("peer", "echo", into="text")).apply_async()
    assert last.get(timeout=60) == {"result": "x"}
    project.sessions_closed()
    (session_id,) = project.recorder.session_ids
    assert last.kwargs == {"server": "peer", "tool": "echo", "arguments": {}, "into": "text"}
    assert session_id not in "".join(project.logs().values())


def test_a_project_without_a_task_of_its_own_has_workers_and_a_reaper(recorded_peer, valkey, start_worker):
    recorder = recorded_peer("python")
    env = {"BROKER": valkey, "PEER": recorder.url}
    start_worker("tools_only", "one", env=env)
    script = Path(__file__).parent / "tools_only.py"
    published = subprocess.run(
        [sys.executable, script], env={**os.environ, **env}, capture_output=True, text=True, timeout=60, check=False
    )
    assert published.stdout.strip() == "{'result': '1'}", published.stderr
    recorder.wait_for(lambda exchange: exchange.method == "DELETE" and exchange.ended is not None)
    assert calls_and_handshake(recorder.methods()) == [*HANDSHAKE, CALL, CALL, "DELETE"]
    with Redis.from_url(valkey, decode_responses=True) as client:
        wait_until(lambda: client.keys("{mcp_celery}:leader:*"), what="a reaper that leads")
