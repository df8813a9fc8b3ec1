"""The store on a real Valkey: who holds a session, who ends it, and what is remembered of it."""

import json
from dataclasses import replace
from itertools import count

import pytest
from processes import wait_until
from redis import Redis

from mcp_celery import redis_store
from mcp_celery.exceptions import StoreError
from mcp_celery.handle import SessionHandle
from mcp_celery.redis_store import ANNOUNCED_SECONDS, ENDING_SECONDS, KEPT_SECONDS, RedisStore
from mcp_celery.settings import StoreSettings
from mcp_celery.store import Change, Leaving, Standing

SECRET = "t0p-s3cret"  # noqa: S105 - looked for in what is stored and shown
NEGOTIATED = {"protocolVersion": "2025-11-25", "capabilities": {}}
DAY = 24 * 3600


def handle_of(number=1, *, shared=False):
    """The handle of one of the sessions of a test. Its ID begins with the secret."""
    return SessionHandle("peer", f"{SECRET}-{number}", NEGOTIATED, shared=shared)


S = handle_of(1)
T = handle_of(2)
#: Their server, wherever it is.
SERVERS = {"peer": ""}


def joining(*ids, **options):
    return Change(joining={task_id: f"task {task_id}" for task_id in ids}, **options)


def leaving(*ids, to=(), **options):
    return replace(joining(*to), leaving=ids, **options)


def held(*ids, **options):
    """These become the first to hold a session."""
    return joining(*ids, create=True, **options)


CLOSED = {"what": "closed", "at": 1.0, "by": "a@host", "why": "done"}


@pytest.fixture
def client(valkey):
    with Redis.from_url(valkey, decode_responses=True) as client:
        yield client


@pytest.fixture
def new_store(valkey, client):
    """`new_store(**settings)` returns a store on the Valkey of the test.

    What a test leaves there is checked: all keys have a time to live, and session IDs are in handles only.
    """
    yield lambda **settings: RedisStore(StoreSettings(url=valkey, **settings))
    for key, content in contents(client).items():
        assert 0 < client.pttl(key) <= 2 * DAY * 1000, f"{key} stays for ever"
        if ":session:" in key:
            assert content["v"] == "1"
            content.pop("handle", None)
        assert SECRET not in key + json.dumps(content)


@pytest.fixture
def store(new_store):
    return new_store()


def contents(client):
    """All that a Redis has, by key."""
    reads = {
        "hash": client.hgetall,
        "set": lambda key: sorted(client.smembers(key)),
        "zset": lambda key: client.zrange(key, 0, -1, withscores=True),
        "list": lambda key: client.lrange(key, 0, -1),
        "string": client.get,
    }
    return {key: reads[client.type(key)](key) for key in client.keys("*")}


def now(client):
    seconds, microseconds = client.time()
    return seconds + microseconds / 1e6


def record_of(store, handle=S):
    (record,) = store.find(handle.key)
    return record


# Who holds a session


def test_whoever_leaves_last_is_the_one_to_end_the_session(store):
    assert store.change(S, held("a", "b")) is Standing.HELD
    assert store.change(S, leaving("a", to=["c"])) is Standing.HELD
    assert store.change(S, leaving("b")) is Standing.HELD
    assert record_of(store).holders == {"c": "task c"}
    assert store.change(S, leaving("c")) is Standing.LAST
    assert record_of(store).state == "closing"


def test_leaving_twice_changes_nothing(store):
    store.change(S, held("a", "b"))
    assert store.change(S, leaving("a")) is Standing.HELD
    assert store.change(S, leaving("a")) is Standing.HELD
    assert record_of(store).holders == {"b": "task b"}


def test_several_leave_and_join_in_one_step(store):
    store.change(S, held("a", "never", "b"))
    assert store.change(S, leaving("a", "never", to=["c", "d"])) is Standing.HELD
    assert record_of(store).holders.keys() == {"b", "c", "d"}
    assert store.change(S, leaving("b", "c", "d")) is Standing.LAST


def test_a_replacement_under_the_same_id_stays_a_holder(store):
    store.change(S, held("a"))
    assert store.change(S, leaving("a", to=["a"])) is Standing.HELD
    assert store.held_by("a") == [S]
    assert store.change(S, leaving("a")) is Standing.LAST


def test_a_replacement_under_the_same_id_becomes_a_holder_where_its_task_was_not_counted(store):
    assert store.change(S, leaving("a", to=["a"], create=True)) is Standing.HELD
    assert record_of(store).holders == {"a": "task a"}
    assert store.change(S, leaving("a", create=True)) is Standing.LAST


def test_who_has_left_before_it_joined_does_not_join(store):
    """An errback may have ended when the task that calls it says so."""
    store.change(S, held("a"))
    assert store.change(S, leaving("errback")) is Standing.HELD
    assert store.change(S, leaving("a", to=["errback"])) is Standing.LAST


def test_who_has_joined_and_left_does_not_join_again(store):
    store.change(S, held("a"))
    assert store.change(S, leaving("a", to=["b"])) is Standing.HELD
    assert store.change(S, leaving("b", to=["c"])) is Standing.HELD
    assert store.change(S, leaving("a", to=["b"])) is Standing.HELD, "a was killed after that, and has run again"
    assert list(store.find(S.key)[0].holders) == ["c"]
    assert store.change(S, leaving("c")) is Standing.LAST


def test_who_has_left_for_a_replacement_may_join_again(store):
    store.change(S, held("a"))
    assert store.change(S, leaving("a", to=["first"], may_return=True)) is Standing.HELD
    assert store.change(S, leaving("a", to=["first"], may_return=True)) is Standing.HELD, "killed, and run again"
    assert store.change(S, leaving("first", to=["a"])) is Standing.HELD, "the last of the replacement has its ID"
    assert store.change(S, leaving("a")) is Standing.LAST


def test_of_two_that_join_only_the_one_that_has_left_already_does_not(store):
    store.change(S, held("a"))
    store.change(S, leaving("errback"))
    assert store.change(S, leaving("a", to=["errback", "b"])) is Standing.HELD
    assert record_of(store).holders == {"b": "task b"}


def test_sessions_are_counted_apart(store):
    for handle in (S, T):
        store.change(handle, held("a", "b"))
    assert store.change(S, leaving("a", "b")) is Standing.LAST
    assert store.change(T, leaving("a")) is Standing.HELD
    assert store.held_by("b") == [T]


def test_a_retry_neither_leaves_nor_joins_and_renews_the_session(new_store, client):
    new_store(session_ttl_seconds=10).change(S, held("a"))
    assert new_store(session_ttl_seconds=100).change(S, Change(events=[{"what": "step"}])) is Standing.HELD
    record = record_of(new_store())
    assert record.holders == {"a": "task a"}
    assert record.deadline == pytest.approx(now(client) + 100, abs=5)


def test_a_retry_of_whoever_has_ended_meanwhile_begins_nothing(store):
    assert store.change(S, Change()) is Standing.UNCOUNTED
    store.change(S, held("a"))
    store.change(S, leaving("a"))
    assert store.change(S, Change()) is Standing.ENDED
    store.ended(S.key, CLOSED)
    assert store.change(S, Change()) is Standing.ENDED
    assert record_of(store).state == "closed"


# What the store does not know


def test_a_session_that_the_store_does_not_know_is_uncounted(store, client):
    assert store.change(S, leaving("a", to=["b"])) is Standing.UNCOUNTED
    assert client.keys("*") == []


def test_a_session_that_was_flushed_is_uncounted_from_then_on(store, client):
    store.change(S, held("a", "b"))
    client.flushall()
    assert store.change(S, leaving("a", to=["c"])) is Standing.UNCOUNTED
    assert store.change(S, leaving("c")) is Standing.UNCOUNTED


def test_whoever_knows_all_holders_begins_to_count_anew(store, client):
    store.change(S, held("a"))
    client.flushall()
    assert store.change(S, leaving("a", to=["b", "c"], create=True)) is Standing.HELD
    assert store.change(S, leaving("b")) is Standing.HELD
    assert store.change(S, leaving("c")) is Standing.LAST


def test_a_session_that_nobody_else_holds_is_ended_by_its_holder_though_it_was_not_counted(store):
    assert store.change(S, leaving("a", create=True)) is Standing.LAST


# What becomes of a session that nobody holds


def test_a_session_that_somebody_ends_is_ended_by_nobody_else(store):
    store.change(S, held("a"))
    assert store.change(S, leaving("a")) is Standing.LAST
    assert store.change(S, leaving("a")) is Standing.ENDED
    assert store.change(S, joining("b")) is Standing.ENDED
    assert store.change(S, leaving("b")) is Standing.ENDED


def test_an_ended_session_has_no_holders_and_no_deadline_and_is_no_task_s_any_more(store, client):
    store.change(S, held("a", "b", opened_by={"task": "t", "id": "a", "worker": "a@host"}))
    store.change(S, leaving("a", "b"))
    store.ended(S.key, CLOSED)
    record = record_of(store)
    assert (record.state, record.holders, record.deadline) == ("closed", {}, None)
    assert record.ended_at == pytest.approx(now(client), abs=5)
    assert record.opened_by == {"task": "t", "id": "a", "worker": "a@host"}
    assert store.held_by("a") == store.held_by("b") == []
    assert store.change(S, held("c")) is Standing.ENDED
    assert SECRET not in json.dumps(contents(client))


def test_the_end_of_a_session_that_others_hold_frees_them_of_it(store):
    """`self.mcp.close()` in one branch of several."""
    store.change(S, held("a", "b", keepalive_seconds=0.001))
    wait_until(lambda: store.has_due(SERVERS))
    store.ended(S.key, CLOSED)
    assert not store.has_due(SERVERS)
    assert store.held_by("b") == []
    assert store.change(S, leaving("b", to=["c"])) is Standing.ENDED
    assert store.held_by("c") == []


def test_an_end_is_noted_once_and_only_of_a_known_session(store, client):
    store.ended(S.key, CLOSED)
    assert client.keys("*") == []
    store.change(S, held("a"))
    store.ended(S.key, CLOSED)
    store.ended(S.key, {**CLOSED, "by": "reaper"})
    assert store.history(S.key) == [CLOSED]


def test_a_detached_session_is_nobody_s_business(store, client):
    store.change(S, held("a"))
    assert store.change(S, leaving("a", when_empty=Leaving.DETACH)) is Standing.ENDED
    assert (record_of(store).state, record_of(store).deadline) == ("detached", None)
    assert list(store.sessions()) == []
    assert SECRET not in json.dumps(contents(client))


def test_a_detached_session_can_be_held_again(store, client):
    opened_by = {"task": "t", "id": "a", "worker": "a@host"}
    store.change(S, held("a", opened_by=opened_by))
    opened_at = record_of(store).opened_at
    assert opened_at == pytest.approx(now(client), abs=5)
    store.change(S, leaving("a", when_empty=Leaving.DETACH))
    assert store.change(S, held("b")) is Standing.HELD
    record = record_of(store)
    assert (record.state, record.holders, record.ended_at) == ("open", {"b": "task b"}, None)
    assert (record.opened_at, record.opened_by) == (opened_at, opened_by)
    assert list(store.sessions(ended=True)) == []
    assert store.change(S, leaving("b")) is Standing.LAST


def test_a_session_that_one_branch_detaches_is_ended_by_the_others(store):
    store.change(S, held("a", "b"))
    assert store.change(S, leaving("a", when_empty=Leaving.DETACH)) is Standing.HELD
    assert store.change(S, leaving("b")) is Standing.LAST


def test_an_abandoned_session_is_due_soon_and_can_be_ended_by_who_still_has_it(store, client):
    store.change(S, held("a", keepalive_seconds=0.001))
    assert store.change(S, leaving("a", when_empty=Leaving.ABANDON)) is Standing.HELD
    record = record_of(store)
    assert (record.state, record.holders) == ("open", {})
    assert record.deadline == pytest.approx(now(client) + redis_store.ABANDONED_SECONDS, abs=5)
    assert store.take_idle(10, SERVERS) == []
    assert store.change(S, leaving("b")) is Standing.LAST


def test_an_abandoned_session_that_others_hold_is_not_due(store, client):
    store.change(S, held("a", "b"))
    assert store.change(S, leaving("a", when_empty=Leaving.ABANDON)) is Standing.HELD
    assert record_of(store).deadline > now(client) + 3600


def test_a_lost_session_is_forgotten_with_its_last_holder(store):
    store.change(S, held("a", "b"))
    assert store.change(S, leaving("a", when_empty=Leaving.LOST)) is Standing.ENDED
    assert (record_of(store).state, record_of(store).holders) == ("lost", {"b": "task b"})
    assert store.change(S, leaving("b")) is Standing.ENDED
    assert (record_of(store).state, record_of(store).deadline) == ("lost", None)
    assert list(store.sessions()) == []


def test_a_loss_that_a_ping_has_found_is_known_to_whoever_asks(store, client):
    store.change(S, held("a", keepalive_seconds=0.001))
    assert store.lost_at(S.key) is None
    store.note_lost(S.key)
    assert store.lost_at(S.key) == pytest.approx(now(client), abs=5)
    assert (store.has_due(SERVERS), store.take_idle(10, SERVERS)) == (False, [])
    assert store.take(S.key) is None
    assert store.change(S, leaving("a", to=["b"])) is Standing.ENDED
    store.note_lost(S.key)
    assert [event["what"] for event in store.history(S.key)] == ["lost"]


def test_more_may_join_a_session_that_settles_though_nobody_holds_it(store, client):
    """The members of a group are published one by one, and the first may have ended before the last has joined."""
    store.change(S, held("a", settling_seconds=30))
    assert store.change(S, leaving("a")) is Standing.HELD
    assert record_of(store).deadline == pytest.approx(now(client) + 30, abs=5)
    assert store.change(S, held("b", settling_seconds=30)) is Standing.HELD
    assert store.change(S, leaving("b")) is Standing.HELD


def test_a_session_that_has_settled_is_ended_by_its_last_holder(store):
    store.change(S, held("a", settling_seconds=0.001))
    store.change(T, held("b", settling_seconds=0.5))
    assert store.change(T, leaving("b")) is Standing.HELD
    wait_until(lambda: store.has_due(SERVERS))
    assert store.change(S, leaving("a")) is Standing.LAST


# For workers


def test_tasks_that_never_run_hold_nothing_any_more(store, client):
    store.change(S, held("a", "b"))
    store.change(T, held("a"))
    store.abandon(["a", "unknown"])
    assert record_of(store).holders == {"b": "task b"}
    assert record_of(store).deadline > now(client) + 3600
    assert record_of(store, T).deadline == pytest.approx(now(client) + redis_store.ABANDONED_SECONDS, abs=5)
    assert store.held_by("a") == []


def test_a_lost_session_is_forgotten_when_its_last_holder_never_runs(store):
    store.change(S, held("a"))
    store.note_lost(S.key)
    store.abandon(["a"])
    assert record_of(store).deadline is None


def test_a_session_that_somebody_ends_is_left_to_that_one_when_a_holder_never_runs(store, client):
    store.change(S, held("a"))
    store.take(S.key)
    store.abandon(["a"])
    assert record_of(store).deadline == pytest.approx(now(client) + ENDING_SECONDS, abs=5)


def test_the_handles_of_a_task_are_the_ones_that_came_last(store):
    moved = replace(S, cookies={"node": "2"})
    store.change(S, held("a"))
    store.change(T, held("a"))
    store.change(moved, joining("b"))
    assert {handle.cookies.get("node") for handle in store.held_by("a")} == {"2", None}
    assert store.held_by("unknown") == []


def test_the_sessions_of_running_tasks_are_renewed_and_told_of(new_store, client):
    short, store = new_store(session_ttl_seconds=10), new_store(session_ttl_seconds=1000)
    for handle, ids in ((S, "ab"), (T, "a")):
        short.change(handle, held(*ids))
    renewed = store.renew(["a", "b", "unknown"])
    assert {task: {record.key for record in records} for task, records in renewed.items()} == {
        "a": {S.key, T.key},
        "b": {S.key},
    }
    assert {record.deadline for record in renewed["a"]} == {record.deadline for record in store.find("")}
    assert min(record.deadline for record in renewed["a"]) > now(client) + 900
    assert store.renew([]) == {}


def test_what_is_renewed_is_used_and_kept_for_longer(new_store, client):
    """By its tasks, and by those that leave."""
    short, store = new_store(session_ttl_seconds=10), new_store(session_ttl_seconds=1000)
    for handle, keepalive_seconds in ((S, 0), (T, 0.001)):
        more = {"keepalive_seconds": keepalive_seconds, "events": [{"what": "opened"}]}
        short.change(handle, held(f"{handle.key}-a", f"{handle.key}-b", **more))
    used_at = record_of(store).used_at
    store.renew([f"{S.key}-a"])
    store.abandon([f"{T.key}-b"])
    kept = {name: client.ttl(name) for name in client.keys("*")}
    longer = {f"{{mcp_celery}}:task:{S.key}-a", "{mcp_celery}:deadlines"}
    longer |= {f"{{mcp_celery}}:{kind}:{h.key}" for kind in ("session", "holders", "events") for h in (S, T)}
    assert {name for name, seconds in kept.items() if seconds > 500 + KEPT_SECONDS} == longer
    assert record_of(store).used_at > used_at
    store.abandon([f"{T.key}-a"])
    assert not store.has_due(SERVERS), "nobody waits for a session that is abandoned"


def test_the_tasks_that_workers_have_are_known_for_a_while(store, client, monkeypatch):
    store.announce(["a", "b"])
    store.announce(["b", "c"])
    assert store.announced() == {"a", "b", "c"}
    assert ANNOUNCED_SECONDS - 10 < client.ttl("{mcp_celery}:tasks") <= ANNOUNCED_SECONDS
    monkeypatch.setattr(redis_store, "ANNOUNCED_SECONDS", 0.05)

    def only_d():
        store.announce(["d"])
        return store.announced() == {"d"}

    wait_until(only_d)
    store.announce([])


def test_a_session_that_is_being_ended_is_not_renewed(store, client):
    store.change(S, held("a"))
    store.take(S.key)
    assert [record.state for record in store.renew(["a"])["a"]] == ["closing"]
    assert record_of(store).deadline == pytest.approx(now(client) + ENDING_SECONDS, abs=5)


def test_one_worker_leads_until_it_resigns(store):
    assert store.lead("a", 30, SERVERS)
    assert store.lead("a", 30, SERVERS)
    assert not store.lead("b", 30, SERVERS)
    store.resign("b", SERVERS)
    assert not store.lead("b", 30, SERVERS)
    store.resign("a", SERVERS)
    assert store.lead("b", 30, SERVERS)


def test_a_leader_that_is_gone_is_followed_by_another(store):
    assert store.lead("a", 0.05, SERVERS)
    wait_until(lambda: store.lead("b", 30, SERVERS))
    assert not store.lead("a", 30, SERVERS)


# For the reaper


def test_a_session_past_its_deadline_is_given_out_once(new_store, client):
    store = new_store(session_ttl_seconds=0.001)
    store.change(S, held("a", keepalive_seconds=10))
    wait_until(lambda: store.has_due(SERVERS))
    (parked,) = store.take_expired(10, SERVERS)
    assert (parked.key, parked.handle) == (S.key, S)
    assert store.take_expired(10, SERVERS) == []
    assert not store.has_due(SERVERS)
    assert record_of(store).state == "closing"
    assert record_of(store).deadline == pytest.approx(now(client) + ENDING_SECONDS, abs=5)


def test_a_session_whose_end_was_not_noted_is_given_out_again(store, monkeypatch):
    monkeypatch.setattr(redis_store, "ENDING_SECONDS", 0.05)
    store.change(S, held("a"))
    assert store.change(S, leaving("a")) is Standing.LAST
    wait_until(lambda: store.has_due(SERVERS))
    assert [parked.key for parked in store.take_expired(10, SERVERS)] == [S.key]
    wait_until(lambda: store.has_due(SERVERS))
    assert [parked.key for parked in store.take_expired(10, SERVERS)] == [S.key]


def test_sessions_are_given_out_by_portions(new_store, client):
    store = new_store(session_ttl_seconds=0.001)
    for number in range(5):
        store.change(handle_of(number), held("a"))
    wait_until(lambda: all(record.deadline < now(client) for record in store.sessions()))
    portions = [store.take_expired(2, SERVERS) for _ in range(4)]
    assert [len(portion) for portion in portions] == [2, 2, 1, 0]
    assert len({parked.key for portion in portions for parked in portion}) == 5


def test_a_session_that_is_held_or_used_is_not_past_its_deadline(new_store):
    store = new_store()
    for handle in (S, T):
        new_store(session_ttl_seconds=0.001).change(handle, held("a"))
    wait_until(lambda: store.has_due(SERVERS))
    store.renew(["a"])
    assert (store.has_due(SERVERS), store.take_expired(10, SERVERS)) == (False, [])


def test_a_lost_session_past_its_deadline_is_forgotten(new_store):
    store = new_store(session_ttl_seconds=0.001)
    store.change(S, held("a"))
    store.note_lost(S.key)
    wait_until(lambda: store.has_due(SERVERS))
    assert store.take_expired(10, SERVERS) == []
    assert (record_of(store).state, record_of(store).holders) == ("lost", {})


def test_an_idle_session_is_given_out_once_for_each_time_of_its_server(store):
    store.change(S, held("a", keepalive_seconds=0.2))
    store.change(T, held("a"))
    assert not store.has_due(SERVERS)
    for _ in range(2):
        wait_until(lambda: store.has_due(SERVERS))
        assert [parked.handle for parked in store.take_idle(10, SERVERS)] == [S]
        assert store.take_idle(10, SERVERS) == []
    store.change(S, joining("b", keepalive_seconds=100))
    assert not store.has_due(SERVERS)


def test_a_session_that_is_past_its_deadline_is_not_pinged(new_store):
    store = new_store(session_ttl_seconds=0.001)
    store.change(S, held("a", keepalive_seconds=0.001))
    wait_until(lambda: store.has_due(SERVERS))
    assert store.take_idle(10, SERVERS) == []
    assert [parked.handle for parked in store.take_expired(10, SERVERS)] == [S]


def test_a_session_is_taken_by_hand_whoever_holds_it(store):
    store.change(S, held("a", keepalive_seconds=0.001))
    wait_until(lambda: store.has_due(SERVERS))
    assert store.take(S.key).handle == S
    assert store.take(S.key).handle == S, "the first one may have failed"
    assert not store.has_due(SERVERS)
    assert store.change(S, leaving("a")) is Standing.ENDED
    store.ended(S.key, CLOSED)
    assert store.take(S.key) is None
    assert store.take(T.key) is None


def test_a_session_of_another_version_is_not_given_out(store, client):
    store.change(S, held("a"))
    client.hset(f"{{mcp_celery}}:session:{S.key}", "handle", json.dumps({"v": 99, "server": "peer"}))
    assert store.take(S.key) is None
    assert store.held_by("a") == []
    assert record_of(store).server == "peer"


# For commands


def test_sessions_are_listed_the_next_deadline_first_and_the_last_end_first(new_store, monkeypatch):
    monkeypatch.setattr(redis_store, "PAGE", 2)
    handles = [handle_of(number) for number in range(5)]
    for handle, seconds in zip(handles, (50, 10, 40, 20, 30), strict=True):
        new_store(session_ttl_seconds=seconds).change(handle, held("a"))
    store = new_store()
    assert [record.key for record in store.sessions()] == [handles[n].key for n in (1, 3, 4, 2, 0)]
    for handle in handles[:3]:
        store.ended(handle.key, CLOSED)
    assert [record.key for record in store.sessions(ended=True)] == [handles[n].key for n in (2, 1, 0)]
    assert [record.key for record in store.sessions()] == [handles[n].key for n in (3, 4)]


def test_a_session_is_found_by_the_digits_that_may_be_shown(store):
    for handle in (S, T):
        store.change(handle, held("a"))
    store.ended(T.key, CLOSED)
    for handle in (S, T):
        (record,) = store.find(handle.short_id)
        assert (record.key, record.short_id) == (handle.key, handle.short_id)
    assert len(store.find("")) == 2
    assert store.find("no") == []


def test_what_happened_is_kept_in_order_and_of_a_long_history_the_end(store, monkeypatch):
    monkeypatch.setattr(redis_store, "HISTORY_LENGTH", 3)
    numbers = count()
    store.change(S, held("a", events=[{"number": next(numbers)}, {"number": next(numbers)}]))
    store.change(S, Change(events=[{"number": next(numbers), "text": "naïve \u2028 \U0001f600"}]))
    store.change(S, leaving("a", events=[{"number": next(numbers)}]))
    assert [event["number"] for event in store.history(S.key)] == [1, 2, 3]
    assert store.history(S.key)[1]["text"] == "naïve \u2028 \U0001f600"
    store.ended(S.key, CLOSED)
    assert store.history(S.key)[-1] == CLOSED
    assert store.history(T.key) == []


def test_the_history_of_an_ended_session_is_kept_for_its_time(new_store, client):
    store = new_store(history_seconds=100)
    store.change(S, held("a", events=[{"what": "opened"}]))
    store.ended(S.key, CLOSED)
    names = {f"{{mcp_celery}}:{name}" for name in (f"session:{S.key}", f"events:{S.key}", "ended")}
    assert set(client.keys("*")) == names
    assert all(90 < client.ttl(name) <= 100 for name in names)


def test_a_history_that_is_not_to_be_kept_any_more_is_gone(new_store, client):
    store = new_store(history_seconds=1)
    store.change(S, held("a", events=[{"what": "opened"}]))
    store.ended(S.key, CLOSED)
    wait_until(lambda: client.keys("*") == [])
    assert (store.find(S.key), store.history(S.key), list(store.sessions(ended=True))) == ([], [], [])


def test_without_a_time_for_the_history_nothing_is_left_of_a_session(new_store, client):
    store = new_store(history_seconds=0)
    store.change(S, held("a", events=[{"what": "opened"}]))
    store.change(S, leaving("errback"))
    store.change(S, leaving("a"))
    store.ended(S.key, CLOSED)
    assert client.keys("*") == []


# Without memory


def test_a_store_that_is_out_of_memory_takes_no_more_but_lets_go_of_what_it_has(new_store, client, monkeypatch):
    store = new_store(session_ttl_seconds=0.001)
    store.change(S, held("a", "b", keepalive_seconds=0.001))
    store.change(T, held("a"))
    wait_until(lambda: store.has_due(SERVERS))
    monkeypatch.setattr(redis_store, "PAUSE_SECONDS", 0)
    client.config_set("maxmemory", 1)
    try:
        with pytest.raises(StoreError, match="did not answer"):
            store.change(handle_of(3), held("a"))
        assert store.change(S, leaving("a", to=["c"], events=[{"what": "step"}])) is Standing.HELD
        assert store.change(S, leaving("b", "c")) is Standing.LAST
        store.ended(S.key, CLOSED)
        assert [parked.handle for parked in store.take_expired(10, SERVERS)] == [T]
        store.ended(T.key, CLOSED)
    finally:
        client.config_set("maxmemory", 0)
    assert [record.state for record in store.find("")] == ["closed", "closed"]
    assert store.find(handle_of(3).key) == []
