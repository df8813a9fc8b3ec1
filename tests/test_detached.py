"""A session is detached in one process and resumed in another, without Celery."""

import subprocess
import sys
from pathlib import Path

import pytest
from calls import KINDS, delete_behind_its_back, echo, text_of
from mcp import Client, ClientSession, MCPError
from processes import ChildProcess, accepts, free_port

from mcp_celery.exceptions import SessionError, SessionHandleError, SessionLostError
from mcp_celery.handle import SessionHandle
from mcp_celery.transport import resumable_http, resume

pytestmark = pytest.mark.anyio

_ROOT = Path(__file__).parent.parent


@pytest.fixture
def notebook(tmp_path):
    """The URL of the notebook of the examples."""
    port = free_port()
    server = ChildProcess(
        [sys.executable, "-m", "examples.notebook.server"],
        tmp_path / "notebook.log",
        env={"NOTEBOOK_PORT": str(port)},
        cwd=_ROOT,
    )
    server.wait_until_ready(lambda: accepts(port), timeout=30)
    yield f"http://127.0.0.1:{port}/mcp"
    server.kill()


def invoke(*arguments, given=None):
    command = [sys.executable, "-m", "examples.serverless.functions", *arguments]
    run = subprocess.run(command, cwd=_ROOT, input=given, capture_output=True, text=True, timeout=60, check=True)
    return run.stdout.strip()


def test_a_function_continues_the_session_of_one_that_ran_in_another_process(notebook, record):
    recorder = record(notebook)
    handle = invoke("begin", recorder.url)
    recorder.clear()
    assert invoke("finish", given=handle) == "1050.0"
    assert recorder.methods() == ["POST tools/call", "POST tools/list", "DELETE"]
    assert {exchange.session_id for exchange in recorder.exchanges} == {SessionHandle.load(handle).session_id}


@pytest.mark.parametrize("peer", KINDS, ids=" ".join)
async def test_a_detached_session_is_resumed_with_nothing_but_its_handle(recorded_peer, peer):
    recorder = recorded_peer(*peer)
    async with Client(transport := resumable_http(recorder.url)):
        text = transport.detach().dumps()
    recorder.clear()
    async with Client(again := resume(text)) as client:
        assert text_of(await client.call_tool(*echo(peer, "one"))) == "one"
        assert again.detach().session_id == SessionHandle.load(text).session_id
    async with resume(text) as streams, ClientSession(*streams) as session:
        await session.initialize()
        assert text_of(await session.call_tool(*echo(peer, "two"))) == "two"
    assert recorder.methods() == ["POST tools/call", "POST tools/list"] * 2


async def test_a_handle_that_names_its_server_is_resumed_at_a_url(recorded_peer):
    recorder = recorded_peer("python")
    async with Client(transport := resumable_http(recorder.url, server="notebook")):
        handle = transport.detach()
    with pytest.raises(SessionHandleError, match="pass url="):
        resume(handle)
    with pytest.raises(SessionHandleError, match="is of server"):
        resume(SessionHandle("http://elsewhere/mcp", "1", {}), url=recorder.url)
    async with Client(resume(handle, url=recorder.url, headers={"X-Tenant": "7"})) as client:
        await client.call_tool("echo", {"text": "hello"})
    assert recorder.exchanges[-1].headers["x-tenant"] == "7"


async def test_what_is_not_open_cannot_be_detached(recorded_peer):
    recorder = recorded_peer("python")
    transport = resumable_http(recorder.url)
    with pytest.raises(SessionError, match="No session of server"):
        transport.detach()
    async with Client(transport) as client:
        await delete_behind_its_back(recorder, transport.session_id)
        with pytest.raises(MCPError):
            await client.call_tool("echo", {"text": "hello"})
        with pytest.raises(SessionLostError):
            transport.detach()
    async with Client(ended := resumable_http(recorder.url)):
        await ended.terminate()
        with pytest.raises(SessionError, match="No session of server"):
            ended.detach()


async def test_a_transport_that_is_entered_again_refuses_and_goes_on(recorded_peer):
    transport = resumable_http(recorded_peer("python").url)
    async with Client(transport) as client:
        with pytest.raises(SessionError, match="entered before"):
            await transport.__aenter__()
        assert text_of(await client.call_tool("echo", {"text": "hello"})) == "hello"
    with pytest.raises(SessionError, match="entered before"):
        await transport.__aenter__()


async def test_a_handle_of_a_session_goes_before_the_stateless_protocol(recorded_peer):
    recorder = recorded_peer("python")
    async with Client(transport := resumable_http(recorder.url)) as client:
        await client.call_tool("set_variable", {"name": "x", "value": "1"})
        handle = transport.detach()
    recorder.clear()
    async with Client(resumable_http(recorder.url, handle=handle, prefer_stateless=True)) as client:
        assert text_of(await client.call_tool("get_variable", {"name": "x"})) == "1"
    assert recorder.methods() == ["POST tools/call", "POST tools/list"]


async def test_a_server_of_both_eras_is_asked_for_the_stateless_one_where_that_is_preferred(recorded_peer):
    recorder = recorded_peer("python")
    async with Client(transport := resumable_http(recorder.url, prefer_stateless=True)) as client:
        assert client.protocol_version == "2026-07-28"
        handle = transport.detach()
    assert handle.session_id is None
    async with Client(resume(handle)) as client:
        assert text_of(await client.call_tool("echo", {"text": "hello"})) == "hello"
    assert recorder.methods() == ["POST server/discover", "POST tools/call", "POST tools/list"]
