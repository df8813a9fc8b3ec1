"""Agents of openai-agents over the session of a task: what they call, how it fails, and who ends the session."""

import asyncio
import importlib
import json
import os
import pickle
import secrets
import signal
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from agents import Agent, RunConfig, Runner, RunState, UserError, set_tracing_disabled
from agents.mcp import MCPServerManager, MCPUtil, create_static_tool_filter
from calls import is_call, is_cancellation
from celery import Celery, chain
from celery.exceptions import SoftTimeLimitExceeded
from processes import ChildProcess, accepts, free_port, wait_until

from examples.agent.model import Call, ScriptedModel, text_of
from mcp_celery import JournalMismatchError, MCPTask, SessionLostError, TransportError, signals
from mcp_celery.openai_agents import TaskServer, agents_server
from mcp_celery.portal import close_portal, get_portal
from mcp_celery.redis_store import RedisStore
from mcp_celery.settings import JournalSettings, ServerSettings, StoreSettings
from mcp_celery.sync_session import new_journal, new_session
from mcp_celery.testing import eager_sessions

QUIET = RunConfig(tracing_disabled=True)


@pytest.fixture
def session_of():
    """`session_of(url, handle=None)` returns an `MCPSession` on this process's event loop, which ends with the test."""
    yield lambda url, handle=None: new_session(ServerSettings(name="server", url=url), handle)
    close_portal()


@pytest.fixture
def server_of(session_of):
    """`server_of(url, handle=None, **options)` returns a `TaskServer` on a session of its own."""
    return lambda url, handle=None, **options: TaskServer(session_of(url, handle), **options)


@pytest.fixture(params=["loop of the task's thread", "loop of the process"])
def run(request):
    """`run(coroutine)` runs a coroutine where `Runner.run_sync` does, or where an `async def` task does."""
    if request.param == "loop of the process":
        return lambda coroutine: get_portal().call(lambda: coroutine)
    return asyncio.run


@pytest.fixture
def run_sync():
    """`Runner.run_sync`, which leaves its event loop open for the next run in the thread."""
    yield lambda agent, question: Runner.run_sync(agent, question, run_config=QUIET)
    asyncio.get_event_loop_policy().get_event_loop().close()
    asyncio.set_event_loop(None)


def agent_of(server, *turns, **options):
    """An agent that says *turns* when it is asked to "go"."""
    return Agent("tester", model=ScriptedModel({"go": turns}), mcp_servers=[server], **options)


def outputs(result):
    """What the tools have told the model."""
    items = result.to_input_list()
    return [text_of(item["output"]) for item in items if item.get("type") == "function_call_output"]


async def go(server, *turns, **options):
    return await Runner.run(agent_of(server, *turns, **options), "go", run_config=QUIET)


REMEMBER = [Call("set_variable", {"name": "x", "value": "41"})]
RECALL = [Call("get_variable", {"name": "x"})]


def test_an_agent_calls_over_the_session_and_the_next_one_continues_it(recorded_peer, server_of, session_of, run):
    recorder = recorded_peer("python")
    session = session_of(recorder.url)
    assert outputs(run(go(TaskServer(session), REMEMBER, "done"))) == ["set"]
    handle = session.detach()

    later = server_of(recorder.url, handle, cache_tools_list=True)
    result = run(go(later, RECALL, "it is {}"))
    assert (result.final_output, later.session_id) == ("it is 41", recorder.session_ids[0])
    names = recorder.methods()
    assert names.count("POST initialize") == 1
    assert "DELETE" not in names
    assert json.loads(json.dumps(result.to_input_list())) == result.to_input_list(), "it travels as a return value"


def test_a_server_that_is_connected_and_cleaned_up_leaves_the_session_alone(recorded_peer, server_of, run):
    recorder = recorded_peer("python")
    server = server_of(recorder.url)

    async def use():
        async with server:
            assert [server.session_id] == recorder.session_ids
        async with MCPServerManager([server]) as manager:
            assert manager.active_servers == [server]
        return await server.call_tool("echo", {"text": "still there"})

    assert run(use()).content[0].text == "still there"
    assert recorder.methods().count("POST initialize") == 1
    assert "DELETE" not in recorder.methods()


def test_connecting_opens_no_new_session_in_the_place_of_one_that_has_ended(recorded_peer, session_of):
    recorder = recorded_peer("python")
    session = session_of(recorder.url)
    session.open()
    session.close()
    asyncio.run(TaskServer(session).connect())
    assert (session.session_id, recorder.methods().count("POST initialize")) == (None, 1)


def test_run_sync_uses_the_session_and_calls_of_one_turn_run_at_once(recorded_peer, server_of, run_sync):
    server = server_of(recorded_peer("python").url)
    calls = [Call("echo", {"text": str(number)}) for number in range(8)]
    result = run_sync(agent_of(server, calls, REMEMBER, RECALL, "it is {}"), "go")
    assert outputs(result) == [*map(str, range(8)), "set", "41"]
    assert result.final_output == "it is 41"


def test_a_soft_time_limit_ends_run_sync_and_the_call_also_at_the_server(recorded_peer, server_of, run_sync):
    recorder = recorded_peer("python")
    server = server_of(recorder.url)

    main = threading.get_ident()

    def interrupt(*_):
        raise SoftTimeLimitExceeded

    def interrupt_once_called():
        recorder.wait_for(is_call)
        wait_until(lambda: sys._current_frames()[main].f_code.co_name == "select", 10, "an idle event loop")
        os.kill(os.getpid(), signal.SIGUSR1)

    before = signal.signal(signal.SIGUSR1, interrupt)
    try:
        thread = threading.Thread(target=interrupt_once_called)
        thread.start()
        with pytest.raises(SoftTimeLimitExceeded):
            run_sync(agent_of(server, [Call("slow", {"steps": 100, "seconds": 0.1})], "done"), "go")
    finally:
        thread.join(10)
        signal.signal(signal.SIGUSR1, before)
    call = recorder.wait_for(is_call)
    assert recorder.wait_for(is_cancellation).rpc_params["requestId"] == call.rpc_id
    assert run_sync(agent_of(server, REMEMBER, "done"), "go").final_output == "done", "the session is usable"


def test_a_soft_time_limit_that_comes_while_a_call_is_prepared_is_not_told_to_the_model(recorded_peer, server_of, run):
    def interrupted(_):
        raise SoftTimeLimitExceeded

    server = server_of(recorded_peer("python").url, tool_meta_resolver=interrupted)
    with pytest.raises(SoftTimeLimitExceeded):
        run(go(server, REMEMBER, "done"))


def test_a_soft_time_limit_in_a_filter_of_tools_ends_the_run(recorded_peer, server_of):
    def interrupted(*_):
        raise SoftTimeLimitExceeded

    server = server_of(recorded_peer("python").url, tool_filter=interrupted)
    with pytest.raises(SoftTimeLimitExceeded):
        asyncio.run(go(server, "done"))


class Answering(MCPTask):
    """Says who was asked in which thread."""

    mcp_server = "server"

    def on_elicitation(self, params):
        if params.message == "whether":
            raise LookupError("nobody knows")
        return {"answer": f"to {params.message} in {threading.current_thread().name}"}


def ask_in_task(self, *turns):
    return outputs(asyncio.run(go(agents_server(self), *turns)))


async def ask_in_async_task(self, *turns):
    return outputs(await go(agents_server(self), *turns))


@pytest.fixture(params=[ask_in_task, ask_in_async_task])
def ask(request):
    """`ask(url, *turns)` runs an agent in a task that answers its server, and returns what the tools said."""
    app = Celery("agents", broker="memory://", set_as_current=False)

    def ask(url, *turns):
        app.conf.mcp_servers = {"server": {"url": url}}
        return app.task(request.param, base=Answering, bind=True, shared=False, name="agents.ask")(*turns)

    yield ask
    app.close()
    close_portal()


def test_an_error_of_what_the_task_answers_with_ends_the_run_and_is_not_for_the_model(recorded_peer, ask):
    recorder = recorded_peer("python")
    with pytest.raises(LookupError, match="nobody knows"):
        ask(recorder.url, [Call("ask_user", {"question": "whether"})], "not asked again")
    assert sum(map(is_call, recorder.exchanges)) == 1


def test_what_a_server_asks_an_agent_is_answered_by_the_task_in_its_thread(recorded_peer, ask):
    answers = ask(recorded_peer("python").url, [Call("ask_user", {"question": "why"})], "done")
    assert answers == [f"accept: to why in {threading.current_thread().name}"]


def test_signals_tell_of_the_calls_of_an_agent_while_it_runs(recorded_peer, ask):
    recorder = recorded_peer("python")
    calls_at_server = []

    def note(tool, **_):
        if tool is not None:
            calls_at_server.append((tool, sum(map(is_call, recorder.exchanges))))

    signals.call_finished.connect(note)
    try:
        ask(recorder.url, [Call("echo", {"text": "x"})], [Call("add", {"a": 1, "b": 2})], "done")
    finally:
        signals.call_finished.disconnect(note)
    assert calls_at_server == [("echo", 1), ("add", 2)]


def test_a_call_that_takes_too_long_is_cancelled_and_the_model_is_told(recorded_peer, server_of):
    recorder = recorded_peer("python")
    server = server_of(recorder.url, client_session_timeout_seconds=0.2)
    result = asyncio.run(go(server, [Call("slow", {"steps": 100, "seconds": 0.1})], "done"))
    assert "within 0.2 s" in outputs(result)[0]
    assert recorder.wait_for(is_cancellation)


def test_tools_are_listed_at_each_turn_or_once_in_a_process(recorded_peer, server_of, run):
    recorder = recorded_peer("python")

    def listings(server):
        recorder.clear()
        run(go(server, REMEMBER, RECALL, "done"))
        return recorder.methods().count("POST tools/list")

    assert listings(server_of(recorder.url)) == 3
    cached = server_of(recorder.url, cache_tools_list=True)
    assert cached.cached_tools is None
    assert listings(cached) == 0, "another session has listed them"
    assert "echo" in {tool.name for tool in cached.cached_tools}
    cached.invalidate_tools_cache()
    assert cached.cached_tools is None
    assert listings(cached) == 1


def test_the_tools_that_are_handed_out_are_copies(recorded_peer, server_of):
    server = server_of(recorded_peer("python").url, cache_tools_list=True)
    for tools in (asyncio.run(server.list_tools()), server.cached_tools):
        for tool in tools:
            tool.input_schema.clear()
    assert all(tool.input_schema for tool in asyncio.run(server.list_tools()))


def test_a_static_filter_shows_the_agent_some_tools(recorded_peer, server_of):
    url = recorded_peer("python").url

    def names(**lists):
        server = server_of(url, cache_tools_list=True, tool_filter=create_static_tool_filter(**lists))
        return sorted(tool.name for tool in asyncio.run(server.list_tools()))

    assert names(allowed_tool_names=["echo", "add", "nonsense"]) == ["add", "echo"]
    assert names(allowed_tool_names=["echo", "add"], blocked_tool_names=["add"]) == ["echo"]
    assert "echo" not in names(blocked_tool_names=["echo"])


def test_a_filter_that_is_a_function_sees_agent_and_tool_and_leaves_out_what_it_fails_on(
    recorded_peer, server_of, caplog
):
    seen = set()

    async def only_short(context, tool):
        seen.add((context.server_name, context.agent.name))
        tool.description = "changed"
        if tool.name == "fail":
            raise LookupError("in the filter")
        return tool.name in {"add", "echo", "slow"}

    server = server_of(recorded_peer("python").url, name="notes", tool_filter=only_short)
    agent = agent_of(server, "done")

    async def tools():
        result = await Runner.run(agent, "go", run_config=QUIET)
        return await agent.get_mcp_tools(result.context_wrapper)

    shown = asyncio.run(tools())
    assert sorted(tool.name for tool in shown) == ["add", "echo", "slow"]
    assert all(tool.description != "changed" for tool in shown)
    assert seen == {("notes", "tester")}
    assert "'fail' of server 'notes'" in caplog.text
    with pytest.raises(UserError, match="needs the run_context"):
        asyncio.run(server.list_tools())


def test_a_call_without_a_required_parameter_is_refused_before_it_is_sent(recorded_peer, server_of):
    recorder = recorded_peer("python")
    server = server_of(recorder.url)
    result = asyncio.run(go(server, [Call("add", {"b": 1})], "done", mcp_config={"failure_error_function": shout}))
    assert outputs(result) == [
        "UserError: Tool 'add' of MCP server 'server' was not called: required parameters are missing: a"
    ]
    assert not any(is_call(exchange) for exchange in recorder.exchanges)


def shout(_, error):
    return f"{type(error).__name__}: {error}"


@pytest.mark.parametrize("peer", [("python",), ("python", "--modern-only")], ids=" ".join)
def test_metadata_goes_with_a_call(recorded_peer, server_of, peer):
    recorder = recorded_peer(*peer)
    server = server_of(recorder.url, tool_meta_resolver=lambda context: {"about": context.tool_name})
    asyncio.run(go(server, [Call("echo", {"text": "x"})], "done"))
    assert recorder.wait_for(is_call).rpc_params["_meta"]["about"] == "echo"


def test_what_a_tool_says_is_wrong_and_what_it_structures_is_for_the_model(recorded_peer, server_of):
    url = recorded_peer("python").url
    turns = [[Call("fail", {})], [Call("add", {"a": 1, "b": 2})], "done"]
    assert "it failed" in outputs(asyncio.run(go(server_of(url), *turns)))[0]
    assert outputs(asyncio.run(go(server_of(url, use_structured_content=True), *turns)))[1] == '{"result": 3}'


def test_a_call_that_needs_an_approval_waits_for_it_also_in_another_task(recorded_peer, server_of):
    recorder = recorded_peer("python")
    asked = asyncio.run(go(server_of(recorder.url, require_approval="always"), REMEMBER, "done"))
    assert [item.name for item in asked.interruptions] == ["set_variable"]
    assert not any(is_call(exchange) for exchange in recorder.exchanges)
    travelled = json.dumps(asked.to_state().to_json())

    async def approve():
        agent = agent_of(server_of(recorder.url, require_approval="always"), REMEMBER, "done")
        state = await RunState.from_json(agent, json.loads(travelled))
        state.approve(state.get_interruptions()[0])
        return await Runner.run(agent, state, run_config=QUIET)

    assert asyncio.run(approve()).final_output == "done"
    assert recorder.wait_for(is_call)


class Paged(BaseHTTPRequestHandler):
    """A server without sessions whose tools and prompts come on two pages; the prompts then begin again."""

    protocol_version = "HTTP/1.1"

    def do_POST(self):
        message = json.loads(self.rfile.read(int(self.headers["content-length"])))
        cursor = (message.get("params") or {}).get("cursor")
        match message["method"], cursor:
            case "tools/list", _:
                tool = {"name": f"tool {cursor}", "inputSchema": {"type": "object"}}
                result = {"tools": [tool], **({} if cursor else {"nextCursor": "2"})}
            case "prompts/list", _:
                result = {
                    "prompts": [{"name": f"prompt {cursor}"}],
                    "nextCursor": {None: "2", "2": "3"}.get(cursor, "2"),
                }
            case _:
                info = {"name": "paged", "version": "1"}
                result = {"protocolVersion": "2025-11-25", "capabilities": {"tools": {}}, "serverInfo": info}
        body = (
            json.dumps({"jsonrpc": "2.0", "id": message["id"], "result": result}).encode() if "id" in message else b""
        )
        self.send_response(200 if body else 202)
        self.send_header("content-type", "application/json")
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_):
        pass


@pytest.fixture
def paged_url():
    with ThreadingHTTPServer(("127.0.0.1", 0), Paged) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}/mcp"
        close_portal()  # its connections end the threads of the server
        server.shutdown()
        thread.join(10)


def test_all_pages_are_listed_unless_there_are_too_many_or_they_have_no_end(paged_url, server_of):
    for cached in (False, True):
        tools = asyncio.run(server_of(paged_url, cache_tools_list=cached, max_list_pages=2).list_tools())
        assert [tool.name for tool in tools] == ["tool None", "tool 2"]
    with pytest.raises(UserError, match="more pages of tools"):
        asyncio.run(server_of(paged_url, max_list_pages=1).list_tools())
    with pytest.raises(UserError, match="cursor of its prompts twice"):
        asyncio.run(server_of(paged_url).list_prompts())


def test_prompts_and_resources_are_there(recorded_peer, server_of):
    server = server_of(recorded_peer("python").url, max_list_pages=1)

    async def use():
        assert [prompt.name for prompt in (await server.list_prompts()).prompts] == ["greet"]
        assert (await server.get_prompt("greet", {"name": "Ada"})).messages[0].content.text == "Greet Ada."
        assert [str(found.uri) for found in (await server.list_resources()).resources] == ["note://hello"]
        assert len((await server.list_resource_templates()).resource_templates) == 1
        assert (await server.read_resource("note://people/Ada")).contents[0].text == "a note on Ada"

    asyncio.run(use())
    with pytest.raises(ValueError, match="positive"):
        server_of("http://127.0.0.1:1/mcp", max_list_pages=0)


def test_a_call_that_may_have_run_is_not_made_again_and_the_model_is_told(recorded_peer, server_of):
    recorder = recorded_peer("python")
    server = server_of(recorder.url, max_retry_attempts=3, retry_backoff_seconds_base=0.01)
    recorder.drop(rpc_method="tools/call")
    result = asyncio.run(go(server, REMEMBER, RECALL, "it is {}"))
    assert "may or may not have run: find out before you call it again" in outputs(result)[0]
    assert result.final_output == "it is 41", "it had"
    assert [exchange.rpc_params["name"] for exchange in recorder.exchanges if is_call(exchange)] == [
        "set_variable",
        "get_variable",
    ]


def test_what_may_run_twice_is_made_again_in_the_same_session(recorded_peer, server_of):
    recorder = recorded_peer("python")
    server = server_of(
        recorder.url, max_retry_attempts=2, retry_backoff_seconds_base=0.01, retry_backoff_seconds_max=0.01
    )
    recorder.drop(rpc_method="tools/list", times=2)
    recorder.drop(rpc_method="tools/call", times=2)
    result = asyncio.run(go(server, [Call("slow_look", {"steps": 1, "seconds": 0.01})], "done"))
    assert outputs(result) == ["done"]
    assert recorder.methods().count("POST tools/call") == 3
    assert recorder.methods().count("POST initialize") == 1
    recorder.drop(rpc_method="prompts/list", times=3)
    with pytest.raises(TransportError):
        asyncio.run(server.list_prompts())


def test_a_call_is_made_again_where_its_session_could_not_be_opened(recorded_peer, server_of):
    recorder = recorded_peer("python")
    recorder.answer(rpc_method="initialize", status=503)
    server = server_of(recorder.url, max_retry_attempts=1, retry_backoff_seconds_base=0.01)
    answer = asyncio.run(server.call_tool("add", {"a": 1, "b": 2}))
    assert answer.structured_content == {"result": 3}
    assert len(recorder.session_ids) == 1


def test_a_lost_session_ends_the_run_whatever_the_model_would_be_told(recorded_peer, server_of, run):
    recorder = recorded_peer("python")
    server = server_of(recorder.url, failure_error_function=shout, max_retry_attempts=3)
    recorder.answer(rpc_method="tools/call", status=404)
    with pytest.raises(SessionLostError) as caught:
        run(go(server, REMEMBER, "done"))
    error = caught.value
    assert error.server == "server"
    backend = Celery(backend="cache+memory://", set_as_current=False).backend
    from_json = backend.exception_to_python(json.loads(json.dumps(backend.prepare_exception(error, "json"))))
    from_pickle = pickle.loads(pickle.dumps(error))  # noqa: S301 - our own
    for stored in (from_json, from_pickle):
        assert (type(stored), stored.args) == (SessionLostError, error.args)
    with pytest.raises(SessionLostError):
        run(go(server, REMEMBER, "done"))
    assert recorder.methods().count("POST initialize") == 1


def test_without_a_failure_function_a_transport_error_ends_the_run_as_itself(recorded_peer, server_of, run):
    recorder = recorded_peer("python")
    server = server_of(recorder.url, failure_error_function=None)
    recorder.drop(rpc_method="tools/call")
    with pytest.raises(TransportError) as caught:
        run(go(server, REMEMBER, "done"))
    assert caught.value.sent


@pytest.fixture
def run_durably(valkey):
    """`run_durably(url, turns)` runs an agent in one run of a durable task, and returns its answer."""

    def run(url, turns):
        store = RedisStore(StoreSettings(url=valkey))
        settings = JournalSettings(keeps_over_retries=True, calls_again=False, max_result_bytes=1024 * 1024)
        journal = new_journal(store, "task", 0, settings)
        journal.begin()
        session = new_session(
            ServerSettings(name="server", url=url), journal.journal.sessions.get("server"), journal=journal.journal
        )
        # As the IDs of traces, different in each run.
        server = TaskServer(session, tool_meta_resolver=lambda _: {"trace": secrets.token_hex()})
        try:
            return asyncio.run(go(server, *turns)).final_output
        finally:
            session.release()
            journal.end(is_done=False)

    yield run
    close_portal()


def test_an_agent_of_a_durable_task_that_runs_again_makes_no_call_twice(recorded_peer, run_durably):
    recorder = recorded_peer("python")
    turns = [[Call("echo", {"text": str(n)}) for n in range(8)], [Call("add", {"a": 1, "b": 2})], "it is {}"]
    assert [run_durably(recorder.url, turns) for _ in range(2)] == ["it is 3", "it is 3"]
    assert recorder.methods().count("POST tools/call") == 9
    with pytest.raises(JournalMismatchError):
        run_durably(recorder.url, [RECALL, "the model has changed its mind: {}"])


@pytest.fixture
def example(tmp_path, monkeypatch):
    """The tasks of the example, with its notebook server."""
    port = free_port()
    monkeypatch.setenv("NOTEBOOK_URL", f"http://127.0.0.1:{port}/mcp")
    monkeypatch.setenv("CELERY_BROKER_URL", "memory://")
    monkeypatch.setenv("CELERY_RESULT_BACKEND", "cache+memory://")
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    monkeypatch.setattr("celery._state._on_app_finalizers", set())  # or apps of other tests have these tasks too
    command = [sys.executable, "-m", "examples.notebook.server"]
    notebook = ChildProcess(command, tmp_path / "log", env={"NOTEBOOK_PORT": str(port)}, cwd=Path(__file__).parents[1])
    notebook.wait_until_ready(lambda: accepts(port), 30)
    yield importlib.import_module("examples.agent.tasks")
    notebook.kill()
    set_tracing_disabled(False)


@pytest.mark.usefixtures("run_sync", "session_of")
def test_the_example_asks_two_agents_in_one_session(example):
    with eager_sessions(example.app):
        result = chain(example.ask.s([], example.DEPOSIT), example.ask.s(example.GROWTH)).apply()
    assert "628.89" in result.get()[-1]["content"][0]["text"]


def test_names_of_tools_may_tell_the_server(recorded_peer, server_of):
    url = recorded_peer("python").url

    async def names(*servers):
        tools = [await server.list_tools() for server in servers]
        assert len(tools) == 2
        agent = Agent("tester", mcp_servers=list(servers), mcp_config={"include_server_in_tool_names": True})
        result = await Runner.run(Agent("empty", model=ScriptedModel({"go": ["done"]})), "go", run_config=QUIET)
        shown = await MCPUtil.get_all_function_tools(
            list(servers), False, result.context_wrapper, agent, include_server_in_tool_names=True
        )
        return {tool.name for tool in shown}

    found = asyncio.run(names(server_of(url), server_of(url, name="other")))
    assert {"mcp_server__echo", "mcp_other__echo"} <= found
