"""What the journal of a durable task adds to one tool call: time, and round trips to the store."""

import random
from collections.abc import Callable
from dataclasses import dataclass, field
from statistics import median
from time import perf_counter

from redis import Redis

from bench.calls import BLOCK, WARM_UP_BLOCKS, open_session
from bench.raw import ARGUMENTS
from bench.store import RoundTrips
from mcp_celery.redis_store import RedisStore
from mcp_celery.settings import JournalSettings, StoreSettings, server_settings
from mcp_celery.sync_session import SyncJournal, new_journal, new_session

PLAIN, DURABLE = "a further call", "the same in a durable task"
WITHOUT_EVENTS, WITH_EVENTS = "without an event store", "with an event store"
SETTINGS = JournalSettings(keeps_over_retries=True, calls_again=False, max_result_bytes=1024 * 1024)


@dataclass
class Contender:
    """A way to call, of a server with or without an event store."""

    server: str
    name: str
    call: Callable[[], object]
    seconds: list[float] = field(default_factory=list)
    #: Of each block, a call.
    round_trips: list[float] = field(default_factory=list)


def measure(urls: dict[str, str], redis_url: str, calls: int) -> list[dict[str, object]]:
    """Measure at least *calls* of each, in blocks and in turn. *urls*: of a server without and with an event store."""
    store, trips, order = RedisStore(StoreSettings(url=redis_url)), RoundTrips(redis_url), random.Random(0)  # noqa: S311 - an order, no secret
    journals: list[SyncJournal] = []
    all_of_them: list[Contender] = []
    for server, url in urls.items():
        handle, settings = open_session(url), server_settings({}, url)
        journals.append(new_journal(store, server, 0, SETTINGS))
        journals[-1].begin()
        for name, journal in ((PLAIN, None), (DURABLE, journals[-1].journal)):
            session = new_session(settings, handle, journal=journal)
            all_of_them.append(Contender(server, name, lambda session=session: session.call_tool("add", ARGUMENTS)))
    for contender in all_of_them * WARM_UP_BLOCKS:
        measure_block(contender, trips)
    for contender in all_of_them:
        contender.seconds.clear()
        contender.round_trips.clear()
    for _ in range(-(-calls // BLOCK)):
        for contender in order.sample(all_of_them, len(all_of_them)):
            measure_block(contender, trips)
    tokens = {server: tokens_of(redis_url, server) for server in urls}
    for journal in journals:
        journal.end(is_done=True)
    floor = {each.server: median(each.seconds) for each in all_of_them if each.name == PLAIN}
    return [
        {
            "server": each.server,
            "name": each.name,
            "median_ms": median(each.seconds) * 1000,
            "times_plain": median(each.seconds) / floor[each.server],
            "round_trips": median(each.round_trips),
            "off_path": tokens[each.server] if each.name == DURABLE else 0,
        }
        for each in all_of_them
    ]


def measure_block(contender: Contender, trips: RoundTrips) -> None:
    contender.call()
    before = trips.read()
    for _ in range(BLOCK):
        begun = perf_counter()
        contender.call()
        contender.seconds.append(perf_counter() - begun)
    contender.round_trips.append((trips.read() - before) / BLOCK)


def tokens_of(redis_url: str, task_id: str) -> float:
    """Return how many resumption tokens a call has: each is one write, which the call does not wait for."""
    kinds = [name.partition(b":")[0] for name in Redis.from_url(redis_url).hkeys(f"{{mcp_celery}}:journal:{task_id}")]
    return kinds.count(b"token") / kinds.count(b"call")
