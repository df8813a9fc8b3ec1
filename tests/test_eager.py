"""Eager tasks and tasks called as functions: sessions of their own, or one that all of a block share."""

import pytest
from celery import Celery, chain, group

from mcp_celery import MCPTask, SessionHandle
from mcp_celery.eager import warn_of_eager
from mcp_celery.testing import eager_sessions

HANDSHAKE = ["POST initialize", "POST notifications/initialized"]


@pytest.fixture
def recorder(recorded_peer):
    return recorded_peer("python")


@pytest.fixture
def app(recorder):
    app = Celery("eager", broker="memory://", backend="cache+memory://", set_as_current=False)
    app.conf.update(mcp_servers={"peer": {"url": recorder.url}}, task_always_eager=True)

    @app.task(base=MCPTask, bind=True, shared=False, mcp_server="peer", name="remember")
    def remember(self, value):
        self.mcp.call_tool("set_variable", {"name": "x", "value": str(value)})

    @app.task(base=MCPTask, bind=True, shared=False, mcp_server="peer", name="recall")
    def recall(self, *_):
        return self.mcp.call_tool("get_variable", {"name": "x"}).content[0].text

    @app.task(
        base=MCPTask, bind=True, shared=False, mcp_server="peer", name="flaky", max_retries=2, default_retry_delay=0
    )
    def flaky(self):
        text = self.mcp.call_tool("get_variable", {"name": "x"}).content[0].text
        if not self.request.retries:
            raise self.retry(exc=RuntimeError("once"))
        return text

    @app.task(base=MCPTask, bind=True, shared=False, mcp_server="peer", name="keep")
    def keep(self):
        self.mcp.call_tool("set_variable", {"name": "x", "value": "kept"})
        return self.mcp.detach().dumps()

    @app.task(base=MCPTask, bind=True, shared=False, mcp_server="peer", name="fail")
    def fail(self):
        self.mcp.call_tool("echo", {"text": "x"})
        raise ValueError("no")

    yield app
    app.close()


def essence(recorder):
    """The names of the requests, without listings, and how many sessions there were."""
    names = [name for name in recorder.methods() if name != "POST tools/list"]
    return names.count("POST initialize"), names.count("POST tools/call"), names.count("DELETE")


def test_a_chain_shares_one_session_within_the_block_and_ends_it_with_the_block(app, recorder):
    t = app.tasks
    with eager_sessions(app):
        assert chain(t["remember"].si(1), t["recall"].s())().get() == "1"
        assert chain(t["recall"].s(), t["flaky"].si()).apply().get() == "1"
        assert group(t["recall"].s(), t["recall"].s())().get() == ["1", "1"]
        assert t["recall"]() == "1"
        assert essence(recorder) == (1, 8, 0)
    assert essence(recorder) == (1, 8, 1)


def test_of_several_servers_of_a_task_those_are_opened_that_it_uses(app, recorder, recorded_peer):
    second = recorded_peer("python")
    app.conf.mcp_servers = {"peer": {"url": recorder.url}, "second": {"url": second.url}}

    @app.task(base=MCPTask, bind=True, shared=False, mcp_servers=("peer", "second"), name="uses_second")
    def uses_second(self):
        return self.mcp["second"].call_tool("echo", {"text": "x"}).content[0].text

    with eager_sessions(app):
        assert uses_second() == "x"
    assert (recorder.methods(), essence(second)) == ([], (1, 1, 1))


def test_a_link_shares_the_session_too(app, recorder):
    t = app.tasks
    with eager_sessions(app):
        t["remember"].apply_async((1,), link=t["recall"].s())
    assert essence(recorder) == (1, 2, 1)


def test_a_failed_task_leaves_the_session_to_the_block(app, recorder):
    t = app.tasks
    with eager_sessions(app):
        t["remember"](2)
        with pytest.raises(ValueError, match="no"):
            t["fail"].apply().get()
        assert t["recall"].apply().get() == "2"
    assert essence(recorder) == (1, 3, 1)


def test_a_detached_session_is_the_users_and_the_next_task_opens_another(app, recorder):
    t = app.tasks
    with eager_sessions(app):
        handle = SessionHandle.load(t["keep"].apply().get())
        t["remember"](1)
    assert essence(recorder) == (2, 2, 1)
    with eager_sessions(app):
        assert t["recall"].apply(kwargs={"mcp_session": handle}).get() == "kept"
        assert essence(recorder) == (2, 3, 2)
        t["remember"](1)
    assert essence(recorder) == (3, 4, 3)


def test_outside_of_the_block_each_task_has_a_session_of_its_own_and_says_so_once(app, recorder, caplog):
    warn_of_eager.cache_clear()
    t = app.tasks
    t["remember"].apply((1,))
    with pytest.raises(Exception, match="x"):
        t["recall"].apply().get()
    assert essence(recorder) == (2, 2, 2)
    assert caplog.text.count("eager_sessions") == 1
