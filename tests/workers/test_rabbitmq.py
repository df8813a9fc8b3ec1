"""Real workers with RabbitMQ as broker. All queues and exchanges are a test's own: the virtual host may be shared."""

import gc
import importlib
import json
import os
import sys
from contextlib import contextmanager, nullcontext, suppress
from socket import gethostname
from urllib.parse import urlsplit

import pytest
from broker_settings import CONTROL_QUEUE_STAYS_FREE
from celery import chain, chord, uuid
from celery.bin.base import CLIContext
from chaos.tcp_relay import TcpRelay
from click.testing import CliRunner
from conftest import HERE, Project
from kombu import Connection
from peers.recorder import Recorder
from processes import wait_until
from redis import Redis
from test_chain import CALL, HANDSHAKE, calls_and_handshake
from test_durable import Durable, calls_of
from worker_process import Worker

from mcp_celery.cli import mcp

VARIABLE = "MCP_CELERY_TEST_AMQP_URL"
URL = os.environ.get(VARIABLE, "")
DATABASE = 12
#: Long, for a worker that has lost its broker comes back after some seconds.
SECONDS = 60

pytestmark = [
    pytest.mark.amqp,
    pytest.mark.skipif(not URL, reason=f"{VARIABLE} names no RabbitMQ; `.ci/rabbitmq start` prints the URL of one"),
]


class OnRabbitMQ:
    """An app as a publisher sees it, and its workers. The names of its queues and exchanges begin as no others do."""

    def __init__(self, project, env, folder, **conf):
        self.prefix = f"mcp_celery-{uuid()}"
        self.workers = []
        self._folder = folder
        self._queues = {self.queue("common")}
        self._conf = {
            "broker_url": URL,
            "broker_transport_options": {},
            "task_default_queue": self.queue("common"),
            "control_exchange": self.queue("control"),
            "event_exchange": self.queue("events"),
            **CONTROL_QUEUE_STAYS_FREE,
            "broker_connection_retry_on_startup": True,
            **conf,
        }
        self._env = {**env, "PROJECT": project, "CONF": json.dumps(self._conf)}
        with pytest.MonkeyPatch.context() as patch:
            for name, value in self._env.items():
                patch.setenv(name, value)
            patch.syspath_prepend(str(HERE))
            for name in (project, "on_rabbitmq"):
                sys.modules.pop(name, None)
            importlib.import_module("on_rabbitmq")
            self.tasks = sys.modules[project]
        self.app = self.tasks.app

    def queue(self, name):
        return f"{self.prefix}.{name}"

    def on(self, signature, name):
        """The signature, for a queue of this test."""
        self._queues.add(self.queue(name))
        return signature.set(queue=self.queue(name))

    def start_worker(self, name, *options, **conf):
        """Start a worker with its own queue and the common one; *conf* is its own configuration."""
        self._queues.add(self.queue(name))
        worker = Worker(
            "on_rabbitmq",
            name,
            "-Q",
            f"{self.queue(name)},{self.queue('common')}",
            *options,
            folder=HERE,
            log_path=self._folder / f"{name}-{uuid()}.log",
            env={**self._env, "CONF": json.dumps(self._conf | conf)},
        )
        self.workers.append(worker)
        return worker

    def messages(self):
        """How many messages wait in the queues."""
        with Connection(URL) as connection:
            count = 0
            for queue in self._queues:
                with suppress(connection.channel_errors), connection.channel() as channel:
                    count += channel.queue_declare(queue, passive=True).message_count
            return count

    def close(self):
        """Kill the workers, close what the publisher has open, and delete what is at the broker.

        But for the queues by which Celery delays messages, which all apps in a virtual host share.
        """
        for worker in self.workers:
            worker.kill()
        gc.collect()  # results unsubscribe when they are collected, for which the server has to be there
        consumer = self.app.backend.result_consumer
        consumer.stop()
        if hasattr(consumer, "subscribed_to"):
            consumer.subscribed_to.clear()
        self.app.close()
        control = self._conf["control_exchange"]
        with Connection(URL) as connection, connection.channel() as channel:
            for queue in self._queues:
                channel.queue_delete(queue)
            for exchange in (*self._queues, f"{control}.pidbox", f"reply.{control}.pidbox", self.queue("events")):
                channel.exchange_delete(exchange)


class StoredProject(Project):
    """`project` with RabbitMQ as broker. With a result backend in a Redis, its store is there."""

    def __init__(self, rabbit, recorder):
        super().__init__(rabbit.tasks, rabbit.workers, recorder)
        self.on = rabbit.on
        self.queue = rabbit.queue

    def celery(self, *arguments):
        """Run `celery mcp *arguments --json` and return what it writes."""
        context = CLIContext(self.app, no_color=True, workdir=None)
        result = CliRunner().invoke(mcp, [*arguments, "--json"], obj=context, catch_exceptions=False)
        assert result.exit_code == 0, result.output
        assert password(URL) not in result.output
        return json.loads(result.stdout)


class DurableOnRabbitMQ(Durable):
    """`durable` with RabbitMQ as broker: `a` reaches it by a relay, `b` does not."""

    def __init__(self, rabbit, relay, peers, recorders):
        super().__init__(rabbit.tasks, peers, recorders, {}, None)
        self.workers = rabbit.workers
        self.on = rabbit.on
        self.queue = rabbit.queue
        self.relay = relay
        self._rabbit = rabbit

    def start_worker(self, name, *options, **conf):
        if name != "b":
            conf |= {"broker_url": through(self.relay)}
        return self._rabbit.start_worker(name, *options, **conf)

    def get(self, result):
        return result.get(timeout=SECONDS)

    def has_messages(self):
        return self._rabbit.messages() > 0


def password(url):
    """What of a URL no log may show, as it is written there."""
    return f":{urlsplit(url).password or 'guest'}@"


def through(relay):
    """The URL of the broker by way of a relay."""
    parts = urlsplit(URL)
    user, _, _ = parts.netloc.rpartition("@")
    return parts._replace(netloc=f"{user}@127.0.0.1:{relay.port}" if user else f"127.0.0.1:{relay.port}").geturl()


@contextmanager
def running(*arguments, **conf):
    """An app and its workers, as `OnRabbitMQ` takes them. None of these may log the password of the broker."""
    rabbit = OnRabbitMQ(*arguments, **conf)
    try:
        yield rabbit
    finally:
        rabbit.close()
    assert not [worker.name for worker in rabbit.workers if password(URL) in worker.log()]


def shown(project):
    """Have a test use it, and show what its workers have logged where the test fails."""
    project.begin()
    try:
        yield project
    finally:
        for name, log in project.logs().items():
            print(f"--- worker {name}\n{log}")


@pytest.fixture(scope="module")
def peer(session_peers):
    return session_peers.shared("python", "--event-store")


@pytest.fixture(scope="module")
def redis(valkey_server):
    url = f"{valkey_server.connection_url}/{DATABASE}"
    with Redis.from_url(url) as client:
        client.flushdb()
    return url


@pytest.fixture(scope="module")
def two_workers(peer, redis, tmp_path_factory):
    with Recorder(peer.url) as recorder:
        env = {"BROKER": redis, "PEER": recorder.url, "HISTORY": "60"}
        servers = {"peer": {"url": recorder.url}, "second": {"url": recorder.url, "keepalive_seconds": 0.5}}
        with running("project", env, tmp_path_factory.mktemp("rabbitmq"), mcp_servers=servers) as rabbit:
            for name in "ab":
                rabbit.start_worker(name, "-l", "DEBUG")
            yield StoredProject(rabbit, recorder)


@pytest.fixture
def stored(two_workers):
    """Two workers at level DEBUG, with results and the store in a Redis."""
    yield from shown(two_workers)


@pytest.fixture
def storeless(peer, record, tmp_path):
    """Two workers without any Redis: results are messages."""
    recorder = record(peer.url)
    env = {"BROKER": URL, "PEER": recorder.url}
    with running("project", env, tmp_path, result_backend="rpc://", mcp_store_url=None) as rabbit:
        for name in "ab":
            rabbit.start_worker(name)
        yield from shown(StoredProject(rabbit, recorder))


@pytest.fixture
def quorum(peer, redis, record, tmp_path):
    """A worker whose queues are quorum queues, by which also delayed messages go."""
    recorder = record(peer.url)
    kinds = dict.fromkeys(("task_default_queue_type", "task_create_missing_queue_type"), "quorum")
    with running("project", {"BROKER": redis, "PEER": recorder.url}, tmp_path, **kinds) as rabbit:
        rabbit.start_worker("a")
        yield from shown(StoredProject(rabbit, recorder))


@pytest.fixture(scope="module")
def durable_app(peer, redis, tmp_path_factory):
    broker = urlsplit(URL)
    with Recorder(peer.url) as recorder, TcpRelay(broker.port or 5672, broker.hostname) as relay:
        env = {"BROKER": redis, "SERVERS": json.dumps({"store": (recorder.url, ("python", "--event-store"))})}
        with running("durable", env | {"LEASE": "2"}, tmp_path_factory.mktemp("durable")) as rabbit:
            yield DurableOnRabbitMQ(rabbit, relay, {"store": peer}, {"store": recorder})
            rabbit.tasks.redis.close()


@pytest.fixture
def durable(durable_app):
    """Two workers of durable tasks."""
    durable_app.workers[:] = [worker for worker in durable_app.workers if worker.running]
    for name in {"a", "b"} - {worker.name for worker in durable_app.workers}:
        durable_app.start_worker(name)
    yield from shown(durable_app)


# With a store


def test_a_chain_over_two_workers_has_one_session_that_is_ended_once(stored):
    t, on = stored.tasks, stored.on
    rows = stored.run(
        chain(on(t.remember.s([], "x", "1"), "a"), on(t.tag.s(), "b"), on(t.recall.s("x"), "b")), timeout=SECONDS
    )
    assert [row if row == "plain" else row["worker"][0] for row in rows] == ["a", "plain", "b"]
    assert rows[2]["value"] == "1"
    assert calls_and_handshake(stored.sessions_closed()) == [*HANDSHAKE, CALL, CALL, "DELETE"]


def test_members_and_body_of_a_chord_share_the_session_of_the_step_before(stored):
    t, on = stored.tasks, stored.on
    members = [on(t.recall.si([], "x"), name) for name in "abab"]
    workflow = chain(on(t.remember.si([], "x", "1"), "a"), chord(members, on(t.gather.s(), "b")))
    value, parts = stored.run(workflow, timeout=SECONDS)
    assert (value, [row["value"] for (row,) in parts]) == ("1", ["1"] * 4)
    assert calls_and_handshake(stored.sessions_closed()) == [*HANDSHAKE, *[CALL] * 6, "DELETE"]


def test_a_session_that_waits_in_a_queue_is_kept_alive_and_known_to_the_commands(stored):
    t, on = stored.tasks, stored.on
    result = chain(on(t.add_second.s(1, 2), "a"), on(t.add_second.s(3), "nobody")).delay()
    stored.recorder.wait_for(lambda _: stored.recorder.methods().count("POST ping") >= 2, SECONDS)
    (session,) = stored.celery("sessions")
    assert list(session["holders"].values()) == ["project.add_second"]

    stored.app.control.add_consumer(stored.queue("nobody"), destination=[f"b@{gethostname()}"])
    assert result.get(timeout=SECONDS) == 6
    stored.sessions_closed()
    assert stored.celery("show", session["session"])["events"][-1]["what"] == "closed"
    assert len(stored.recorder.session_ids) == 1


# Without a store


def test_without_any_redis_a_chain_keeps_its_session_and_ends_it_once(storeless):
    t, on = storeless.tasks, storeless.on
    rows = storeless.run(
        chain(on(t.remember.s([], "x", "1"), "a"), on(t.tag.s(), "b"), on(t.recall.s("x"), "b")), timeout=SECONDS
    )
    assert rows[2]["value"] == "1"
    assert calls_and_handshake(storeless.sessions_closed()) == [*HANDSHAKE, CALL, CALL, "DELETE"]

    storeless.begin()
    with pytest.raises(ValueError, match="wrong"):
        storeless.run(chain(on(t.remember.s([], "x", "1"), "a"), on(t.fails.si("wrong"), "b")), timeout=SECONDS)
    assert calls_and_handshake(storeless.sessions_closed()) == [*HANDSHAKE, CALL, CALL, "DELETE"]


# Quorum queues


def test_in_quorum_queues_a_session_outlives_a_delay_and_a_killed_process(quorum):
    t, on = quorum.tasks, quorum.on
    later = on(t.recall.s("x"), "a").set(countdown=1)
    rows = quorum.run(chain(on(t.remember.s([], "x", "1"), "a"), later), timeout=SECONDS)
    assert rows[1]["value"] == "1"
    assert calls_and_handshake(quorum.sessions_closed()) == [*HANDSHAKE, CALL, CALL, "DELETE"]

    quorum.begin()
    dies = on(t.ends_once.s("kill"), "a")
    assert quorum.run(chain(on(t.add.s(1, 1), "a"), dies, on(t.add.s(1), "a")), timeout=SECONDS) == 3
    assert calls_and_handshake(quorum.sessions_closed()) == [*HANDSHAKE, *[CALL] * 4, "DELETE"]


# Durable tasks


def assert_called_once(durable, result):
    assert durable.get(result)["texts"] == ["first", "done", "last"]
    durable.assert_ended()
    assert calls_of(durable.recorder()) == {"first": 1, "slow": 1, "last": 1}


def test_the_call_of_a_process_that_was_killed_goes_on_in_another_one(durable):
    before = durable.executions("store")
    result = durable.tasks.works.delay("store", "within")
    assert_called_once(durable, result)
    assert len(durable.runs(result)) == 2
    assert durable.executions("store") == before + 1


def test_the_call_of_a_worker_that_was_killed_goes_on_in_another_one(durable):
    before = durable.executions("store")
    result = durable.on(durable.tasks.works.s("store", seconds=1), "common").delay()
    durable.wait_until_under_way(result)
    ((name, _),) = durable.runs(result)
    durable.worker_of(name).kill()
    assert_called_once(durable, result)
    assert len({worker for worker, _ in durable.runs(result)}) == 2
    assert durable.executions("store") == before + 1


@contextmanager
def consuming_too(durable, queue):
    """Have `b` consume the queue of another worker as well."""
    to_b = {"destination": [f"b@{gethostname()}"], "reply": True, "limit": 1}
    control = durable.app.control
    wait_until(lambda: control.add_consumer(durable.queue(queue), **to_b), SECONDS, "another consumer")
    try:
        yield
    finally:
        control.cancel_consumer(durable.queue(queue), **to_b)


@pytest.mark.parametrize("heir", ["a", "b"])
def test_a_message_that_comes_again_since_its_worker_has_lost_the_broker_has_nothing_to_do(durable, heir):
    result = durable.on(durable.tasks.works.s("store", seconds=1.5), "a").delay()
    durable.wait_until_under_way(result)
    with nullcontext() if heir == "a" else consuming_too(durable, "a"):
        assert durable.relay.cut() > 0
        refused = "goes no further here: The task has ended before"
        wait_until(lambda: refused in durable.logs()[heir], SECONDS, "the message that comes again to have no effect")
        assert_called_once(durable, result)
    assert len(durable.runs(result)) == 1, "only one has come to the function"
    assert durable.logs()[heir].count(f"works[{result.id}] received") == (2 if heir == "a" else 1)


def test_a_run_that_is_cancelled_since_its_worker_has_lost_the_broker_goes_on_in_another_one(durable):
    worker = durable.start_worker("c", worker_cancel_long_running_tasks_on_connection_loss=True)
    before = durable.executions("store")
    result = durable.on(durable.tasks.works.s("store", seconds=1.5), "c").delay()
    durable.wait_until_under_way(result)
    with consuming_too(durable, "c"):
        assert durable.relay.cut() > 0
        assert_called_once(durable, result)
    assert [name[0] for name, _ in durable.runs(result)] == ["c", "b"]
    assert durable.executions("store") == before + 1
    worker.kill()
