"""Two workers on one recorded server, for all tests here that need no more."""

import importlib
import re
import sys
from pathlib import Path

import pytest
from peers.recorder import Recorder
from processes import wait_until
from redis import ConnectionError, Redis  # noqa: A004 - as redis-py calls it
from signatures import Steps
from worker_process import Worker

from mcp_celery import SessionHandle
from mcp_celery.settings import ServerSettings
from mcp_celery.sync_session import new_session

HERE = Path(__file__).parent


class Project:
    """The app as a publisher sees it, and two workers that run it: `a` and `b`, each with a queue, and one for both."""

    def __init__(self, app_module, workers, recorder):
        self.tasks = app_module
        self.app = app_module.app
        self.workers = workers
        self.recorder = recorder
        self._marks = {}

    def close(self):
        """Kill the workers, and close what the publisher has open."""
        for worker in self.workers:
            worker.kill()
        consumer = self.app.backend.result_consumer
        consumer.stop()
        consumer.subscribed_to.clear()  # or results unsubscribe when they are collected, perhaps too late
        self.app.close()

    def begin(self):
        """Forget what was recorded and logged so far."""
        self.recorder.clear()
        self._marks = {worker.name: len(worker.log()) for worker in self.workers}

    def logs(self):
        """What the workers have logged since `begin`, by name."""
        return {worker.name: worker.log()[self._marks.get(worker.name, 0) :] for worker in self.workers}

    def run(self, signature, timeout=60):
        """Send a workflow and return its result, once the session of its last step has ended."""
        return signature.apply_async().get(timeout=timeout)

    def sessions_closed(self, count=1):
        """Wait until *count* DELETEs have been answered; return the names of all requests."""
        self.recorder.wait_for(lambda _: self.deleted() >= count)
        return self.recorder.methods()

    def deleted(self):
        return sum(exchange.method == "DELETE" and exchange.ended is not None for exchange in self.recorder.exchanges)

    def set_variable(self, session_id, name, value):
        """Set a variable of a session from outside of all workflows."""
        info = {"name": "peer", "version": "1"}
        negotiated = {"protocolVersion": "2025-11-25", "capabilities": {"tools": {}}, "serverInfo": info}
        handle = SessionHandle("peer", session_id, negotiated)
        session = new_session(ServerSettings(name="peer", url=self.recorder.url), handle)
        session.call_tool("set_variable", {"name": name, "value": value})
        session.release()

    def stored(self):
        """The keys of the store, each with its time to live, without those that tell of workers."""
        with Redis.from_url(self.app.conf.broker_url, decode_responses=True) as client:
            names = [name for name in client.keys("{mcp_celery}*") if not re.search(":leader:|:tasks$", name)]
            return {name: client.ttl(name) for name in names}

    def forget_stored(self):
        """Empty the store of the one session that a test leaves in it by intention."""
        assert len([name for name in self.stored() if ":session:" in name]) == 1
        self.empty_store()

    def empty_store(self):
        """Forget all sessions, so that what one test leaves behind fails no other."""
        with Redis.from_url(self.app.conf.broker_url) as client:
            if stored := self.stored():
                client.delete(*stored)

    def idle(self):
        """Wait until no worker has anything to do."""
        inspect = self.app.control.inspect(timeout=0.3, limit=len(self.workers))

        def is_idle():
            try:
                active, reserved = inspect.active() or {}, inspect.reserved() or {}
            except ConnectionError:  # of the pool that projects on one broker share; another one was closed meanwhile
                return False
            return len(active) == len(self.workers) and not any([*active.values(), *reserved.values()])

        wait_until(is_idle, 20, "the workers to be idle")

    def rest(self):
        """Wait until nothing is in the queues of the workers, and none of them has anything to do."""
        with Redis.from_url(self.app.conf.broker_url) as client:
            queues = [*(worker.name for worker in self.workers), self.app.conf.task_default_queue]
            wait_until(lambda: not any(client.llen(queue) for queue in queues), 20, "empty queues")
        self.idle()


def start_project(peer_url, broker, folder, environment=None, options=(), module="project", names=("a", "b")):
    """Start workers of `project` on the server at *peer_url*; the module is imported here as well."""
    env = {"BROKER": broker, "PEER": peer_url, **(environment or {})}
    workers = [
        Worker(
            module,
            name,
            "-Q",
            f"{name},common",
            "-E",
            *options,
            folder=HERE,
            log_path=folder / f"{name}.log",
            env=env,
        )
        for name in names
    ]
    with pytest.MonkeyPatch.context() as patch:
        for name, value in env.items():
            patch.setenv(name, value)
        patch.syspath_prepend(str(HERE))
        sys.modules.pop("project", None)
        sys.modules.pop(module, None)
        return importlib.import_module(module), workers


@pytest.fixture(scope="session")
def peer_project(session_peers, valkey_server, tmp_path_factory):
    peer = session_peers.shared("python", "--event-store")
    with Recorder(peer.url) as recorder:
        broker = f"{valkey_server.connection_url}/1"
        module, workers = start_project(recorder.url, broker, tmp_path_factory.mktemp("workers"))
        project = Project(module, workers, recorder)
        yield project
        project.close()


@pytest.fixture
def project(peer_project):
    """Two idle workers, and a recorder that has seen nothing yet. What they log is shown with a failure.

    Nothing may be left in the store at the end of a test.
    """
    peer_project.begin()
    yield peer_project
    for name, log in peer_project.logs().items():
        print(f"--- worker {name}\n{log}")
    try:
        wait_until(lambda: not peer_project.stored(), what=f"an empty store; it has {peer_project.stored()}")
    finally:
        peer_project.empty_store()


@pytest.fixture
def s(project):
    """Signatures of the tasks of the project, on its two workers in turn."""
    return Steps(project.tasks)
