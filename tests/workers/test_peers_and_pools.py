"""The main job on every kind of server, with children that are replaced, and through every serializer."""

from itertools import pairwise

import pytest
from calls import PEERS
from celery import chain
from conftest import Project, start_project
from test_chain import CALL, HANDSHAKE, calls_and_handshake, on

from mcp_celery.settings import ServerSettings
from mcp_celery.sync_session import new_session

#: server-everything has no variables to share; it has a test of its own.
SERVERS = [peer for peer in PEERS if peer != ("everything",)]


@pytest.fixture
def start(start_peer, record, valkey_server, tmp_path):
    """`start(peer, environment=None, options=())` returns a project of its own, its workers with all warnings on."""
    projects = []

    def start(peer, environment=None, options=()):
        recorder = record(start_peer(*peer).url)
        broker = f"{valkey_server.connection_url}/3"
        module, workers = start_project(
            recorder.url,
            broker,
            tmp_path,
            {"PEER_KIND": peer[0], "PYTHONWARNINGS": "default", **(environment or {})},
            options,
        )
        projects.append(Project(module, workers, recorder))
        return projects[-1]

    yield start
    for project in projects:
        project.close()


def chain_keeps_its_session(project):
    t = project.tasks
    rows = project.run(on(chain(t.remember.s([], "x", "1"), t.recall.s("x"), t.recall.s("x")), "a", "b", "a"))
    assert [row["worker"][0] for row in rows] == ["a", "b", "a"]
    assert len({row["session"] for row in rows}) == 1
    assert [row["value"] for row in rows[1:]] == ["1", "1"]
    assert calls_and_handshake(project.sessions_closed()) == [*HANDSHAKE, *[CALL] * 3, "DELETE"]
    return rows


@pytest.mark.parametrize("server", SERVERS, ids=" ".join)
def test_a_chain_over_two_workers_keeps_its_session(start, server):
    chain_keeps_its_session(start(server))


def test_a_chain_keeps_its_session_on_server_everything(start):
    project = start(("everything",))
    t = project.tasks
    rows = project.run(on(chain(t.echoes.s([]), t.echoes.s(), t.echoes.s()), "a", "b", "a"))
    assert len({row["session"] for row in rows}) == 1
    assert [row["text"] for row in rows] == ["Echo: 0", "Echo: 1", "Echo: 2"]
    assert calls_and_handshake(project.sessions_closed()) == [*HANDSHAKE, *[CALL] * 3, "DELETE"]


@pytest.mark.parametrize(
    ("options", "handshake"),
    [(("--stateless",), HANDSHAKE), (("--modern-only",), ["POST initialize", "POST server/discover"])],
    ids=["stateless", "modern-only"],
)
def test_a_server_without_sessions_is_negotiated_with_once(start, options, handshake):
    project = start(("python", *options))
    t = project.tasks
    rows = project.run(on(chain(t.echoes.s([]), t.echoes.s(), t.echoes.s()), "a", "b", "a"))
    assert [row["session_id"] for row in rows] == [None, None, None]
    assert [row["resumed"] for row in rows] == [False, True, True]
    project.idle()
    assert calls_and_handshake(project.recorder.methods()) == [*handshake, *[CALL] * 3]


@pytest.mark.parametrize("serializer", ["pickle", "msgpack"])
def test_handles_travel_in_other_serializers(start, serializer):
    project = start(("python",), {"SERIALIZER": serializer, "C_FORCE_ROOT": "1"})
    rows = chain_keeps_its_session(project)
    assert len(rows) == 3
    t = project.tasks
    steps = chain(t.remember.s([], "x", "1"), t.tag.s(), t.recall.s("x"))
    assert project.run(on(steps, "a", "b", "a"))[2]["value"] == "1"


@pytest.mark.parametrize("option", ["--max-tasks-per-child", "--max-memory-per-child"])
def test_children_that_are_replaced_after_each_task_keep_the_session(start, option):
    project = start(("python",), options=("-P", "prefork", "-c", "1", option, "1"))  # one task, or one KiB
    t = project.tasks
    steps = chain(t.remember.s([], "x", "1"), *[t.recall.s("x") for _ in range(5)])
    rows = project.run(on(steps, "a", "b", "a", "b", "a", "b"), timeout=30)  # each child loads the SDK anew
    assert len({row["pid"] for row in rows}) == 6
    assert len({row["session"] for row in rows}) == 1
    assert calls_and_handshake(project.sessions_closed()) == [*HANDSHAKE, *[CALL] * 6, "DELETE"]


def test_two_workers_on_one_session_never_see_each_others_answers(start):
    project = start(("python",))
    t = project.tasks
    session = new_session(ServerSettings(name="peer", url=project.recorder.url))
    session.open()
    handle = session.handle
    runs = [t.overlapping.apply_async((queue, 300), {"mcp_session": handle}, queue=queue) for queue in ("a", "b")]
    for run, queue in zip(runs, ("a", "b"), strict=True):
        answers = run.get(timeout=60)
        assert [question for question, _ in answers] == [f"{queue}-{number}" for number in range(300)]
        assert all(question == answer for question, answer in answers)
    calls = [exchange for exchange in project.recorder.exchanges if exchange.rpc_method == "tools/call"]
    assert len(calls) == 600
    assert len({exchange.rpc_id for exchange in calls}) == 600
    assert {exchange.session_id for exchange in calls} == {handle.session_id}
    spans = sorted((exchange.started, exchange.ended) for exchange in calls)
    assert any(later[0] < earlier[1] for earlier, later in pairwise(spans))
    session.close()
    assert project.sessions_closed()[-1] == "DELETE"
