"""`tool`: signatures of a ready-made task, what they give, and what is said of a call that cannot be right."""

import json
import subprocess
import sys

import pytest
from celery import Celery, chain, chord, current_app, group, signature
from mcp_types import CallToolResult, ImageContent, TextContent

from mcp_celery import ConfigurationError, MCPTask, SessionHandle, SessionHandleError, ToolError, TransportError, tool
from mcp_celery.listings import problem_with_arguments
from mcp_celery.testing import eager_sessions
from mcp_celery.tools import result_of, unwrapped


@pytest.fixture
def app_on():
    """`app_on(url)` returns an app in which all tasks are eager; the current one, as a project has it."""
    before = current_app._get_current_object()
    apps = []

    def new(url):
        app = Celery("tools", broker="memory://", backend="cache+memory://")
        app.conf.update(mcp_servers={"peer": {"url": url}, "local": {"command": "x"}}, task_always_eager=True)
        apps.append(app)
        return app

    yield new
    before.set_current()
    for app in apps:
        app.close()


@pytest.fixture
def recorder(recorded_peer):
    return recorded_peer("python")


@pytest.fixture
def app(recorder, app_on):
    app = app_on(recorder.url)

    @app.task(base=MCPTask, bind=True, shared=False, mcp_server="peer", name="recall")
    def recall(self, *_):
        return self.mcp.call_tool("get_variable", {"name": "x"}).content[0].text

    return app


# -- The signature


def test_a_tool_is_an_ordinary_signature_that_survives_json():
    step = tool("peer", "echo", text="x").set(queue="slow")
    assert (step.task, step.args, step.options) == ("mcp_celery.tool", (), {"queue": "slow"})
    for again in (signature(json.loads(json.dumps(step))), step.clone()):
        assert (again.task, dict(again.kwargs), again.options) == (step.task, dict(step.kwargs), step.options)
    assert step.freeze(_id="given").id == "given"
    assert (step | tool("peer", "fail")).tasks[1].kwargs["tool"] == "fail"


def test_arguments_with_the_names_of_options_go_into_a_mapping():
    step = tool("peer", "echo", {"into": 1, "timeout": 2, "mcp_session": 3}, server=4, name=5, arguments=6)
    expected = {"into": 1, "timeout": 2, "mcp_session": 3, "server": 4, "name": 5, "arguments": 6}
    assert step.kwargs == {"server": "peer", "tool": "echo", "arguments": expected}


def test_a_url_in_the_place_of_a_name_is_refused_and_not_shown():
    with pytest.raises(ConfigurationError, match="put the URL there") as caught:
        tool("https://user:secret@host/mcp", "echo")
    assert "secret" not in str(caught.value)


def test_an_argument_is_given_or_the_previous_result_and_not_both():
    with pytest.raises(ConfigurationError, match="'text' of tool 'echo' is given"):
        tool("peer", "echo", text="x", into="text")


def test_every_app_has_the_task():
    one, other = (Celery(name, broker="memory://", set_as_current=False) for name in ("one", "other"))
    assert one.tasks["mcp_celery.tool"].app is one
    assert other.tasks["mcp_celery.tool"].app is other
    for app in (one, other):
        assert chain(tool("peer", "echo", text="x"), tool("peer", "echo", into="text"), app=app).app is app
        app.close()


def test_task_annotations_set_the_options_of_the_task():
    app = Celery("annotated", broker="memory://", set_as_current=False)
    app.conf.task_annotations = {"mcp_celery.tool": {"acks_late": True, "mcp_durable": True}}
    task = app.tasks["mcp_celery.tool"]
    assert (task.acks_late, task.mcp_durable) == (True, True)
    app.close()


# -- What it gives


def test_a_workflow_of_tools_and_tasks_shares_one_session(app, recorder):
    with eager_sessions(app):
        assert tool("peer", "echo", text="x").apply_async().get() == {"result": "x"}
        steps = chain(tool("peer", "set_variable", name="x", value="1"), app.tasks["recall"].s())
        assert (steps | tool("peer", "echo", into="text")).apply_async().get() == {"result": "1"}
        assert (steps | tool("peer", "echo", text="dropped")).apply_async().get() == {"result": "dropped"}
    names = recorder.methods()
    assert [names.count(name) for name in ("POST initialize", "POST tools/list", "DELETE")] == [1, 1, 1]


def test_members_of_a_header_give_their_results_to_the_argument_of_the_body(recorded_peer, app_on):
    recorder = recorded_peer("typescript")
    app = app_on(recorder.url)
    with eager_sessions(app):
        members = [tool("peer", "add", a=number, b=1) for number in range(3)]
        assert group(members).apply_async().get() == [{"result": 1}, {"result": 2}, {"result": 3}]
        # Checked by the server: a list is no text.
        with pytest.raises(ToolError, match="text"):
            chord(members, tool("peer", "echo", into="text")).apply_async().get()


def test_the_result_is_structured_content_else_text_else_all_blocks():
    text, image = TextContent(text="a"), ImageContent(data="aGk=", mime_type="image/png")
    assert result_of(CallToolResult(content=[text], structured_content={"b": 1})) == {"b": 1}
    assert result_of(CallToolResult(content=[text, text])) == "a\na"
    assert result_of(CallToolResult(content=[])) == ""
    assert result_of(CallToolResult(content=[text, image])) == [
        {"type": "text", "text": "a"},
        {"type": "image", "data": "aGk=", "mimeType": "image/png"},
    ]


def test_a_session_of_another_server_is_refused(app, recorder):
    handle = SessionHandle("other", "id", {"protocolVersion": "2025-11-25"})
    with pytest.raises(SessionHandleError, match=r"of server 'other', and task mcp_celery\.tool uses peer"):
        tool("peer", "echo", text="x", mcp_session=handle).apply_async()
    assert recorder.methods() == []


# -- What cannot be right


@pytest.mark.parametrize(
    ("step", "problem"),
    [
        (tool("peer", "add", a=1, c=2), r"'add' takes no argument c and needs b\. Its arguments: a, b"),
        (tool("peer", "add", a=1), r"'add' needs b\. Its arguments: a, b"),
        (tool("peer", "fail", why="so"), r"'fail' takes no argument why\. Its arguments: none"),
        (tool("peer", "ecco", text="x"), "there is no tool 'ecco'; there are, for instance, echo"),
        (tool("peer", "zzzz"), "there are, for instance, add, announce, ask_model"),
        (tool("peer", "echo", into="text"), "no results came"),
        (tool("pear", "echo"), r"MCP server 'pear' is not in mcp_servers \(configured: local, peer\)"),
        (tool("local", "echo"), "stdio"),
    ],
)
def test_a_call_that_cannot_be_right_is_not_made_and_the_error_says_what_would_be(app, recorder, step, problem):
    with eager_sessions(app), pytest.raises(ConfigurationError, match=problem):
        step.apply_async().get()
    assert "POST tools/call" not in recorder.methods()


@pytest.mark.parametrize("peer", [("typescript",), ("python", "--modern-only"), ("python", "--stateless")], ids=str)
def test_arguments_are_checked_against_every_kind_of_server_with_one_listing(recorded_peer, app_on, peer):
    recorder = recorded_peer(*peer)
    app = app_on(recorder.url)
    with eager_sessions(app):
        assert tool("peer", "add", a=1, b=2).apply_async().get() == {"result": 3}
        assert tool("peer", "add", a=1, b=3).apply_async().get() == {"result": 4}
        assert recorder.methods().count("POST tools/list") == 1
        with pytest.raises(ConfigurationError, match=r"Its arguments: a, b"):
            tool("peer", "add", a=1, bb=2).apply_async().get()
        assert recorder.methods().count("POST tools/list") == 2
        assert recorder.methods().count("POST tools/call") == 2


def test_a_listing_that_fails_leaves_the_server_to_judge(app, recorder):
    recorder.answer(status=500, rpc_method="tools/list")
    with eager_sessions(app), pytest.raises(ToolError, match=r"(?s)b.*[Ff]ield required"):
        tool("peer", "add", a=1).apply_async().get()
    assert "POST tools/call" in recorder.methods()


def test_a_timeout_ends_the_call(app):
    with eager_sessions(app), pytest.raises(TransportError, match=r"within 0\.2 s"):
        tool("peer", "slow", steps=100, seconds=0.1, timeout=0.2).apply_async().get()


A, B = {"a": {}}, {"a": {}, "b": {}}


@pytest.mark.parametrize(
    ("schema", "problem"),
    [
        ({"properties": A}, "tool 't' takes no argument x. Its arguments: none; optional: a"),
        ({"properties": {}}, "tool 't' takes no argument x. Its arguments: none"),
        ({"additionalProperties": False}, "tool 't' takes no argument x. Its arguments: none"),
        (
            {"properties": B, "required": ["a"]},
            "tool 't' takes no argument x and needs a. Its arguments: a; optional: b",
        ),
        ({"properties": A, "additionalProperties": False, "allOf": []}, "tool 't' takes no argument x."),
        ({"type": "object"}, None),
        ({"properties": A, "additionalProperties": True}, None),
        ({"properties": A, "additionalProperties": {"type": "string"}}, None),
        ({"properties": A, "additionalProperties": False, "patternProperties": {"^x": {}}}, None),
        ({"properties": A, "oneOf": [{"properties": {"x": {}}}]}, None),
        ({"properties": A, "additionalProperties": True, "required": ["a"]}, "tool 't' needs a. Its arguments: a"),
        (None, None),
        ("no schema", None),
    ],
)
def test_names_are_judged_by_what_the_schema_leaves_open(schema, problem):
    said = problem_with_arguments([{"name": "t", "inputSchema": schema}], "t", {"x": 1})
    assert said == problem if said is None or problem is None else said.startswith(problem)


def test_without_any_tools_the_error_says_so():
    assert problem_with_arguments([], "t", {}) == "there is no tool 't'; there are, for instance, none"


PLAIN_APP = """
from types import SimpleNamespace
from celery import Celery
from mcp_celery.bootstep import ReaperStep
import mcp_celery
app = Celery("plain", broker="memory://", backend="redis://127.0.0.1:9")
assert "mcp_celery.tool" in app.tasks
worker = SimpleNamespace(app=app)
print(ReaperStep(worker).include_if(worker))
app.conf.mcp_servers = {"peer": {"url": "http://127.0.0.1:9/mcp"}}
print(ReaperStep(worker).include_if(worker))
"""


def test_workers_of_an_app_without_servers_look_after_no_sessions():
    # In a process of its own: other tests may have tasks that all apps share.
    done = subprocess.run([sys.executable, "-c", PLAIN_APP], capture_output=True, text=True, timeout=60, check=False)
    assert done.stdout.split() == ["False", "True"], done.stderr


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (lambda: tool("peer", "add", [1, 2]), "are a mapping"),
        (lambda: tool("peer", "add", {"a": 1}, a=2, b=3), "Given twice to tool 'add': a"),
        (lambda: tool("peer", "add", timeout="soon"), "timeout is a number of seconds"),
    ],
)
def test_what_cannot_be_right_is_refused_where_it_is_written(make, text):
    with pytest.raises(ConfigurationError, match=text):
        make()


@pytest.mark.parametrize(
    ("result", "bound"),
    [
        ({"result": 3}, 3),
        ([{"result": 3}, "text"], [3, "text"]),
        ({"result": 3, "more": 4}, {"result": 3, "more": 4}),
        ("text", "text"),
    ],
)
def test_a_plain_value_that_a_server_has_wrapped_is_bound_as_it_was(result, bound):
    assert unwrapped(result) == bound
