"""`mcp_celery.signals`: what is told of sessions and calls, in which thread, and what receivers cannot harm."""

import threading

import pytest
from celery import Celery
from celery.exceptions import SoftTimeLimitExceeded

from mcp_celery import MCPTask, SessionHandle, SessionLostError, ToolError, signals
from mcp_celery.testing import eager_sessions

ALL = ("session_opened", "session_resumed", "session_closed", "session_lost", "call_finished")


@pytest.fixture
def recorder(recorded_peer):
    return recorded_peer("python")


@pytest.fixture
def app(recorder):
    app = Celery("told", broker="memory://", backend="cache+memory://", set_as_current=False)
    app.conf.update(mcp_servers={"peer": {"url": recorder.url}}, task_always_eager=True)

    @app.task(base=MCPTask, bind=True, shared=False, mcp_server="peer", name="does")
    def does(self, act):
        return act(self.mcp)

    with eager_sessions(app):
        yield app
    app.close()


@pytest.fixture
def does(app):
    """`does(act)` runs `act(self.mcp)` in a task."""
    return lambda act, **options: app.tasks["does"].apply((act,), **options).get()


@pytest.fixture
def told():
    """What the receivers of all signals were told, as `[(name, sender, arguments)]`."""
    told = []

    def note(signal, sender, **arguments):
        told.append((signal.name, sender, {**arguments, "thread": threading.get_ident()}))

    for name in ALL:
        getattr(signals, name).connect(note)
    yield told
    for name in ALL:
        getattr(signals, name).disconnect(note)


def names(told):
    return [name for name, *_ in told]


def test_opening_a_call_and_closing_are_told_in_the_thread_of_the_task(app, does, told):
    def act(mcp):
        mcp.call_tool("echo", {"text": "x"})
        assert names(told) == ["session_opened", "call_finished"], "told between the calls"
        mcp.close()
        return mcp.requests_sent

    does(act, task_id="the task")
    assert names(told) == ["session_opened", "call_finished", "session_closed"]
    assert {sender for _, sender, _ in told} == {app.tasks["does"]}
    places = {(a["task_id"], a["server"], a["thread"]) for *_, a in told}
    assert places == {("the task", "peer", threading.get_ident())}
    hashes = {arguments["session"] for *_, arguments in told}
    assert [len(text) for text in hashes] == [8]
    _, call, end = (arguments for *_, arguments in told)
    assert 0 < call["seconds"] < 60
    assert (call["method"], call["tool"], call["error"], end["why"]) == ("tools/call", "echo", None, "task")


def test_the_next_task_resumes_and_the_end_of_the_workflow_is_told_once(app, told):
    with eager_sessions(app):
        for text in "ab":
            app.tasks["does"].apply((lambda mcp, text=text: mcp.call_tool("echo", {"text": text}) and None,)).get()
        assert names(told) == ["session_opened", "call_finished", "session_resumed", "call_finished"]
    assert names(told)[4:] == ["session_closed"]
    assert told[-1][2]["why"] == "workflow"
    assert len({arguments["session"] for *_, arguments in told}) == 1


def test_errors_go_by_the_names_of_their_classes(does, told):
    def act(mcp):
        with pytest.raises(ToolError):
            mcp.call_tool("fail")
        mcp.call_tool("fail", raise_on_error=False)
        mcp.read_resource("note://hello")
        mcp.list_tools()
        mcp.close()

    does(act)
    calls = [(a["method"], a["tool"], a["error"]) for name, _, a in told if name == "call_finished"]
    assert calls == [
        ("tools/call", "fail", "ToolError"),
        ("tools/call", "fail", "ToolError"),
        ("resources/read", None, None),
        ("tools/list", None, None),
    ]


def test_a_lost_session_is_told_once_by_the_task_that_finds_it(does, told):
    handle = SessionHandle("peer", "gone", {"protocolVersion": "2025-11-25", "capabilities": {}, "serverInfo": INFO})

    def act(mcp):
        for _ in range(2):
            with pytest.raises(SessionLostError):
                mcp.call_tool("echo", {"text": "x"})

    does(act, kwargs={"mcp_session": handle})
    assert names(told) == ["session_resumed", "session_lost", "call_finished", "call_finished"]
    assert {arguments["session"] for *_, arguments in told} == {handle.short_id}


INFO = {"name": "peer", "version": "1"}


def test_servers_without_sessions_have_calls_to_tell_of_and_nothing_else(recorded_peer, app, does, told):
    app.conf.mcp_servers = {"peer": {"url": recorded_peer("python", "--stateless").url}}
    does(lambda mcp: mcp.call_tool("echo", {"text": "x"}) and mcp.close())
    assert names(told) == ["call_finished"]
    assert told[0][2]["session"] is None


def test_a_server_that_cannot_be_reached_is_a_call_with_an_error(app, does, told):
    app.conf.mcp_servers = {"peer": {"url": "http://127.0.0.1:9/mcp"}}
    with pytest.raises(Exception, match="could not be reached"):
        does(lambda mcp: mcp.call_tool("echo", {"text": "x"}))
    assert [(name, arguments["error"]) for name, _, arguments in told] == [("call_finished", "TransportError")]


def test_what_a_receiver_raises_is_logged_and_harms_no_task(does, caplog):
    def breaks(**_):
        raise ValueError("a bad receiver")

    signals.call_finished.connect(breaks)
    try:
        assert does(lambda mcp: mcp.call_tool("echo", {"text": "x"}).content[0].text) == "x"
    finally:
        signals.call_finished.disconnect(breaks)
    assert "a bad receiver" in caplog.text


def test_a_soft_time_limit_within_a_receiver_ends_the_task_all_the_same(does):
    def is_interrupted(**_):
        raise SoftTimeLimitExceeded

    signals.session_opened.connect(is_interrupted)
    try:
        with pytest.raises(SoftTimeLimitExceeded):
            does(lambda mcp: mcp.call_tool("echo", {"text": "x"}))
    finally:
        signals.session_opened.disconnect(is_interrupted)


def test_a_receiver_may_use_the_session_of_its_task(does):
    seen = []

    def looks(sender, **_):
        seen.append(sender.mcp.call_tool("echo", {"text": "from within"}).content[0].text)

    signals.session_opened.connect(looks)
    try:
        does(lambda mcp: mcp.open())
    finally:
        signals.session_opened.disconnect(looks)
    assert seen == ["from within"]
