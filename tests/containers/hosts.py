"""An app on separate hosts: broker, backend, workers and MCP server, each a container of its own on one network."""

import io
import json
import tarfile
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from typing import Any
from uuid import uuid4

from celery.canvas import Signature, chain
from docker import DockerClient
from processes import free_port
from processes import wait_until as wait_often
from pytest_celery import (
    CeleryBackendCluster,
    CeleryBrokerCluster,
    CeleryTestContainer,
    CeleryTestSetup,
    CeleryTestWorker,
    CeleryWorkerCluster,
    CeleryWorkerContainer,
    RabbitMQContainer,
    RabbitMQTestBroker,
    RedisContainer,
    RedisTestBackend,
    RedisTestBroker,
)

HANDSHAKE = ["POST initialize", "POST notifications/initialized"]
CALL = "POST tools/call"
#: For containers to start, and for what a server is to see, on a machine that has other things to do.
PATIENCE_SECONDS = 120


def wait_until(predicate, timeout, what):
    """Poll as rarely as asking an engine of containers asks for."""
    return wait_often(predicate, timeout, what, pause=0.25)


class Published:
    """On a port of this machine that stays when the container is restarted."""

    attrs: dict[str, Any]

    @property
    def port(self) -> int:
        ((binding,),) = self.attrs["HostConfig"]["PortBindings"].values()
        return int(binding["HostPort"])


class Redis(Published, RedisContainer):
    """Keeps what it holds over a restart."""

    @classmethod
    def image(cls):
        return "redis:8-alpine"

    @classmethod
    def command(cls, *args, **_):
        return ["--save", "", "--appendonly", "yes", *args]


class RabbitMQ(Published, RabbitMQContainer):
    @classmethod
    def image(cls):
        return "rabbitmq:4"

    @classmethod
    def command(cls, *_, **__):
        return None  # that of the image


class Worker(CeleryWorkerContainer):
    """A worker of `hosted_steps`, on two processes."""

    @classmethod
    def worker_name(cls):
        return "worker"

    @classmethod
    def command(cls, *args, **_):
        name = ["-n", f"{cls.worker_name()}@%h"]
        return ["celery", "-A", "hosted_steps", "worker", "-l", "DEBUG", "-c", "2", *name, *args]


class Server(CeleryTestContainer):
    """`recorded_server`: what the tests ask for beside MCP goes through its files."""

    @classmethod
    def command(cls, *_, **__):
        return ["python", "recorded_server.py"]

    def ready(self):
        return super().ready() and "8000" in self.get_open_tcp_ports()

    @property
    def url(self):
        return f"http://{self.id[:12]}:8000/mcp"

    def log(self):
        """What was asked of it, and what it has executed, over all its restarts."""
        (text,) = self.get_text("/tmp/log.jsonl").values()  # noqa: S108 - in the container
        return [json.loads(line) for line in text.splitlines()]

    def open_gate(self, marker):
        """Let the call of `hold` with this *marker* end."""
        assert self.exec_run(["touch", f"/tmp/gates/{marker}"]).exit_code == 0  # noqa: S108 - as above


class Network:
    """The containers of one test; they see each other by the first 12 digits of their IDs."""

    def __init__(self, client: DockerClient, image: str) -> None:
        self._client = client
        self._image = image
        self._network = client.networks.create(f"mcp-celery-tests-{uuid4().hex[:12]}")
        self.containers: list[CeleryTestContainer] = []

    def run(self, kind, *options, image=None, port=None, environment=None, files=None):
        """Start a container of this *kind*; *port* is published. `files(host name)` are put there, by their paths."""
        container = self._client.containers.create(
            image or self._image,
            kind.command(*options),
            environment=environment,
            network=self._network.name,
            ports={port: ("127.0.0.1", free_port())} if port else None,
        )
        self.containers.append(kind(container))
        if files:
            container.put_archive("/", archive(files(container.id[:12])))
        container.start()
        return self.containers[-1]

    def cut(self, node):
        """Take a host from the network, as where its cable is pulled."""
        self._network.disconnect(node.container.id)

    def mend(self, node):
        self._network.connect(node.container.id)

    def raw(self, node):
        """The container of *node* as `docker` has it."""
        return self._client.containers.get(node.container.id)

    def logs(self):
        """What each container has printed."""
        return {f"{type(each).__name__} {each.id[:12]}": each.logs() for each in self.containers}

    def remove(self):
        """Remove the containers, what they keep, and the network."""

        def remove(container):
            self._client.containers.get(container.id).remove(force=True, v=True)

        try:
            with ThreadPoolExecutor() as threads:  # each takes a second
                list(threads.map(remove, self.containers))
        finally:
            self._network.remove()


def archive(files: dict[str, bytes]) -> bytes:
    """A tar file of these *files*, which everybody may read."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for path, content in files.items():
            info = tarfile.TarInfo(path)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return buffer.getvalue()


class Hosts(CeleryTestSetup):
    """An app whose broker is a *broker*; a Redis beside it, where there is one, has what `STORE` and results want.

    The publisher is the test: it has no tasks, and sends by name.
    """

    def __init__(self, network, broker, redis=None, *, results=None, env=None, files=None):
        self.network = network
        self.server = network.run(Server)
        brokers = CeleryBrokerCluster((RabbitMQTestBroker if isinstance(broker, RabbitMQ) else RedisTestBroker)(broker))
        backends = CeleryBackendCluster(RedisTestBackend(redis)) if redis and results is None else None
        for container in filter(None, (self.server, broker, redis)):
            wait_until(container.ready, PATIENCE_SECONDS, "a container to be ready")
        self._files = files
        self._config = {
            "celery_broker_cluster_config": brokers.config(),
            "celery_backend_cluster_config": backends and backends.config(),
        }
        self._env = {"SERVER": self.server.url, "VISIBILITY": "3600", "LEASE": "15", **(env or {})}
        self._results = {} if results is None else {"CELERY_RESULT_BACKEND": results}
        config = self.config(self._config) | ({} if results is None else {"result_backend": results})
        super().__init__(None, brokers, backends, self.create_setup_app(config, "publisher"))

    def add_workers(self, *queues):
        """Start a worker for each of these *queues*, which takes from the one for all as well."""
        env = Worker.initial_env(self._config, self._env) | self._results
        options = ("--without-gossip", "--without-mingle", "-Q")
        containers = [
            self.network.run(Worker, *options, f"{queue},celery", environment=env, files=self._files)
            for queue in queues
        ]
        workers = [CeleryTestWorker(container, self.app) for container in containers]
        for worker in workers:
            wait_until(worker.ready, PATIENCE_SECONDS, "a worker to be ready")
        self._worker_cluster = CeleryWorkerCluster(*(self.worker_cluster or ()), *workers)
        return workers

    def stop(self, worker):
        """Stop a host as who maintains it does: the worker finishes what it has begun."""
        raw = self.network.raw(worker)
        raw.stop(timeout=300)
        assert raw.wait()["StatusCode"] == 0

    def step(self, name, *args, on="celery") -> Signature:
        return self.app.signature(f"hosted_steps.{name}", args, queue=on)

    def get(self, result):
        return result.get(timeout=PATIENCE_SECONDS)

    # What the server has seen

    def wait_for(self, predicate, what):
        """Wait until a line of the server's log satisfies *predicate*."""
        wait_until(lambda: any(map(predicate, self.server.log())), PATIENCE_SECONDS, what)

    def wait_until_executed(self, marker):
        self.wait_for(lambda line: line.get("executed") == marker, f"{marker} to be executed")

    def wait_until_continued(self):
        """Wait until somebody asks for the rest of a call."""
        self.wait_for(lambda line: line.get("request") == "GET", "a GET")

    def executed(self):
        """How often each marker was executed."""
        return Counter(line["executed"] for line in self.server.log() if "executed" in line)

    def requests(self):
        """All requests in short, without the listings of tools."""
        names = [line["request"] for line in self.server.log() if "request" in line]
        return [name for name in names if name != "POST tools/list"]

    def sessions(self):
        return [line["session"] for line in self.server.log() if line.get("request") == "POST initialize"]

    def deleted(self):
        return [line["session"] for line in self.server.log() if line.get("request") == "DELETE"]

    def assert_each_session_is_ended_once(self, count):
        wait_until(lambda: len(self.deleted()) >= count, PATIENCE_SECONDS, f"{count} DELETEs")
        assert len(self.sessions()) == count
        assert sorted(self.deleted()) == sorted(self.sessions())

    # What a worker's host goes through

    def assert_another_host_takes_over(self, lose):
        """Have *lose* take a host away in the middle of a call; another one finishes it. Return the workers of both."""
        (a,) = self.add_workers("a")
        steps = [self.step("remember", "soup"), self.step("hold", "call"), self.step("recall")]
        result = chain(steps).apply_async()
        self.wait_until_executed("call")
        (b,) = self.add_workers("b")
        lose(a)
        self.wait_until_continued()
        self.server.open_gate("call")
        rows = self.get(result)
        assert [row["worker"] for row in rows] == [a.hostname(), b.hostname(), b.hostname()]
        assert [row["value"] for row in rows] == ["soup", "call", "soup"]
        return a, b

    def assert_lost_host_comes_back(self):
        """Cut a host off in the middle of a call, which another one finishes; once it is back, it works again."""
        a, b = self.assert_another_host_takes_over(self.network.cut)
        self.network.mend(a)
        rows = self.get(chain(self.step("remember", "tea", on="a"), self.step("recall", on="b")).apply_async())
        assert [row["worker"] for row in rows] == [a.hostname(), b.hostname()]
        assert rows[1]["value"] == "tea"
        self.assert_each_session_is_ended_once(2)
        assert self.executed() == {"before call": 1, "call": 1}

    # The end

    def assert_no_log_holds(self, secrets):
        assert secrets
        for name, log in self.network.logs().items():
            for secret in secrets:
                around = log[max(0, log.find(secret) - 300) :][:400]
                assert secret not in log, f"a secret is in the log of {name}: ...{around}"

    def teardown(self):
        self.app.backend.result_consumer.stop()
        self.app.close()
