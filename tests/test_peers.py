"""The test servers and the recorder do what the other tests take for granted."""

import json
import ssl
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from itertools import count

import httpx2
import psutil
import pytest
import redis
from celery import Celery
from peers.servers import KINDS
from processes import wait_until

VERSION = "2025-11-25"
ACCEPT = {"Accept": "application/json, text/event-stream"}
#: The servers of ours, which offer the same tools.
OURS = ("python", "python1", "typescript")


class Client:
    """Raw JSON-RPC over HTTP; request IDs are unique over all clients."""

    ids = count(1)

    def __init__(self, http, url, version):
        self.http = http
        self.url = url
        self.version = version
        self.headers = dict(ACCEPT)

    def message(self, method, params=None):
        message = {"jsonrpc": "2.0", "method": method, "params": params or {}}
        return message if method.startswith("notifications/") else {**message, "id": f"test-{next(self.ids)}"}

    def post(self, method, params=None):
        return self.http.post(self.url, json=self.message(method, params), headers=self.headers)

    def initialize(self):
        info = {"name": "test", "version": "1"}
        response = self.post("initialize", {"protocolVersion": self.version, "capabilities": {}, "clientInfo": info})
        if "mcp-session-id" in response.headers:
            self.headers["Mcp-Session-Id"] = response.headers["mcp-session-id"]
        return response

    def open(self):
        result = read(self.initialize())["result"]
        self.headers["MCP-Protocol-Version"] = result["protocolVersion"]
        assert self.post("notifications/initialized").status_code == 202
        return result

    def call(self, tool, /, **arguments):
        return read(self.post("tools/call", {"name": tool, "arguments": arguments}))["result"]

    @contextmanager
    def stream(self, method, headers=None, body=None):
        headers = {**self.headers, **(headers or {})}
        with self.http.stream(method, self.url, headers=headers, json=body) as response:
            yield response

    def call_slow(self, steps, seconds):
        """A streamed call that asks for progress."""
        arguments = {"steps": steps, "seconds": seconds}
        params = {"name": "slow", "arguments": arguments, "_meta": {"progressToken": "p"}}
        return self.stream("POST", body=self.message("tools/call", params))


def events(response):
    """Yield (event ID, message or None) as they come; ends without complaint when the connection breaks."""
    event_id, message = None, None
    try:
        for line in response.iter_lines():
            name, _, value = line.partition(": ")
            if name == "id":
                event_id = value
            elif name == "data" and value.strip():
                message = json.loads(value)
            elif not line and (event_id or message):
                yield event_id, message
                event_id, message = None, None
    except httpx2.RemoteProtocolError:
        return


def read(response):
    """The JSON-RPC answer in *response*, whatever its form."""
    assert response.status_code == 200, response.text
    if response.headers["content-type"].startswith("application/json"):
        return response.json()
    return [message for _, message in events(response) if message and "id" in message][-1]


@pytest.fixture
def connect():
    """`connect(url, version=...)` returns a client with a connection pool of its own."""
    clients = []

    def make(url, version=VERSION):
        clients.append(httpx2.Client(timeout=20, trust_env=False))
        return Client(clients[-1], url, version)

    yield make
    for client in clients:
        client.close()


@pytest.mark.parametrize("kind", OURS)
def test_a_session_keeps_its_variables_until_it_is_deleted(recorded_peer, connect, kind):
    recorder = recorded_peer(kind)
    client = connect(recorder.url)
    assert client.open()["protocolVersion"] == VERSION
    client.call("set_variable", name="colour", value="red")
    assert client.call("get_variable", name="colour")["content"][0]["text"] == "red"
    assert client.call("add", a=2, b=3)["structuredContent"] == {"result": 5}
    assert client.call("fail")["isError"]

    other = connect(recorder.url)
    other.open()
    assert other.call("get_variable", name="colour")["isError"]

    assert client.http.delete(client.url, headers=client.headers).status_code == 200
    assert client.post("ping").status_code == 404
    assert other.call("echo", text="still here")["content"][0]["text"] == "still here"
    assert recorder.methods()[:3] == ["POST initialize", "POST notifications/initialized", "POST tools/call"]
    assert recorder.methods()[-3:] == ["DELETE", "POST ping", "POST tools/call"]
    assert recorder.session_ids == [client.headers["Mcp-Session-Id"], other.headers["Mcp-Session-Id"]]
    assert recorder.exchanges[2].session_id == client.headers["Mcp-Session-Id"]
    assert recorder.exchanges[2].rpc_params["name"] == "set_variable"


@pytest.mark.parametrize("kind", OURS)
def test_every_server_of_ours_offers_resources_a_prompt_and_completion(start_peer, connect, kind):
    client = connect(start_peer(kind).url)
    client.open()
    names = {tool["name"] for tool in read(client.post("tools/list"))["result"]["tools"]}
    assert names >= {"set_variable", "get_variable", "echo", "add", "slow", "executions", "fail"}
    notes = read(client.post("resources/read", {"uri": "note://people/Ada"}))["result"]["contents"]
    assert notes[0]["text"] == "a note on Ada"
    assert len(read(client.post("resources/templates/list"))["result"]["resourceTemplates"]) == 1
    greeting = read(client.post("prompts/get", {"name": "greet", "arguments": {"name": "Ada"}}))["result"]
    assert greeting["messages"][0]["content"]["text"] == "Greet Ada."
    argument = {"name": "name", "value": "A"}
    completion = client.post(
        "completion/complete", {"ref": {"type": "ref/prompt", "name": "greet"}, "argument": argument}
    )
    assert read(completion)["result"]["completion"]["values"] == ["Ada", "Alan"]


def test_server_everything_answers_on_loopback_only(start_peer, connect):
    peer = start_peer("everything")
    client = connect(peer.url)
    client.open()
    assert client.call("get-sum", a=2, b=3)["content"][0]["text"] == "The sum of 2 and 3 is 5."
    elsewhere = peer.url.replace("127.0.0.1", "127.0.0.2")
    with pytest.raises(httpx2.ConnectError):
        client.http.get(elsewhere)


@pytest.mark.parametrize(
    ("kind", "status", "code"),
    [("python", 404, -32600), ("python1", 404, -32600), ("typescript", 404, -32001), ("everything", 400, -32000)],
)
def test_an_unknown_session_is_refused_in_the_way_of_its_server(start_peer, connect, kind, status, code):
    client = connect(start_peer(kind).url)
    client.headers["Mcp-Session-Id"] = "00000000000000000000000000000000"
    response = client.post("tools/list")
    assert (response.status_code, response.json()["error"]["code"]) == (status, code)


@pytest.mark.parametrize("kind", KINDS)
def test_a_second_initialize_on_a_live_session_is_answered_in_the_way_of_its_server(start_peer, connect, kind):
    client = connect(start_peer(kind).url)
    client.open()
    assert client.initialize().status_code == (200 if kind.startswith("python") else 400)


@pytest.mark.parametrize("kind", OURS)
def test_a_call_that_was_cut_off_is_resumed_while_the_tool_runs_and_after_it(recorded_peer, connect, kind):
    recorder = recorded_peer(kind, "--event-store")
    client = connect(recorder.url)
    client.open()
    before = int(client.call("executions")["content"][0]["text"])
    recorder.cut(rpc_method="tools/call", after_events=1)
    with client.call_slow(3, 0.2) as response:
        seen = list(events(response))
    assert [message for _, message in seen] == [None], "the first event only gives an ID to resume from"
    for _ in range(2):
        with client.stream("GET", {"Last-Event-ID": seen[0][0]}) as response:
            messages = (message for _, message in events(response) if message)
            assert [next(messages)["params"]["progress"] for _ in range(3)] == [1, 2, 3]
            assert next(messages)["result"]["content"][0]["text"] == "done"
    assert int(client.call("executions")["content"][0]["text"]) == before + 1


def test_the_recorder_cuts_a_stream_after_as_many_events_as_asked(recorded_peer, connect):
    recorder = recorded_peer("python")
    client = connect(recorder.url)
    client.open()
    for asked in (0, 2):
        recorder.cut(rpc_method="tools/call", after_events=asked)
        with client.call_slow(3, 0.01) as response:
            assert len(list(events(response))) == asked
    with client.call_slow(3, 0.01) as response:
        assert len(list(events(response))) == 4


def test_a_dropped_request_runs_its_tool_and_gets_no_answer(recorded_peer, connect):
    recorder = recorded_peer("python")
    client = connect(recorder.url)
    client.open()
    recorder.drop(rpc_method="tools/call")
    with pytest.raises(httpx2.RemoteProtocolError):
        client.call("set_variable", name="colour", value="red")
    assert recorder.exchanges[-1].status is None
    wait_until(lambda: not client.call("get_variable", name="colour").get("isError"), what="the variable to be set")


def test_a_stalled_response_hangs_until_the_client_leaves(recorded_peer, connect):
    recorder = recorded_peer("python")
    client = connect(recorder.url)
    client.open()
    recorder.stall(rpc_method="tools/call")
    with pytest.raises(httpx2.ReadTimeout):
        client.http.post(
            client.url,
            json=client.message("tools/call", {"name": "echo", "arguments": {"text": "x"}}),
            headers=client.headers,
            timeout=0.2,
        )
    recorder.wait_for(lambda exchange: exchange.rpc_method == "tools/call" and exchange.ended)


def test_the_recorder_answers_itself_as_often_as_asked(recorded_peer, connect):
    recorder = recorded_peer("python")
    recorder.set_cookie("server=b; Path=/")
    client = connect(recorder.url)
    client.open()
    recorder.answer(rpc_method="ping", status=503, body=b"busy", content_type="text/plain", times=2)
    assert [client.post("ping").status_code for _ in range(3)] == [503, 503, 200]
    assert recorder.exchanges[-1].cookies == {"server": "b"}
    assert recorder.connections == 1
    recorder.clear()
    assert (recorder.methods(), recorder.connections) == ([], 0)


def test_the_recorder_carries_hundreds_of_connections_at_once(recorded_peer, connect):
    recorder = recorded_peer("python")
    client = connect(recorder.url)
    client.open()

    tls = ssl.create_default_context()

    def call(number):
        own = Client(httpx2.Client(timeout=60, trust_env=False, verify=tls), recorder.url, VERSION)
        own.headers = client.headers
        with own.http:
            return own.call("echo", text=str(number))["content"][0]["text"]

    with ThreadPoolExecutor(200) as pool:
        assert list(pool.map(call, range(200))) == [str(number) for number in range(200)]
    assert recorder.connections == 201


def test_the_recorder_stops_while_streams_are_open(start_peer, record, connect):
    from peers.recorder import Recorder

    with Recorder(start_peer("python").url) as recorder:
        client = connect(recorder.url)
        client.open()
        stream = client.stream("GET")
        response = stream.__enter__()
    assert list(events(response)) == []
    stream.__exit__(None, None, None)


@pytest.mark.parametrize("version", ["2025-03-26", "2025-06-18", "2025-11-25"])
def test_the_python_server_can_be_of_an_older_version(start_peer, connect, version):
    client = connect(start_peer("python", "--protocol-version", version).url)
    assert client.open()["protocolVersion"] == version
    client.headers["MCP-Protocol-Version"] = "2026-07-28"
    assert client.post("server/discover").status_code == 400


def test_a_server_of_the_stateless_era_refuses_to_initialize(start_peer, connect):
    client = connect(start_peer("python", "--modern-only").url)
    response = client.initialize()
    assert response.status_code == 400
    assert response.json()["error"]["code"] == -32022
    assert response.json()["error"]["data"] == {"supported": ["2026-07-28"], "requested": VERSION}


def test_a_stateless_server_hands_out_no_session(start_peer, connect):
    client = connect(start_peer("python", "--stateless").url)
    client.open()
    assert "Mcp-Session-Id" not in client.headers
    assert client.call("add", a=1, b=1)["structuredContent"] == {"result": 2}


@pytest.mark.parametrize("kind", OURS)
def test_a_server_can_answer_with_plain_json(start_peer, connect, kind):
    client = connect(start_peer(kind, "--json").url)
    client.open()
    assert client.post("tools/list").headers["content-type"].startswith("application/json")


def test_an_idle_session_is_dropped(start_peer, connect):
    client = connect(start_peer("python", "--idle", "0.005").url)
    client.initialize()
    wait_until(lambda: client.post("ping").status_code == 404, what="the idle session to be dropped")


@pytest.mark.parametrize("kind", KINDS)
def test_a_restarted_server_has_its_address_and_no_sessions(start_peer, connect, kind):
    peer = start_peer(kind, fresh=True)
    client = connect(peer.url)
    client.open()
    peer.restart()
    again = connect(peer.url)
    again.headers = client.headers
    assert again.post("ping").status_code in {400, 404}


def test_each_test_finds_an_empty_valkey(valkey):
    with redis.Redis.from_url(valkey) as client:
        assert client.dbsize() == 0
        client.set("left", "behind")


def test_each_test_finds_an_empty_valkey_again(valkey):
    test_each_test_finds_an_empty_valkey(valkey)


APP = """
import os
from celery import Celery
app = Celery(broker=os.environ["VALKEY_URL"], backend=os.environ["VALKEY_URL"])
@app.task(name="pid")
def pid():
    return os.getpid(), os.getppid()
"""


def test_a_worker_runs_tasks_until_it_is_killed_with_its_children(start_worker, valkey, tmp_path):
    (tmp_path / "pid_app.py").write_text(APP)
    worker = start_worker("pid_app", "one", env={"VALKEY_URL": valkey, "PYTHONPATH": str(tmp_path)})
    with Celery(broker=valkey, backend=valkey, set_as_current=False) as app:
        child, parent = app.send_task("pid").get(timeout=60)
    assert parent == worker.pid
    wait_until(lambda: "succeeded" in worker.log(), what="the worker's log")
    worker.kill()
    assert not worker.running
    wait_until(lambda: not alive(child), what="the child to end")


def test_a_worker_stops_warmly(start_worker, valkey, tmp_path):
    (tmp_path / "pid_app.py").write_text(APP)
    env = {"VALKEY_URL": valkey, "PYTHONPATH": str(tmp_path)}
    worker = start_worker("pid_app", "two", "-P", "solo", env=env)
    worker.stop()
    assert "Warm shutdown" in worker.log()


def alive(pid):
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
