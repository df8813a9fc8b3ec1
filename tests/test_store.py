"""The holders of a session with several branches, on a real Valkey."""

import pytest
from processes import free_port

from mcp_celery.exceptions import StoreError
from mcp_celery.store import TTL_SECONDS, RedisStore


@pytest.fixture
def store(valkey):
    return RedisStore(valkey)


def test_whoever_leaves_last_finds_nobody(store):
    assert store.pass_on("s", [], ["a", "b"]) == 2
    assert store.pass_on("s", ["a"], ["c"]) == 2
    assert store.pass_on("s", ["b"], []) == 1
    assert store.pass_on("s", ["c"], []) == 0


def test_leaving_twice_changes_nothing(store):
    store.pass_on("s", [], ["a", "b"])
    assert store.pass_on("s", ["a"], []) == 1
    assert store.pass_on("s", ["a"], []) == 1


def test_a_replacement_under_the_same_name_stays_a_holder(store):
    store.pass_on("s", [], ["a", "b"])
    assert store.pass_on("s", ["a"], ["a"]) == 2


def test_sessions_are_counted_apart(store):
    store.pass_on("s", [], ["a", "b"])
    store.pass_on("t", [], ["a", "b"])
    assert store.pass_on("s", ["a", "b"], []) == 0
    assert store.pass_on("t", ["a"], []) == 1


def test_a_session_that_the_store_has_forgotten_is_uncounted_from_then_on(store, valkey_server):
    store.pass_on("s", [], ["a", "b"])
    with valkey_server.client() as client:
        client.flushall()
    assert store.pass_on("s", ["a"], ["c"]) is None
    assert store.pass_on("s", ["c"], []) is None


def test_every_key_has_a_time_to_live_and_is_gone_with_its_last_holder(store, valkey_server):
    store.pass_on("s", [], ["a", "b"])
    with valkey_server.client() as client:
        (key,) = client.keys("*")
        assert key == b"mcp_celery:{s}:holders"
        assert TTL_SECONDS - 10 <= client.ttl(key) <= TTL_SECONDS
        store.pass_on("s", ["a", "b"], [])
        assert client.keys("*") == []


@pytest.mark.parametrize("query", ["", "?no_such_option=1", "?db=five"])
def test_a_store_that_cannot_be_used_says_so_in_one_way(query):
    with pytest.raises(StoreError, match="did not answer"):
        RedisStore(f"redis://:s3cret@127.0.0.1:{free_port()}{query}").pass_on("s", [], ["a"])


def test_the_store_shows_no_password():
    assert "s3cret" not in repr(RedisStore("redis://:s3cret@h"))
