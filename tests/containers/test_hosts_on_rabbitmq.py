"""Workflows whose steps run on separate hosts, with RabbitMQ as broker; the store is a Redis, or there is none."""

import pytest
from celery import chain, group
from hosts import CALL, HANDSHAKE, RabbitMQ, Redis


@pytest.fixture
def rabbitmq(network):
    return network.run(RabbitMQ, image=RabbitMQ.image(), port="5672/tcp")


@pytest.fixture
def redis(network):
    return network.run(Redis, image=Redis.image(), port="6379/tcp")


def test_with_rabbitmq_a_store_in_redis_counts_who_holds_a_session(rabbitmq, redis, start):
    hosts = start(rabbitmq, results="rpc://", env={"STORE": redis.url})
    a, b = hosts.add_workers("a", "b")
    members = group(hosts.step("recall", on="b"), hosts.step("recall", on="a"))
    rows = hosts.get(chain(hosts.step("remember", "soup", on="a"), members).apply_async())
    assert [[row["worker"] for row in branch] for branch in rows] == [
        [a.hostname(), b.hostname()],
        [a.hostname(), a.hostname()],
    ]
    assert {row["value"] for branch in rows for row in branch} == {"soup"}
    hosts.assert_each_session_is_ended_once(1)
    assert hosts.requests() == [*HANDSHAKE, CALL, CALL, CALL, "DELETE"]


def test_with_rabbitmq_and_no_store_a_chain_keeps_one_session_and_ends_it(rabbitmq, start):
    hosts = start(rabbitmq, results="rpc://")
    a, b = hosts.add_workers("a", "b")
    steps = [hosts.step("remember", "soup", on="a"), hosts.step("recall", on="b"), hosts.step("recall", on="a")]
    rows = hosts.get(chain(steps).apply_async())
    assert [row["worker"] for row in rows] == [a.hostname(), b.hostname(), a.hostname()]
    assert [row["value"] for row in rows] == ["soup"] * 3
    hosts.assert_each_session_is_ended_once(1)
    assert hosts.requests() == [*HANDSHAKE, CALL, CALL, CALL, "DELETE"]


def test_rabbitmq_gives_the_call_of_a_killed_host_to_another_at_once(rabbitmq, redis, start):
    hosts = start(rabbitmq, results="rpc://", env={"STORE": redis.url, "DURABLE": "yes", "LEASE": "3"})
    hosts.assert_another_host_takes_over(lambda worker: worker.kill())
    assert hosts.executed() == {"before call": 1, "call": 1}
    hosts.assert_each_session_is_ended_once(1)


def test_a_host_that_rabbitmq_has_lost_loses_nothing_and_works_again_when_it_is_back(rabbitmq, redis, start):
    hosts = start(rabbitmq, results="rpc://", env={"STORE": redis.url, "DURABLE": "yes", "LEASE": "3"})
    hosts.assert_lost_host_comes_back()


def test_a_restart_of_rabbitmq_loses_no_workflow(rabbitmq, redis, start):
    hosts = start(rabbitmq, redis, env={"DURABLE": "yes"})
    hosts.add_workers("a", "b")
    steps = [hosts.step("remember", "soup", on="a"), hosts.step("hold", "call", on="b"), hosts.step("recall", on="a")]
    result = chain(steps).apply_async()
    hosts.wait_until_executed("call")
    hosts.broker.container.restart()
    hosts.server.open_gate("call")
    assert [row["value"] for row in hosts.get(result)] == ["soup", "call", "soup"]
    assert hosts.executed() == {"before call": 1, "call": 1}
    hosts.assert_each_session_is_ended_once(1)
