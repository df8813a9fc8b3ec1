"""A worker that is told to end at once: what it gives back is done by another one, in the same session."""

import signal
from socket import gethostname

import psutil
import pytest
from celery import chain
from conftest import Project, start_project
from peers.recorder import Recorder
from processes import wait_until
from test_chain import on


@pytest.fixture(params=["0", "0.5"], ids=["cold", "soft"])
def ending(request, start_peer, valkey_server, tmp_path):
    """A project whose workers wait for their tasks not at all, or for half a second."""
    with Recorder(start_peer("python").url) as recorder:
        environment = {"SOFT_SHUTDOWN": request.param}
        broker = f"{valkey_server.connection_url}/8"
        project = Project(*start_project(recorder.url, broker, tmp_path, environment), recorder)
        yield project
        project.close()


def is_hanging(exchange):
    return exchange.rpc_method == "tools/call" and "hang" in str(exchange.rpc_params)


def end_at_once(worker):
    psutil.Process(worker.pid).send_signal(signal.SIGQUIT)
    wait_until(lambda: not worker.running, 20, "the end of a worker")


@pytest.mark.parametrize("opens", [False, True], ids=["session given", "session opened there"])
def test_a_task_that_is_delivered_again_after_a_shutdown_goes_on_in_its_session(ending, opens):
    project, t = ending, ending.tasks
    before = [] if opens else [t.add.s(1, 1)]
    step = t.ends_once.s(2, "hang") if opens else t.ends_once.s("hang")
    flow = chain(*before, step, t.add.s(3))
    on(flow, *(["b"] if before else []), "a", "b")
    result = flow.apply_async()
    project.recorder.wait_for(is_hanging)
    leaving, staying = project.workers
    end_at_once(leaving)
    assert project.recorder.methods().count("DELETE") == 0
    project.app.control.add_consumer("a", destination=[f"{staying.name}@{gethostname()}"])
    assert result.get(timeout=30) == 5
    methods = project.sessions_closed()
    assert (methods.count("POST initialize"), methods.count("DELETE"), methods[-1]) == (1, 1, "DELETE")
    assert len(project.recorder.session_ids) == 1
    wait_until(lambda: project.stored() == {}, what="an empty store")


def test_a_task_that_is_not_delivered_again_ends_its_session(ending):
    project, t = ending, ending.tasks
    on(chain(t.add.s(1, 1), t.ends.s("hang"), t.add.s(3)), "b", "a", "b").apply_async()
    project.recorder.wait_for(is_hanging)
    end_at_once(project.workers[0])
    methods = project.sessions_closed()
    assert (methods.count("DELETE"), methods[-1]) == (1, "DELETE")
