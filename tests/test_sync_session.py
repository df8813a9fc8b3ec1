"""The synchronous face of a session: calls from plain functions, interruptible, with callbacks in their thread."""

import os
import signal
import threading
from concurrent.futures import ThreadPoolExecutor

import anyio
import pytest
from calls import is_call, is_cancellation, text_of
from celery.exceptions import SoftTimeLimitExceeded
from mcp_types import PromptReference

from mcp_celery.exceptions import SessionError, SessionLostError, ToolError, TransportError
from mcp_celery.portal import close_portal
from mcp_celery.settings import ServerSettings
from mcp_celery.sync_session import new_session


@pytest.fixture
def session_of():
    """`session_of(url, handle=None)` returns an `MCPSession` on this process's event loop, which ends with the test."""
    yield lambda url, handle=None: new_session(ServerSettings(name="server", url=url), handle)
    close_portal()


def test_a_session_is_opened_used_and_closed_without_an_await(recorded_peer, session_of):
    recorder = recorded_peer("python")
    session = session_of(recorder.url)
    assert (session.is_open, session.session_id, session.handle, session.requests_sent) == (False, None, None, 0)
    assert text_of(session.call_tool("set_variable", {"name": "colour", "value": "red"})) == "set"
    assert session.is_open
    assert [session.session_id] == recorder.session_ids
    assert (session.server, session.protocol_version, session.server_info.name) == ("server", "2025-11-25", "python")
    assert session.server_capabilities.tools is not None
    handle = session.detach()
    again = session_of(recorder.url, handle)
    assert again.resumed
    assert text_of(again.call_tool("get_variable", {"name": "colour"})) == "red"
    again.close()
    assert recorder.methods()[-1] == "DELETE"
    assert recorder.methods().count("POST initialize") == 1
    with pytest.raises(SessionError):
        again.list_tools()
    again.open()
    assert again.session_id not in {None, handle.session_id}
    again.release()


def test_every_method_works(recorded_peer, session_of):
    session = session_of(recorded_peer("typescript").url)
    assert "echo" in {tool.name for tool in session.list_tools().tools}
    assert session.call_tool("add", {"a": 2, "b": 3}).structured_content == {"result": 5}
    assert [str(resource.uri) for resource in session.list_resources().resources] == ["note://hello"]
    assert len(session.list_resource_templates().resource_templates) == 1
    assert session.read_resource("note://people/Ada").contents[0].text == "a note on Ada"
    assert [prompt.name for prompt in session.list_prompts().prompts] == ["greet"]
    assert session.get_prompt("greet", {"name": "Ada"}).messages[0].content.text == "Greet Ada."
    ref = PromptReference(type="ref/prompt", name="greet")
    assert session.complete(ref, {"name": "name", "value": "A"}).completion.values == ["Ada", "Alan"]
    with pytest.raises(ToolError, match="it failed"):
        session.call_tool("fail")
    assert session.call_tool("fail", raise_on_error=False).is_error
    session.close()


def test_errors_come_out_as_they_are(recorded_peer, session_of):
    recorder = recorded_peer("python")
    session = session_of(recorder.url)
    with pytest.raises(TransportError, match=r"within 0.2 s"):
        session.call_tool("slow", {"steps": 100, "seconds": 0.1}, timeout=0.2)
    recorder.answer(rpc_method="tools/call", status=404)
    with pytest.raises(SessionLostError):
        session.call_tool("echo", {"text": "x"})
    assert session.session_id is None


def test_progress_is_reported_in_the_thread_of_the_call(recorded_peer, session_of):
    session = session_of(recorded_peer("python").url)
    reports = []

    def report(*progress):
        reports.append((threading.get_ident(), *progress))

    session.call_tool("slow", {"steps": 3, "seconds": 0.02}, on_progress=report)
    here = threading.get_ident()
    assert reports == [(here, step, 3, f"step {step}") for step in (1, 2, 3)]
    session.close()


def test_an_error_in_the_progress_callback_ends_the_call_also_at_the_server(recorded_peer, session_of):
    recorder = recorded_peer("python")
    session = session_of(recorder.url)

    def fail(*_):
        raise LookupError("in the callback")

    with pytest.raises(LookupError, match="in the callback"):
        session.call_tool("slow", {"steps": 100, "seconds": 0.1}, on_progress=fail)
    call = recorder.wait_for(is_call)
    assert recorder.wait_for(is_cancellation).rpc_params["requestId"] == call.rpc_id
    assert text_of(session.call_tool("echo", {"text": "usable"})) == "usable"
    session.close()


@pytest.mark.parametrize("interruption", [SoftTimeLimitExceeded(), SystemExit(1), KeyboardInterrupt()], ids=repr)
@pytest.mark.parametrize("peer", [("python",), ("python", "--json"), ("typescript",)], ids=" ".join)
def test_an_interrupted_call_is_cancelled_at_the_server_before_the_interruption_goes_on(
    recorded_peer, session_of, peer, interruption
):
    recorder = recorded_peer(*peer)
    session = session_of(recorder.url)
    session.open()

    def interrupt(*_):
        raise interruption

    def interrupt_once_called():
        recorder.wait_for(is_call)
        os.kill(os.getpid(), signal.SIGUSR1)

    before = signal.signal(signal.SIGUSR1, interrupt)
    try:
        thread = threading.Thread(target=interrupt_once_called)
        thread.start()
        with pytest.raises(type(interruption)) as caught:
            session.call_tool("slow", {"steps": 100, "seconds": 0.1})
    finally:
        thread.join(10)
        signal.signal(signal.SIGUSR1, before)
    assert caught.value is interruption
    names = [exchange.rpc_method for exchange in recorder.exchanges]
    assert "notifications/cancelled" in names, "already sent when the task goes on"
    call = recorder.wait_for(is_call)
    assert recorder.wait_for(is_cancellation).rpc_params["requestId"] == call.rpc_id
    assert text_of(session.call_tool("echo", {"text": "usable"})) == "usable"
    session.close()


def test_several_threads_use_one_session_at_once(recorded_peer, session_of):
    session = session_of(recorded_peer("python").url)
    texts = [str(number) for number in range(40)]
    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(lambda text: text_of(session.call_tool("echo", {"text": text})), texts))
    assert answers == texts
    session.close()


def test_sessions_of_a_process_share_connections_and_the_tool_listing(recorded_peer, session_of):
    recorder = recorded_peer("python", "--json")
    for _ in range(3):
        session = session_of(recorder.url)
        session.call_tool("echo", {"text": "x"})
        session.close()
    assert recorder.methods().count("POST tools/list") == 1
    assert recorder.connections == 1


def test_a_session_cannot_be_waited_for_in_a_coroutine(session_of):
    session = session_of("http://127.0.0.1:1/mcp")

    async def use():
        with pytest.raises(SessionError, match="coroutine"):
            session.call_tool("echo", {"text": "x"})
        with pytest.raises(SessionError, match="coroutine"):
            session.open()

    anyio.run(use)


def test_a_session_alone_has_no_siblings(session_of):
    with pytest.raises(SessionError, match="stands alone"):
        session_of("http://127.0.0.1:1/mcp")["another"]


def test_a_session_shows_no_secret(recorded_peer, session_of):
    session = session_of(recorded_peer("python").url)
    session.open()
    assert session.session_id not in repr(session)
    assert repr(session) == f"<MCPSession server {session.handle.short_id} open>"
    session.close()


def test_metadata_goes_with_a_call(recorded_peer, session_of):
    recorder = recorded_peer("python")
    session = session_of(recorder.url)
    session.call_tool("echo", {"text": "x"}, meta={"example.com/about": "whales"})
    assert recorder.wait_for(is_call).rpc_params["_meta"]["example.com/about"] == "whales"
    session.close()
