"""Workflows whose steps run on separate hosts, with Redis as broker, backend and store."""

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
from celery import chain
from hosts import CALL, HANDSHAKE, PATIENCE_SECONDS, Redis, wait_until

from mcp_celery import SessionLostError

#: How soon another worker takes over what a lost one has begun.
SOON = {"DURABLE": "yes", "VISIBILITY": "6", "LEASE": "3"}


@pytest.fixture
def on_redis(network, start):
    """`on_redis(**env)` returns `Hosts` with a Redis."""

    def start_on_redis(**env):
        redis = network.run(Redis, image=Redis.image(), port="6379/tcp")
        return start(redis, redis, env=env)

    return start_on_redis


def test_a_chain_over_separate_hosts_keeps_one_session_with_one_handshake_and_one_delete(on_redis):
    hosts = on_redis()
    a, b = hosts.add_workers("a", "b")
    steps = [hosts.step("remember", "soup", on="a"), hosts.step("recall", on="b"), hosts.step("recall", on="a")]
    rows = hosts.get(chain(steps).apply_async())
    assert [row["worker"] for row in rows] == [a.hostname(), b.hostname(), a.hostname()]
    assert [row["value"] for row in rows] == ["soup"] * 3
    assert len({row["session"] for row in rows}) == 1
    hosts.assert_each_session_is_ended_once(1)
    assert hosts.requests() == [*HANDSHAKE, CALL, CALL, CALL, "DELETE"]


def test_a_call_on_a_host_that_is_killed_is_finished_by_another_host_and_executed_once(on_redis):
    hosts = on_redis(**SOON)
    hosts.assert_another_host_takes_over(lambda worker: worker.kill())
    assert hosts.executed() == {"before call": 1, "call": 1}
    hosts.assert_each_session_is_ended_once(1)


def test_a_host_without_network_loses_nothing_and_works_again_when_it_is_back(on_redis):
    on_redis(**SOON).assert_lost_host_comes_back()


def test_a_restart_of_the_mcp_server_loses_the_sessions_under_way_and_no_later_one(on_redis):
    hosts = on_redis()
    _, b = hosts.add_workers("a", "b")
    result = chain(hosts.step("remember", "soup", on="a"), hosts.step("recall", on="late")).apply_async()
    hosts.get(result.parent)
    hosts.server.restart()
    hosts.app.control.add_consumer("late", destination=[b.hostname()], reply=True, timeout=30, limit=1)
    with pytest.raises(SessionLostError):
        hosts.get(result)
    assert hosts.requests() == [*HANDSHAKE, CALL, CALL]

    rows = hosts.get(chain(hosts.step("remember", "tea", on="a"), hosts.step("recall", on="b")).apply_async())
    assert [row["value"] for row in rows] == ["tea", "tea"]
    wait_until(lambda: hosts.deleted() == hosts.sessions()[1:], PATIENCE_SECONDS, "the DELETE of the second session")


def test_a_restart_of_redis_loses_no_workflow(on_redis):
    hosts = on_redis(DURABLE="yes", VISIBILITY="10")
    hosts.add_workers("a", "b")
    steps = [hosts.step("remember", "soup", on="a"), hosts.step("hold", "call", on="b"), hosts.step("recall", on="a")]
    result = chain(steps).apply_async()
    hosts.wait_until_executed("call")
    hosts.broker.container.restart()
    hosts.server.open_gate("call")
    assert [row["value"] for row in hosts.get(result)] == ["soup", "call", "soup"]
    assert hosts.executed() == {"before call": 1, "call": 1}
    hosts.assert_each_session_is_ended_once(1)


def test_a_rolling_restart_of_all_workers_under_load_loses_nothing(on_redis):
    # A worker that stops may give back the message of a task that it has ended (celery/celery#3802).
    hosts = on_redis(DURABLE="yes")
    workers = hosts.add_workers("a", "b", "c")
    results, replaced = [], threading.Event()

    def publish():
        number = str(len(results))
        steps = [hosts.step("remember", number), hosts.step("mark", number), hosts.step("recall")]
        results.append(chain(steps).apply_async())

    def load():
        while not replaced.is_set():
            publish()
            wait_until(lambda: sum(not result.ready() for result in results[-30:]) < 6, PATIENCE_SECONDS, "results")

    with ThreadPoolExecutor(1) as threads:
        loading = threads.submit(load)
        try:
            for worker, queue in zip(workers, "def", strict=True):
                more = len(results) + 10
                wait_until(lambda more=more: len(results) > more, PATIENCE_SECONDS, "more workflows")
                hosts.stop(worker)
                hosts.add_workers(queue)
        finally:
            replaced.set()
        loading.result()
    publish()

    for number, result in enumerate(results):
        assert [row["value"] for row in hosts.get(result)] == [str(number)] * 3
    assert hosts.executed() == {str(number): 1 for number in range(len(results))}
    hosts.assert_each_session_is_ended_once(len(results))
    assert {row["worker"] for row in results[-1].get()}.isdisjoint(worker.hostname() for worker in workers)
