"""Where a session ID must not show: logs at DEBUG, events, results, `celery inspect`, signals, error texts."""

import threading

import pytest
from celery import chain, group
from conftest import Project, start_project
from peers.recorder import Recorder
from processes import wait_until
from test_chain import on

from mcp_celery import SessionHandle
from mcp_celery.settings import ServerSettings
from mcp_celery.sync_session import new_session


@pytest.fixture
def loud_project(start_peer, valkey_server, tmp_path):
    """A project whose workers log at DEBUG."""
    with Recorder(start_peer("python").url) as recorder:
        module, workers = start_project(
            recorder.url, f"{valkey_server.connection_url}/2", tmp_path, options=("-l", "DEBUG")
        )
        project = Project(module, workers, recorder)
        yield project
        project.close()


class Events(threading.Thread):
    """Collects all task events of the workers, and those of publishers."""

    def __init__(self, app):
        super().__init__(daemon=True)
        self.seen = []
        self._connection = app.connection_for_read()
        self._receiver = app.events.Receiver(self._connection, handlers={"*": self.seen.append})

    def run(self):
        self._receiver.capture(limit=None, timeout=None, wakeup=True)

    def __enter__(self):
        self.start()
        wait_until(lambda: any(event["type"] == "worker-heartbeat" for event in self.seen), 20, "an event")
        return self

    def __exit__(self, *exc_info):
        self._receiver.should_stop = True
        self.join(10)
        self._connection.release()


def _replies(inspect):
    return (inspect.scheduled() or {}).values()


def test_a_session_id_is_nowhere_but_on_the_wire(loud_project, valkey_server):
    project, t = loud_project, loud_project.tasks
    app = project.app
    with Events(app) as events:
        shapes = [
            on(chain(t.remember.s([], "x", "1"), t.tag.s(), t.recall.s("x")), "a", "b", "a"),
            on(chain(t.flaky.s(5, 2), t.add.s(1)), "a", "b"),
            on(chain(t.replaced_by_chain.s(1), t.add.s(1)), "a", "b"),
        ]
        for shape in shapes:
            project.run(shape)
        with pytest.raises(ValueError, match="1"):
            project.run(on(chain(t.add.s(0, 1), t.fails.s()), "a", "b"))
        with pytest.raises(RuntimeError):
            project.run(on(chain(t.add.s(0, 1), t.flaky.s(99)), "a", "b"))
        project.recorder.answer(rpc_method="tools/call", status=404, body=b"")
        with pytest.raises(Exception, match="no longer knows"):
            project.run(t.add.s(1, 1))
        never_run = [
            chain(t.add.s(0, 1), t.breaks.s(), ahead)
            for ahead in (
                t.recall.si([], "x"),
                group(t.recall.si([], "x"), t.recall.si([], "x")),
                chain(group(t.plus_one.si(1), t.recall.si([], "x")), t.total.s(), t.add.s(1)),
                t.add.starmap([(1, 1)]),
            )
        ]
        for shape in never_run:
            shape.apply_async()
        session = new_session(ServerSettings(name="peer", url=project.recorder.url))
        session.call_tool("set_variable", {"name": "kept", "value": "yes"})
        kept = session.detach()
        waiting = t.recall.apply_async(([], "kept"), {"mcp_session": kept}, countdown=8, queue="a")
        as_text = app.send_task("project.sees_request", (), {"mcp_session": kept.dumps()}, queue="b")
        assert kept.short_id in as_text.get(timeout=60)
        inspect = app.control.inspect(timeout=2)
        inspected = wait_until(
            lambda: str(inspect.scheduled()) if any(_replies(inspect)) else "", 8, "a scheduled task"
        )
        assert kept.short_id in inspected
        waiting.get(timeout=60)
        project.sessions_closed(10)
        wait_until(lambda: sum(e["type"] == "task-succeeded" for e in events.seen) >= 9, what="the events")

    with valkey_server.client() as client:
        client.select(2)
        stored = [client.get(key) for key in client.keys("celery-task-meta-*")]
    assert len(stored) >= 10
    assert any(b'"kwargs"' in value for value in stored)

    logs = [worker.log() for worker in project.workers]
    assert all("TaskPool: Apply" in log for log in logs)
    assert "left out: it holds a session ID" in str(logs)
    secrets = [kept.session_id, *project.recorder.session_ids]
    assert len(set(secrets)) >= 7
    # The publisher's own event shows what the publisher wrote: the README says to give a handle, not its text.
    events_of_workers = [e for e in events.seen if (e["type"], e.get("name")) != ("task-sent", "project.sees_request")]
    places = {"logs": str(logs), "events": str(events_of_workers), "inspect": inspected, "results": str(stored)}
    for name, text in places.items():
        for secret in secrets:
            around = text[max(0, text.find(secret) - 300) :][:400]
            assert secret not in text, f"a session ID is in the {name}: ...{around}"


def test_repr_of_signatures_and_handles_holds_no_session_id(project):
    handle = SessionHandle("peer", "very-secret", {"protocolVersion": "2025-11-25"}, {"pin": "cookie-secret"})
    signature = project.tasks.add.s(1, 2, mcp_session=handle)
    for text in (repr(handle), str(handle), repr(signature), str(chain(signature, signature)), f"{handle}"):
        assert "very-secret" not in text
        assert "cookie-secret" not in text
    assert handle.short_id in repr(handle)
