"""`celery -A proj mcp ...`, on a real Valkey and sessions of real servers."""

import json
import os
import re
import subprocess
import sys
import time
from inspect import signature
from pathlib import Path

import pytest
from celery import Celery
from celery.bin.base import CLIContext
from click.testing import CliRunner
from processes import free_port, wait_until
from redis import Redis

from mcp_celery import MCPTask, SessionLostError
from mcp_celery.cli import mcp
from mcp_celery.redis_store import get_store
from mcp_celery.settings import ServerSettings
from mcp_celery.store import Change
from mcp_celery.sync_session import new_session

HERE = Path(__file__).parent
# click 8.1 takes both outputs for one unless it is told; later ones have no such option.
RUNNER = CliRunner(**({"mix_stderr": False} if "mix_stderr" in signature(CliRunner).parameters else {}))


class Console:
    """Runs commands of an app in this process, and knows the session IDs that none of them may show."""

    def __init__(self, store_url):
        self.app = Celery("console", broker=store_url, backend=store_url, set_as_current=False)
        self.app.conf.mcp_servers = {}
        self.secrets = []

    @property
    def store(self):
        return get_store(self.app.conf)

    def run(self, *arguments, exit_code=0, stdin=None):
        """Run `celery mcp *arguments*` and return its result."""
        context = CLIContext(self.app, no_color=True, workdir=None)
        result = RUNNER.invoke(mcp, arguments, obj=context, input=stdin, catch_exceptions=False)
        output = result.stdout + result.stderr
        assert result.exit_code == exit_code, output
        for secret in self.secrets:
            assert secret not in output
        return result

    def json(self, *arguments, **options):
        """Run a command with --json, and return what it has written to standard output."""
        return json.loads(self.run(*arguments, "--json", **options).stdout)

    def fails(self, *arguments, exit_code=1, stdin=None):
        """Run a command that fails, and return what it says of that."""
        result = self.run(*arguments, exit_code=exit_code, stdin=stdin)
        assert result.stdout == ""
        return result.stderr.strip()

    def add_server(self, name, url, **options):
        self.app.conf.mcp_servers[name] = {"url": url, **options}

    def open_session(self, server="peer", url=None, **change):
        """Open a session at a server, and count its holders. Returns its handle."""
        url = url or self.app.conf.mcp_servers[server]["url"]
        session = new_session(ServerSettings(name=server, url=url))
        session.open()
        handle = session.handle
        session.release()
        self.secrets.append(handle.session_id)
        self.count(handle, **change)
        return handle

    def count(self, handle, **change):
        change = {"joining": {"task-2": "proj.report"}, "opened_by": OPENED_BY, "create": True, **change}
        self.store.change(handle, Change(**change))


OPENED_BY = {"task": "proj.load", "id": "task-1", "worker": "a@host"}


def is_alive(handle, url):
    """Whether the server still knows a session."""
    session = new_session(ServerSettings(name=handle.server, url=url), handle)
    try:
        session.call_tool("add", {"a": 1, "b": 2})
    except SessionLostError:
        return False
    finally:
        session.release()
    return True


@pytest.fixture
def console(valkey):
    return Console(valkey)


@pytest.fixture
def peer(console, recorded_peer):
    """A recorder before the server "peer" of the console's app."""
    recorder = recorded_peer("python", "--event-store")
    console.add_server("peer", recorder.url)
    return recorder


# -- sessions


def test_sessions_are_listed_by_hash_with_opener_age_idle_time_deadline_and_holders(console, peer):
    handle = console.open_session(joining={str(number): f"proj.step{number % 5}" for number in range(6)})
    header, row = console.run("sessions").stdout.splitlines()
    assert re.split(r"  +", header) == ["session", "server", "state", "opened by", "age", "idle", "deadline", "holders"]
    cells = re.split(r"  +", row)
    assert cells[:4] == [handle.short_id, "peer", "open", "proj.load on a@host"]
    assert re.fullmatch(r"\d+s", cells[4])
    assert re.fullmatch(r"\d+s", cells[5])
    assert cells[6].startswith("in 23h 59m")
    assert cells[7] == "proj.step0, proj.step1, proj.step2 and 2 more (6 tasks)"
    assert row.index(handle.short_id) == header.index("session")
    assert row.index("proj.load") == header.index("opened by")

    (listed,) = console.json("sessions")
    assert listed["session"] == handle.short_id
    assert (listed["server"], listed["state"], listed["opened_by"]) == ("peer", "open", OPENED_BY)
    assert listed["holders"]["3"] == "proj.step3"
    assert listed["opened_at"] <= listed["used_at"] < listed["deadline"]
    assert handle.key not in json.dumps(listed)


def test_an_empty_list_says_so(console):
    assert console.run("sessions").stdout == "There are no sessions.\n"
    assert console.run("sessions", "--ended").stdout.startswith("There are no sessions that have ended")
    assert console.json("sessions") == []


# -- show


def events():
    now = time.time()
    call = {"what": "tool 'add'", "at": now + 0.1, "seconds": 0.25, "ok": True}
    calls = [call, {**call, "at": now + 0.6, "ok": False}]
    return [
        {**OPENED_BY, "what": "opened", "at": now + 0.05},
        {
            **OPENED_BY,
            "what": "step",
            "at": now,
            "until": now + 1.5,
            "outcome": "done",
            "to": ["proj.report"],
            "calls": calls,
        },
        {"what": "something new", "at": now + 2, "more": [1]},
    ]


def test_a_history_shows_steps_and_their_calls_with_durations(console, peer):
    handle = console.open_session(events=events())
    facts, _, table = console.run("show", handle.short_id).stdout.partition("\n\n")
    assert f"Session:   {handle.short_id}\nServer:    peer\nState:     open\nOpened:    20" in facts
    assert "by proj.load on a@host" in facts
    assert "Held by:   proj.report\nDeadline:  in 23h 59m" in facts
    lines = [re.split(r"  +", line.strip()) for line in table.splitlines()]
    assert lines == [
        ["at", "took", "worker", "what"],
        ["+0s", "1.5s", "a@host", "proj.load: done, handed to proj.report"],
        ["+50ms", "opened"],
        ["+100ms", "250ms", "tool 'add'"],
        ["+600ms", "250ms", "tool 'add': failed"],
        ["+2s", "something new"],
    ]


def test_the_beginning_of_a_hash_is_enough_and_json_has_the_events(console, peer):
    handle = console.open_session(events=[{"what": "opened", "at": 1, **OPENED_BY}])
    shown = console.json("show", handle.short_id[:4].upper())
    assert shown["session"] == handle.short_id
    assert shown["events"] == [{"what": "opened", "at": 1, **OPENED_BY}]


def test_of_a_long_history_the_end_is_shown(console, peer):
    handle = console.open_session(events=[{"what": f"event-{number}", "at": number} for number in range(501)])
    shown = console.run("show", handle.short_id).stdout
    assert "What happened earlier is not kept." in shown
    assert "event-500" in shown
    assert "event-0\n" not in shown


def test_a_history_is_written_as_a_page_to_a_file_or_to_standard_output(console, peer, tmp_path):
    handle = console.open_session(events=events())
    path = tmp_path / "session.html"
    assert console.run("show", handle.short_id, "--html", str(path)).stdout == f"Written to {path}.\n"
    page = path.read_text("utf-8")
    assert page.startswith("<!doctype html>")
    assert handle.session_id not in page
    assert "proj.report" in page
    assert console.run("show", handle.short_id, "--html", "-").stdout.startswith("<!doctype html>")
    assert console.json("show", handle.short_id, "--html", str(path))["session"] == handle.short_id
    assert "Only one" in console.fails("show", handle.short_id, "--html", "-", "--json", exit_code=2)
    assert "no" in console.fails("show", handle.short_id, "--html", str(tmp_path / "no" / "such.html"))


def test_a_hash_of_no_session_or_of_several_is_refused_without_repeating_what_may_be_a_session_id(console, peer):
    handles = [console.open_session() for _ in range(17)]
    beginning = next(h.short_id[0] for h in handles if sum(o.short_id[0] == h.short_id[0] for o in handles) > 1)
    assert re.search(r"\d+ sessions begin so: \w{8}, .* Give more digits", console.fails("show", beginning))
    for digits in (handles[0].session_id, "no hash", "é"):
        text = console.fails("show", digits)
        assert "There is no session with this hash" in text
        assert digits not in text


# -- close


def test_a_session_is_closed_at_its_server_and_remembered_as_closed_by_a_command(console, peer):
    handle, other = console.open_session(), console.open_session()
    assert console.run("close", handle.short_id).stdout == "Closed 1 session.\n"
    assert peer.methods().count("DELETE") == 1
    assert not is_alive(handle, peer.url)
    assert is_alive(other, peer.url)
    assert [session["session"] for session in console.json("sessions")] == [other.short_id]
    (ended,) = console.json("sessions", "--ended")
    assert (ended["session"], ended["state"]) == (handle.short_id, "closed")
    shown = console.run("show", handle.short_id).stdout
    assert "Ended:" in shown
    assert "closed by command: asked" in shown
    again = console.run("close", handle.short_id).stdout
    assert again == f"Session {handle.short_id} of peer has ended already.\nClosed 0 sessions.\n"


def test_all_sessions_are_closed_once_that_is_confirmed(console, peer):
    handles = {console.open_session().short_id for _ in range(3)}
    refused = console.run("close", "--all", stdin="n\n", exit_code=1)
    assert "End 3 sessions, also those in use?" in refused.stderr
    assert peer.methods().count("DELETE") == 0
    closed = console.run("close", "--all", stdin="y\n")
    assert closed.stdout.splitlines()[-1] == "Closed 3 sessions."
    assert peer.methods().count("DELETE") == 3
    assert {session["session"] for session in console.json("sessions", "--ended")} == handles
    assert console.json("close", "--all", "--yes") == {"closed": [], "ended": [], "failed": []}


def test_sessions_that_were_idle_for_long_enough_are_closed(console, peer):
    idle = console.open_session()
    (record,) = console.store.sessions()
    wait_until(lambda: time.time() - record.used_at > 1)
    busy = console.open_session()
    assert console.json("close", "--older-than", "1h")["closed"] == []
    assert console.json("close", "--older-than", "1s")["closed"] == [idle.short_id]
    assert [session["session"] for session in console.json("sessions")] == [busy.short_id]


def test_sessions_that_cannot_be_closed_are_named_and_kept(console, peer, recorded_peer):
    gone = recorded_peer("python", fresh=True)
    console.add_server("gone", gone.url)
    left, closed = console.open_session("gone"), console.open_session("peer")
    console.add_server("gone", f"http://127.0.0.1:{free_port()}/mcp")
    outcome = console.run("close", "--all", "--yes", exit_code=1)
    assert outcome.stdout == "Closed 1 session.\n"
    assert f"{left.short_id} (gone)" in outcome.stderr
    assert closed.short_id not in outcome.stderr
    assert [session["session"] for session in console.json("sessions")] == [left.short_id]
    assert console.json("close", left.short_id, exit_code=1)["failed"] == [left.short_id]


def test_what_to_close_has_to_be_said_in_one_way(console):
    assert "Say which sessions" in console.fails("close", exit_code=2)
    assert "Say which sessions" in console.fails("close", "abc", "--all", exit_code=2)
    assert "such as 90s" in console.fails("close", "--older-than", "soon", exit_code=2)


# -- reap


def test_a_sweep_ends_what_is_past_its_deadline_and_tells_the_counts(console, peer):
    console.app.conf.mcp_session_ttl_seconds = 0.01
    handle = console.open_session()
    wait_until(lambda: console.store.has_due({"peer": ""}))
    assert console.run("reap").stdout == "closed 1, pinged 0, lost 0, failed 0\n"
    assert not is_alive(handle, peer.url)
    assert console.json("reap") == {"closed": 0, "pinged": 0, "lost": 0, "failed": 0}


@pytest.mark.parametrize("as_json", [False, True])
def test_a_sweep_that_fails_for_a_session_fails_as_a_whole_and_ends_the_others(console, peer, recorded_peer, as_json):
    away = recorded_peer("python")
    console.add_server("away", away.url)
    console.app.conf.mcp_session_ttl_seconds = 0.01
    handle, left = console.open_session(), console.open_session("away")
    wait_until(lambda: all(record.deadline < time.time() for record in console.store.sessions()))
    away.answer(http_method="DELETE", status=503)
    outcome = console.run("reap", *["--json"] * as_json, exit_code=1)
    counts = json.dumps({"closed": 1, "pinged": 0, "lost": 0, "failed": 1}, indent=2)
    assert outcome.stdout.strip() == (counts if as_json else "closed 1, pinged 0, lost 0, failed 1")
    assert outcome.stderr.splitlines()[-1] == "Error: Neither ended nor pinged: 1; workers try these again"
    assert not is_alive(handle, peer.url)
    assert [record.short_id for record in console.store.sessions()] == [left.short_id]


def test_a_sweep_that_the_store_ends_early_fails(console, peer, valkey):
    console.app.conf.mcp_session_ttl_seconds = 0.01
    console.open_session()
    wait_until(lambda: console.store.has_due({"peer": ""}))
    with Redis.from_url(valkey) as client:
        client.acl_setuser("looks", enabled=True, passwords=["+s3cret"], keys=["*"], commands=["+@all", "-hset"])
        try:
            console.app.conf.mcp_store_url = valkey.replace("redis://", "redis://looks:s3cret@")
            console.secrets.append("s3cret")
            assert "The store did not answer" in console.run("reap", exit_code=1).stderr
        finally:
            client.acl_deluser("looks")
    assert peer.methods().count("DELETE") == 0


# -- The store


def test_without_a_store_commands_say_which_setting_names_one(console):
    console.app.conf.mcp_store_url = ""
    for command in (["sessions"], ["show", "abc"], ["close", "--all"], ["reap"]):
        assert "mcp_store_url" in console.fails(*command)


def test_a_store_that_does_not_answer_is_told_in_one_sentence_without_its_password(console):
    console.app.conf.mcp_store_url = f"redis://:s3cret@127.0.0.1:{free_port()}"
    console.secrets.append("s3cret")
    for command in (["sessions"], ["show", "abc"], ["close", "--all", "-y"], ["reap"]):
        text = console.fails(*command)
        assert "The store did not answer" in text
        assert text.count("\n") == 0


def test_a_wrong_setting_of_the_store_is_told(console):
    console.app.conf.mcp_store_url = "http://nowhere"
    assert "mcp_store_url starts with redis://" in console.fails("sessions")


# -- servers


def test_servers_are_listed_with_those_of_tasks_and_without_credentials(console):
    console.secrets += ["s3cret", "t0ken"]
    console.add_server("web", "https://user:s3cret@web.example/mcp?key=s3cret", headers={"Authorization": "t0ken"})
    console.app.conf.mcp_servers["local"] = {"command": "npx"}
    console.app.conf.mcp_servers["plain"] = "http://plain.example/mcp"

    def run(self):
        pass

    for name, server in (("one", "http://u:s3cret@other.example/mcp"), ("two", "unheard-of")):
        console.app.task(base=MCPTask, bind=True, name=name, mcp_server=server, shared=False)(run)
    rows = [re.split(r"  +", line) for line in console.run("servers").stdout.splitlines()]
    assert rows[0] == ["server", "url", "headers", "connect", "read", "keepalive", "problem"]
    assert rows[1] == ["web", "https://web.example/mcp", "Authorization", "5s", "5m 0s", "5m 0s"]
    assert (rows[2][0], rows[2][1][:36]) == ("local", "MCP server 'local' is a stdio server")
    assert rows[3][:2] == ["plain", "http://plain.example/mcp"]
    assert rows[4][:2] == ["http://other.example/mcp"] * 2
    assert rows[5][0] == "unheard-of"
    assert "is not in mcp_servers" in rows[5][1]

    web, local, *_ = console.json("servers")
    assert (web["server"], web["headers"], web["error"]) == ("web", ["Authorization"], None)
    assert web["read_timeout_seconds"] == 300
    assert "stdio" in local["error"]


def test_an_app_without_servers_says_so_and_a_setting_that_is_no_mapping_is_told(console):
    assert "There are no servers" in console.run("servers").stdout
    assert console.json("servers", "--check") == []
    console.app.conf.mcp_servers = ["http://somewhere"]
    assert "mcp_servers is a mapping" in console.fails("servers")


def test_a_check_shows_what_each_server_does_and_fails_for_one_that_cannot_be_used(console, peer):
    console.add_server("nowhere", f"http://127.0.0.1:{free_port()}/mcp")
    console.app.conf.mcp_servers["local"] = {"command": "npx"}
    checked = console.run("servers", "--check", exit_code=1)
    rows = [re.split(r"  +", line) for line in checked.stdout.splitlines()]
    header = ["server", "reachable", "protocol", "era", "session", "event store", "tools", "latency", "problem"]
    assert rows[0] == header
    assert rows[1][:6] == ["peer", "yes", "2025-11-25", "handshake", "yes", "yes"]
    assert int(rows[1][6]) > 8
    assert re.fullmatch(r"[\d.]+ms", rows[1][7])
    assert rows[2][:2] == ["nowhere", "no"]
    assert "could not be reached" in rows[2][2]
    assert rows[3][:2] == ["local", "no"]
    assert "2 servers cannot be used: nowhere, local" in checked.stderr
    assert peer.methods()[-1] == "DELETE"

    found = {server["server"]: server for server in console.json("servers", "--check", exit_code=1)}
    assert found["peer"]["reachable"]
    assert found["peer"]["era"] == "handshake"
    assert found["peer"]["url"] == peer.url
    assert not found["nowhere"]["reachable"]


# -- call


def test_a_tool_is_called_in_a_session_for_the_one_call(console, peer):
    assert console.run("call", "peer", "add", '{"a": 1, "b": 2}').stdout == "3\n"
    assert peer.methods()[-1] == "DELETE"
    assert console.json("call", peer.url, "add", '{"a": 1, "b": 2}')["structuredContent"] == {"result": 3}
    assert console.run("call", "peer", "executions").stdout.strip().isdigit()


def test_a_tool_is_called_in_a_session_of_a_handle_which_stays_open(console, peer):
    handle = console.open_session()
    console.run("call", "peer", "set_variable", '{"name": "x", "value": "red"}', "--session", handle.dumps())
    read = console.run("call", "peer", "get_variable", '{"name": "x"}', "--session", "-", stdin=handle.dumps())
    assert read.stdout == "red\n"
    assert is_alive(handle, peer.url)
    console.run("close", handle.short_id)
    lost = console.fails("call", "peer", "get_variable", '{"name": "x"}', "--session", handle.dumps())
    assert "no longer knows session" in lost
    assert "not readable" in console.fails("call", "peer", "add", "--session", "{")


def test_a_call_that_fails_says_why(console, peer):
    console.add_server("nowhere", f"http://127.0.0.1:{free_port()}/mcp")
    failed = console.fails("call", "peer", "fail")
    assert failed.startswith("Error: Tool 'fail' of server 'peer' failed: ")
    assert failed.endswith("it failed")
    assert console.json("call", "peer", "fail", exit_code=1)["isError"]
    peer.answer(
        status=400,
        rpc_method="tools/call",
        body=b'{"jsonrpc": "2.0", "id": null, "error": {"code": -32602, "message": "not like this"}}',
    )
    assert "refused to call tool 'add': not like this" in console.fails("call", "peer", "add")
    assert "Tool 'no_such' of server 'peer' failed" in console.fails("call", "peer", "no_such")
    assert "is not in mcp_servers (configured: nowhere, peer)" in console.fails("call", "elsewhere", "add")
    assert "could not be reached" in console.fails("call", "nowhere", "add")
    assert "this is not JSON" in console.fails("call", "peer", "add", "{a: 1}", exit_code=2)
    assert "arguments are a JSON object" in console.fails("call", "peer", "add", "[1]", exit_code=2)


def test_what_is_no_text_is_named_and_structured_content_stands_in_for_none(console, peer):
    from mcp_types import CallToolResult, ImageContent, TextContent

    from mcp_celery.cli import _texts

    image = ImageContent(data="", mimeType="image/png")
    assert _texts(CallToolResult(content=[TextContent(text="a"), image])) == ["a", "[image; see --json]"]
    assert _texts(CallToolResult(content=[], structuredContent={"a": 1})) == ['{"a": 1}']


# -- As a program


def celery(*arguments, env=None, check=True):
    """Run `celery *arguments*` as its users do."""
    path = os.pathsep.join([str(HERE), os.environ.get("PYTHONPATH", "")])
    command = [sys.executable, "-W", "error", "-m", "celery", *arguments]
    env = {**os.environ, "PYTHONPATH": path, **(env or {})}
    return subprocess.run(command, capture_output=True, text=True, check=check, env=env, cwd=HERE, timeout=60)


@pytest.fixture
def environment(valkey, peer):
    return {"STORE": valkey, "PEER": peer.url}


def test_the_commands_are_those_of_celery(console, peer, environment):
    handle = console.open_session()
    listed = celery("-A", "commanded", "mcp", "sessions", "--json", env=environment)
    assert json.loads(listed.stdout)[0]["session"] == handle.short_id
    assert listed.stderr == ""
    closed = celery("-A", "commanded", "mcp", "close", handle.short_id, env=environment)
    assert (closed.stdout, closed.stderr) == ("Closed 1 session.\n", "")
    unknown = celery("-A", "commanded", "mcp", "show", "ffff", env=environment, check=False)
    assert unknown.returncode == 1
    assert unknown.stderr.startswith("Error: There is no session with this hash")
    nowhere = celery("-A", "commanded", "mcp", "call", "peer", "fail", env=environment, check=False)
    assert (nowhere.returncode, nowhere.stdout) == (1, "")


HELP = """
import sys
from celery.bin.celery import celery
celery(["--help"], standalone_mode=False)
print(sorted({"mcp", "mcp_types", "httpx2", "anyio", "pydantic", "mcp_celery.reaper"} & set(sys.modules)))
"""


def test_help_lists_the_commands_and_loads_nothing_of_mcp():
    run = subprocess.run([sys.executable, "-W", "error", "-c", HELP], capture_output=True, text=True, check=True)
    assert "mcp      MCP sessions of workflows, and MCP servers." in run.stdout
    assert run.stdout.splitlines()[-1] == "[]"
    assert run.stderr == ""


def test_inspect_shows_the_sessions_that_a_worker_holds_open(environment, start_worker, monkeypatch):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    worker = start_worker("commanded", "one", env=environment)
    celery("-A", "commanded", "call", "commanded.wait", "-a", "[300]", env=environment)

    def held():
        answer = celery("-A", "commanded", "inspect", "mcp_sessions", "--json", env=environment).stdout
        return next(iter(json.loads(answer).values()))

    (session,) = wait_until(held, 20, "the task to hold a session")
    assert (session["server"], session["task"], session["state"]) == ("peer", "commanded.wait", "open")
    assert re.fullmatch("[0-9a-f]{8}", session["session"])
    worker.kill()
