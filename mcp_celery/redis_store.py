"""The store on Redis 6.2+ or Valkey.

Every change is one script, so one atomic step and one round trip. All keys have the same hash tag, so a cluster keeps
them in one slot; all have a time to live. Times are the server's own, so the clocks of workers do not matter.

    {prefix}:session:<key>   hash    v, state, server, place, handle (JSON, as it travels in messages), times, opened_by
    {prefix}:holders:<key>   hash    task ID to task name
    {prefix}:left:<key>      set     task IDs that have ended, and join no more
    {prefix}:events:<key>    list    JSON, the history
    {prefix}:task:<task ID>  set     keys of the sessions that a task holds
    {prefix}:deadlines       zset    key by the time when the reaper ends the session
    {prefix}:pings           zset    key by the time when the reaper pings the session
    {prefix}:ended           zset    key by the time of its end, while its history is kept
    {prefix}:journal:<task>  hash    owner, until (lease), ended, session:<server>, call|token|question|end:<n>, done
    {prefix}:tasks           zset    names of MCP tasks by the time when a worker was last seen to have them
    {prefix}:leader:<hash>   string  the worker that leads those that know the same servers
"""

import hashlib
import json
import os
import re
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from typing import TYPE_CHECKING, Any
from urllib.parse import unquote

from .exceptions import ConfigurationError, JournalError, SessionHandleError, StoreError
from .handle import SessionHandle
from .settings import Conf, StoreSettings, store_settings
from .store import Change, Claim, Parked, SessionRecord, Standing, Store

if TYPE_CHECKING:
    from redis import Redis

#: How long the store may take, for a connection and for an answer. A task waits for it.
TIMEOUT_SECONDS = 2.0
#: How many threads or greenlets of a process may ask at the same time; redis-py has 100 unless told.
MAX_CONNECTIONS = 10_000
#: For how long nothing is asked of a store that did not answer, so that not every task waits for it.
PAUSE_SECONDS = 5.0
#: Whoever ends a session has so long, before the reaper tries it (again).
ENDING_SECONDS = 60.0
#: How long a process that may itself end a session has for it, where somebody else has given it up.
ABANDONED_SECONDS = 10.0
#: How long a session that nobody could end is remembered after its deadline.
KEPT_SECONDS = 24 * 3600.0
#: For how long it is known which tasks a worker has, once it is gone.
ANNOUNCED_SECONDS = 3600.0
#: Entries of a history, of which the last are kept.
HISTORY_LENGTH = 500
#: Sessions that are read at once.
PAGE = 200
#: Due sessions of others that a sweep looks past.
MAX_PASSED_OVER = 10_000

VERSION = 1

_UNKNOWN_OPTION = re.compile(r"unexpected keyword argument '(\w+)'")

#: KEYS[1]: what all keys begin with, with the hash tag. ARGV[1]: arguments, as JSON.
_PRELUDE = """
local base, a = KEYS[1], cjson.decode(ARGV[1])
local clock = redis.call('TIME')
local now = tonumber(clock[1]) + tonumber(clock[2]) / 1000000
local function key(kind, name) return base .. ':' .. kind .. (name and ':' .. name or '') end
local function keep(name, seconds) redis.call('EXPIRE', name, math.ceil(seconds)) end
local deadlines, pings, ended = key('deadlines'), key('pings'), key('ended')

local function schedule(zset, s, at)
  redis.call('ZADD', zset, at, s)
  if redis.call('TTL', zset) < a.kept then keep(zset, a.kept) end
end

local function unschedule(s)
  redis.call('ZREM', deadlines, s)
  redis.call('ZREM', pings, s)
end

local function note(s, events)
  for _, event in ipairs(events) do redis.call('RPUSH', key('events', s), event) end
  redis.call('LTRIM', key('events', s), -a.length, -1)
  keep(key('events', s), a.kept)
end

-- Calls `take` with each session that is due in `zset` at one of `a.servers`, until it returns true.
local function each_due(zset, take)
  local passed_over = 0
  while passed_over < a.passed_over do
    local due = redis.call('ZRANGEBYSCORE', zset, '-inf', now, 'LIMIT', passed_over, a.page)
    for _, s in ipairs(due) do
      local found = redis.call('HMGET', key('session', s), 'server', 'place', 'state', 'handle')
      local place = found[1] and a.servers[found[1]]
      if found[1] and not (place and (not found[2] or found[2] == place)) then passed_over = passed_over + 1
      elseif take(s, found[3], {s, found[4], found[2]}) then return end
    end
    if #due < a.page then return end
  end
end

local function renew(s)
  for _, kind in ipairs({'session', 'holders', 'left', 'events'}) do keep(key(kind, s), a.kept) end
end

local function forget(s, how)
  local record, holders = key('session', s), key('holders', s)
  unschedule(s)
  for _, id in ipairs(redis.call('HKEYS', holders)) do redis.call('SREM', key('task', id), s) end
  redis.call('DEL', holders, key('left', s))
  if a.history <= 0 then return redis.call('DEL', record, key('events', s)) end
  redis.call('HDEL', record, 'handle')
  redis.call('HSET', record, 'state', how, 'ended_at', now)
  keep(record, a.history)
  keep(key('events', s), a.history)
  redis.call('ZADD', ended, now, s)
  redis.call('ZREMRANGEBYSCORE', ended, '-inf', now - a.history)
  keep(ended, a.history)
end
"""

_CHANGE = """
local s = a.session
local record, holders, left = key('session', s), key('holders', s), key('left', s)
local state = redis.call('HGET', record, 'state')
if (not state or state == 'detached') and a.create then
  state = 'open'
  redis.call('HSET', record, 'v', a.v, 'server', a.server)
  redis.call('HSETNX', record, 'opened_at', now)
  redis.call('HSETNX', record, 'opened_by', a.opened_by)
  redis.call('HDEL', record, 'ended_at')
  redis.call('ZREM', ended, s)
elseif not state then
  return 'uncounted'
elseif state ~= 'open' and state ~= 'closing' and state ~= 'lost' then
  return 'ended'
end
local joins = {}
for _, pair in ipairs(a.joining) do joins[pair[1]] = true end
for _, id in ipairs(a.leaving) do
  redis.call('HDEL', holders, id)
  -- An errback may have ended before it was counted. A task that was killed while it published what follows, and runs
  -- again, counts that again: some of it may have ended.
  if not (a.may_return or joins[id]) then redis.call('SADD', left, id) end
  if not joins[id] then redis.call('SREM', key('task', id), s) end
end
for _, pair in ipairs(a.joining) do
  local id = pair[1]
  if redis.call('SISMEMBER', left, id) == 0 then
    redis.call('HSET', holders, id, pair[2])
    redis.call('SADD', key('task', id), s)
    keep(key('task', id), a.kept)
  end
end
note(s, a.events)
if a.settling > 0 then redis.call('HSET', record, 'settling_until', now + a.settling) end
if a.when_empty == 'lost' then state = 'lost' end
redis.call('HSET', record, 'handle', a.handle, 'state', state, 'used_at', now, 'keepalive', a.keepalive)
if a.place ~= '' then redis.call('HSET', record, 'place', a.place) end
renew(s)
if redis.call('HLEN', holders) > 0 then
  if state == 'closing' then return 'ended' end
  schedule(deadlines, s, now + a.ttl)
  if state == 'open' and a.keepalive > 0 then schedule(pings, s, now + a.keepalive)
  else redis.call('ZREM', pings, s) end
  return state == 'lost' and 'ended' or 'held'
end
if #a.leaving == 0 and #a.joining == 0 then return state == 'open' and 'held' or 'ended' end
if state == 'lost' or a.when_empty == 'detach' then
  forget(s, state == 'lost' and 'lost' or 'detached')
  return 'ended'
end
if state == 'closing' then return 'ended' end
redis.call('ZREM', pings, s)
local settling_until = tonumber(redis.call('HGET', record, 'settling_until') or 0)
if a.when_empty == 'abandon' or settling_until > now then
  -- Left open: more holders may come, and a process that still holds it may end it.
  schedule(deadlines, s, math.max(settling_until, now + (a.when_empty == 'abandon' and a.abandoned or 0)))
  return 'held'
end
redis.call('HSET', record, 'state', 'closing')
schedule(deadlines, s, now + a.ending)
return 'last'
"""

_ENDED = """
local state = redis.call('HGET', key('session', a.session), 'state')
if state and state ~= 'closed' then
  unschedule(a.session)  -- first: a server that is out of memory refuses scripts which begin with a larger write
  note(a.session, a.events)
  forget(a.session, 'closed')
end
"""

_NOTE_LOST = """
local record = key('session', a.session)
if redis.call('HGET', record, 'state') == 'open' then
  redis.call('HSET', record, 'state', 'lost', 'lost_at', now)
  redis.call('ZREM', pings, a.session)
  note(a.session, a.events)
end
"""

_HELD_BY = """
local held = {}
for i, s in ipairs(redis.call('SMEMBERS', key('task', a.task))) do
  held[i] = {s, redis.call('HGET', key('session', s), 'handle'), false}
end
return held
"""

_ABANDON = """
for _, id in ipairs(a.tasks) do
  for _, s in ipairs(redis.call('SMEMBERS', key('task', id))) do
    redis.call('HDEL', key('holders', s), id)
    renew(s)
    if redis.call('HLEN', key('holders', s)) == 0 then
      local state = redis.call('HGET', key('session', s), 'state')
      redis.call('ZREM', pings, s)
      if state == 'open' then schedule(deadlines, s, now + a.abandoned)
      elseif state == 'lost' then forget(s, 'lost') end
    end
  end
  redis.call('DEL', key('task', id))
end
"""

#: Returns, for each task, the keys of its sessions.
_RENEW = """
local tasks = {}
for i, id in ipairs(a.tasks) do
  local sessions = redis.call('SMEMBERS', key('task', id))
  tasks[i] = {}
  for _, s in ipairs(sessions) do
    if redis.call('HGET', key('session', s), 'state') == 'open' then
      redis.call('HSET', key('session', s), 'used_at', now)
      schedule(deadlines, s, now + a.ttl)
      renew(s)
    end
    table.insert(tasks[i], s)
  end
  if #sessions > 0 then keep(key('task', id), a.kept) end
end
return tasks
"""

_LEAD = """
local leader = redis.call('GET', key('leader', a.group))
if leader and leader ~= a.worker then return 0 end
redis.call('SET', key('leader', a.group), a.worker, 'PX', math.ceil(a.seconds * 1000))
return 1
"""

_ANNOUNCE = """
for _, name in ipairs(a.names) do redis.call('ZADD', key('tasks'), now, name) end
redis.call('ZREMRANGEBYSCORE', key('tasks'), '-inf', now - a.announced)
keep(key('tasks'), a.announced)
"""

_RESIGN = """
if redis.call('GET', key('leader', a.group)) == a.worker then redis.call('DEL', key('leader', a.group)) end
"""

_HAS_DUE = """
local found = 0
local function note_one() found = 1 return true end
each_due(deadlines, note_one)
each_due(pings, note_one)
return found
"""

_TAKE_EXPIRED = """
local taken = {}
each_due(deadlines, function(s, state, session)
  if state == 'open' or state == 'closing' then
    redis.call('ZREM', pings, s)  -- first, as above
    redis.call('HSET', key('session', s), 'state', 'closing')
    schedule(deadlines, s, now + a.ending)
    table.insert(taken, session)
  elseif state == 'lost' then forget(s, 'lost')
  else unschedule(s) end
  return #taken >= a.limit
end)
return taken
"""

_TAKE_IDLE = """
local taken = {}
each_due(pings, function(s, state, session)
  local deadline = tonumber(redis.call('ZSCORE', deadlines, s) or 0)
  if state == 'open' and deadline > now then
    schedule(pings, s, now + tonumber(redis.call('HGET', key('session', s), 'keepalive')))
    table.insert(taken, session)
  else redis.call('ZREM', pings, s) end
  return #taken >= a.limit
end)
return taken
"""

_TAKE = """
local record = key('session', a.session)
local state = redis.call('HGET', record, 'state')
if state == 'lost' then forget(a.session, 'lost') end
if state ~= 'open' and state ~= 'closing' then return {} end
redis.call('ZREM', pings, a.session)  -- first, as above
redis.call('HSET', record, 'state', 'closing')
schedule(deadlines, a.session, now + a.ending)
return {a.session, redis.call('HGET', record, 'handle'), redis.call('HGET', record, 'place')}
"""
_CLAIM_JOURNAL = """
local journal = key('journal', a.task)
local found = redis.call('HMGET', journal, 'done', 'owner', 'until', 'v')
if found[4] and tonumber(found[4]) ~= a.v then return {'unknown'} end
if found[1] then return {'done'} end
if found[2] and found[2] ~= a.owner and tonumber(found[3]) > now then return {'held'} end
redis.call('HSET', journal, 'v', a.v, 'owner', a.owner, 'until', now + a.lease)
keep(journal, a.kept)
return {'mine', redis.call('HGETALL', journal)}
"""

#: ARGV[2...]: names and texts, apart from the JSON, since results are large.
_WRITE_JOURNAL = """
local journal = key('journal', a.task)
if redis.call('HGET', journal, 'owner') ~= a.owner then return redis.call('EXISTS', journal) - 1 end
for i = 2, #ARGV, 2 do redis.call('HSET', journal, ARGV[i], ARGV[i + 1]) end
redis.call('HSET', journal, 'until', now + a.lease)
keep(journal, a.kept)
return 1
"""

_CUT_JOURNAL = """
local journal = key('journal', a.task)
if redis.call('HGET', journal, 'owner') ~= a.owner then return redis.call('EXISTS', journal) - 1 end
for _, name in ipairs(a.fields) do redis.call('HDEL', journal, name) end
return 1
"""

_END_JOURNAL = """
local journal = key('journal', a.task)
if redis.call('HGET', journal, 'owner') ~= a.owner then return end
if a.is_done then
  redis.call('DEL', journal)
  redis.call('HSET', journal, 'v', a.v, 'done', now)
  keep(journal, a.kept)
else
  redis.call('HDEL', journal, 'owner', 'until')
  if a.attempt then redis.call('HSET', journal, 'ended', a.attempt) end
end
"""

#: Another execution may have taken the lease before the death of that process is noticed.
_RELEASE_JOURNAL = """
local journal = key('journal', a.task)
local owner = redis.call('HGET', journal, 'owner')
if owner and string.sub(owner, 1, #a.process) == a.process then redis.call('HDEL', journal, 'owner', 'until') end
"""


_stores: dict[object, "RedisStore"] = {}


def get_store(conf: Conf) -> Store | None:
    """Return the store that *conf* names, the same one in all of a process; None where there is none.

    Raises:
        ConfigurationError: A setting is wrong.
    """
    settings = store_settings(conf)
    if settings is None:
        return None
    named = (settings, repr(settings.options))
    return _stores.setdefault(named, RedisStore(settings))


class RedisStore:
    """See `Store`. Connects at the first use, in each process anew."""

    def __init__(self, settings: StoreSettings) -> None:
        self._settings = settings
        self._base = f"{{{settings.prefix}}}"
        self._clients: dict[int, Redis] = {}
        self._paused_until = 0.0
        #: Why it is paused. The same text until then, so that one outage is one warning.
        self._failure = ""

    def __repr__(self) -> str:
        return f"<RedisStore {self._settings.prefix}>"

    def check(self) -> None:
        """See `Store.check`."""
        self._client()

    # -- For tasks

    def change(self, handle: SessionHandle, change: Change) -> Standing:
        """See `Store.change`."""
        answer = self._run(
            _CHANGE,
            v=VERSION,
            session=handle.key,
            server=handle.server,
            handle=handle.dumps(),
            leaving=list(change.leaving),
            joining=list(change.joining.items()),
            create=change.create,
            may_return=change.may_return,
            when_empty=change.when_empty.value,
            events=[json.dumps(event) for event in change.events],
            opened_by=json.dumps(change.opened_by or {}),
            keepalive=change.keepalive_seconds,
            place=change.place,
            settling=change.settling_seconds,
        )
        return Standing(answer)

    def ended(self, key: str, event: Mapping[str, Any]) -> None:
        """See `Store.ended`."""
        self._run(_ENDED, session=key, events=[json.dumps(event)])

    def lost_at(self, key: str) -> float | None:
        """See `Store.lost_at`."""
        at = self._ask(lambda client: client.hget(self._key("session", key), "lost_at"))
        return None if at is None else float(at)

    # -- For workers

    def held_by(self, task_id: str) -> list[SessionHandle]:
        """See `Store.held_by`."""
        return [parked.handle for parked in self._parked(self._run(_HELD_BY, task=task_id))]

    def abandon(self, task_ids: Sequence[str]) -> None:
        """See `Store.abandon`."""
        self._run(_ABANDON, tasks=list(task_ids))

    def renew(self, task_ids: Sequence[str]) -> dict[str, list[SessionRecord]]:
        """See `Store.renew`."""
        if not task_ids:
            return {}
        keys = dict(zip(task_ids, self._run(_RENEW, tasks=list(task_ids)), strict=True))
        records = {record.key: record for record in self._read({key for held in keys.values() for key in held})}
        return {task: [records[key] for key in held if key in records] for task, held in keys.items() if held}

    def announce(self, names: Sequence[str]) -> None:
        """See `Store.announce`."""
        self._run(_ANNOUNCE, names=list(names))

    def announced(self) -> frozenset[str]:
        """See `Store.announced`."""
        return frozenset(self._ask(lambda client: client.zrange(self._key("tasks"), 0, -1)))

    def lead(self, worker: str, seconds: float, servers: Mapping[str, str]) -> bool:
        """See `Store.lead`."""
        return bool(self._run(_LEAD, worker=worker, seconds=seconds, group=_group(servers)))

    def resign(self, worker: str, servers: Mapping[str, str]) -> None:
        """See `Store.resign`."""
        self._run(_RESIGN, worker=worker, group=_group(servers))

    def has_due(self, servers: Mapping[str, str]) -> bool:
        """See `Store.has_due`."""
        return bool(self._run_over(_HAS_DUE, servers))

    # -- For the reaper

    def take_expired(self, limit: int, servers: Mapping[str, str]) -> list[Parked]:
        """See `Store.take_expired`."""
        return self._parked(self._run_over(_TAKE_EXPIRED, servers, limit=limit))

    def take_idle(self, limit: int, servers: Mapping[str, str]) -> list[Parked]:
        """See `Store.take_idle`."""
        return self._parked(self._run_over(_TAKE_IDLE, servers, limit=limit))

    def note_lost(self, key: str) -> None:
        """See `Store.note_lost`."""
        self._run(_NOTE_LOST, session=key, events=[json.dumps({"what": "lost", "at": time.time()})])

    # -- For journals

    def claim_journal(self, task_id: str, owner: str, lease_seconds: float) -> Claim:
        """See `JournalStore.claim_journal`."""
        standing, *rest = self._run(_CLAIM_JOURNAL, v=VERSION, task=task_id, owner=owner, lease=lease_seconds)
        if standing == "unknown":
            raise JournalError("The journal of this task is of another version: have all workers use one release")
        flat = rest[0] if rest else []
        return Claim(standing, dict(zip(flat[::2], flat[1::2], strict=True)))

    def write_journal(self, task_id: str, owner: str, fields: Mapping[str, str], lease_seconds: float) -> bool:
        """See `JournalStore.write_journal`."""
        flat = [text for pair in fields.items() for text in pair]
        return _is_kept(self._run(_WRITE_JOURNAL, *flat, task=task_id, owner=owner, lease=lease_seconds))

    def cut_journal(self, task_id: str, owner: str, fields: Sequence[str]) -> bool:
        """See `JournalStore.cut_journal`."""
        return _is_kept(self._run(_CUT_JOURNAL, task=task_id, owner=owner, fields=list(fields)))

    def end_journal(self, task_id: str, owner: str, *, is_done: bool, attempt: int | None) -> None:
        """See `JournalStore.end_journal`."""
        # JSON has a null for None, which is not false in Lua.
        ended = {} if attempt is None else {"attempt": attempt}
        self._run(_END_JOURNAL, v=VERSION, task=task_id, owner=owner, is_done=is_done, **ended)

    def drop_journal(self, task_id: str) -> None:
        """See `JournalStore.drop_journal`."""
        self._ask(lambda client: client.delete(self._key("journal", task_id)))

    def release_journal(self, task_id: str, process: str) -> None:
        """See `JournalStore.release_journal`."""
        self._run(_RELEASE_JOURNAL, task=task_id, process=process)

    # -- For commands

    def sessions(self, *, ended: bool = False) -> Iterator[SessionRecord]:
        """See `Store.sessions`."""
        index, start = self._key("ended" if ended else "deadlines"), 0
        while page := self._ask(lambda client: client.zrange(index, start, start + PAGE - 1, desc=ended)):  # noqa: B023
            yield from self._read(page)
            start += PAGE

    def find(self, digits: str) -> list[SessionRecord]:
        """See `Store.find`."""
        keys: list[str] = []
        for index in ("deadlines", "ended"):
            keys += self._ask(lambda client: client.zrange(self._key(index), 0, -1))  # noqa: B023
        return self._read(dict.fromkeys(key for key in keys if key.startswith(digits)))

    def history(self, key: str) -> list[dict[str, Any]]:
        """See `Store.history`."""
        return [json.loads(line) for line in self._ask(lambda client: client.lrange(self._key("events", key), 0, -1))]

    def take(self, key: str) -> Parked | None:
        """See `Store.take`."""
        found = self._run(_TAKE, session=key)
        return next(iter(self._parked([found] if found else [])), None)

    # -- Within

    def _key(self, kind: str, name: str | None = None) -> str:
        return f"{self._base}:{kind}" if name is None else f"{self._base}:{kind}:{name}"

    def _read(self, keys: Iterable[str]) -> list[SessionRecord]:
        """Return what is known of the sessions with these keys, without those that are gone meanwhile."""
        keys = list(keys)

        def ask(client: "Redis") -> list[Any]:
            pipeline = client.pipeline(transaction=False)
            for key in keys:
                pipeline.hmget(self._key("session", key), _FIELDS)
                pipeline.hgetall(self._key("holders", key))
                pipeline.zscore(self._key("deadlines"), key)
            return pipeline.execute()

        answers = iter(self._ask(ask) if keys else ())
        found = [_record(key, *answer) for key, *answer in zip(keys, answers, answers, answers, strict=True)]
        return [record for record in found if record is not None]

    @staticmethod
    def _parked(found: Sequence[Sequence[str]]) -> list[Parked]:
        parked = []
        for key, handle, place in found:
            with suppress(SessionHandleError):  # of another version of this package, which will take it as well
                if handle:
                    parked.append(Parked(key, SessionHandle.load(handle), place or ""))
        return parked

    def _run_over(self, script: str, servers: Mapping[str, str], **arguments: Any) -> Any:
        return self._run(script, servers=servers, page=PAGE, passed_over=MAX_PASSED_OVER, **arguments)

    def _run(self, script: str, *more: str, **arguments: Any) -> Any:
        lives = self._settings
        arguments |= {
            "ttl": lives.session_ttl_seconds,
            "kept": lives.session_ttl_seconds + KEPT_SECONDS,
            "history": lives.history_seconds,
            "length": HISTORY_LENGTH,
            "ending": ENDING_SECONDS,
            "abandoned": ABANDONED_SECONDS,
            "announced": ANNOUNCED_SECONDS,
        }
        # redis-py's scripts go by their hash, and are loaded where the server does not have them.
        body = json.dumps(arguments)
        return self._ask(lambda client: client.register_script(_PRELUDE + script)([self._base], [body, *more]))

    def _ask(self, question: "Callable[[Redis], Any]") -> Any:
        from redis import RedisError  # noqa: PLC0415 - a process that only publishes needs no store

        if time.monotonic() < self._paused_until:
            raise StoreError(self._failure)
        try:
            return question(self._client())
        except (RedisError, OSError, TypeError, ValueError) as exc:
            # TypeError and ValueError: an option that redis-py looks at when it connects.
            self._failure = f"The store did not answer ({type(exc).__name__})"
            self._paused_until = time.monotonic() + PAUSE_SECONDS
            # The text of a ValueError may quote a part of the URL.
            raise StoreError(self._failure) from (None if isinstance(exc, ValueError) else exc)

    def _client(self) -> "Redis":
        """Return this process's client: connections may not be shared with a forked child."""
        client = self._clients.get(os.getpid())
        if client is None:
            try:
                client = connect(self._settings)
                client.connection_pool.make_connection()  # which takes the options, and connects at its first use
            except Exception as exc:  # noqa: BLE001 - a credential provider may raise anything
                # Of what may be wrong only this is said: its text may quote a part of the URL.
                option = _UNKNOWN_OPTION.search(str(exc)) if isinstance(exc, TypeError) else None
                what = f"has an unknown option {option[1]!r}" if option else f"cannot be used ({type(exc).__name__})"
                raise ConfigurationError(
                    f"The store of MCP sessions {what}: see mcp_store_url and mcp_store_options"
                ) from None
            self._clients[os.getpid()] = client
        return client


def _group(servers: Mapping[str, str]) -> str:
    """Return what those have in common that know the same *servers*."""
    return hashlib.sha256(json.dumps(sorted(servers.items())).encode()).hexdigest()[:8]


def _is_kept(answer: int) -> bool:
    if answer < 0:
        raise JournalError("The store has lost the journal of this task: what it has called so far cannot be kept")
    return answer > 0


def connect(settings: StoreSettings) -> "Redis":
    """Return a client that answers within `TIMEOUT_SECONDS` or fails. Connects at its first use."""
    from redis import ConnectionError, Redis  # noqa: A004, PLC0415 - as above
    from redis.backoff import NoBackoff  # noqa: PLC0415
    from redis.connection import parse_url  # noqa: PLC0415
    from redis.retry import Retry  # noqa: PLC0415
    from redis.sentinel import Sentinel  # noqa: PLC0415

    url, provider = _without_provider(settings.url)
    options = {
        "socket_timeout": TIMEOUT_SECONDS,
        "socket_connect_timeout": TIMEOUT_SECONDS,
        # Once more, since an idle connection may have been closed by the other side; not after a timeout.
        "retry": Retry(NoBackoff(), 1, supported_errors=(ConnectionError,)),
        "decode_responses": True,
        "max_connections": MAX_CONNECTIONS,
        **settings.options,
    }
    provider = provider or options.pop("credential_provider", None)
    if provider is not None:
        from kombu.utils.imports import symbol_by_name  # noqa: PLC0415 - few need it

        # By its name, as Celery takes it.
        is_name = isinstance(provider, str)
        options["credential_provider"] = symbol_by_name(provider)() if is_name else provider  # type: ignore[no-untyped-call]
    if not url.startswith("sentinel:"):
        # redis-py goes by the scheme alone.
        is_tls = options.pop("ssl", False) and url.startswith("redis:")
        return Redis.from_url(f"rediss{url.removeprefix('redis')}" if is_tls else url, **options)

    urls = ["redis" + part.removeprefix("sentinel") for part in url.split(";")]
    sentinels: list[dict[str, Any]] = [parse_url(url) for url in urls]  # type: ignore[no-untyped-call]
    addresses = [(sentinel.get("host", "localhost"), sentinel.get("port", 26379)) for sentinel in sentinels]
    options |= {name: sentinels[0][name] for name in ("db", "username", "password") if name in sentinels[0]}
    master, sentinel_kwargs = options.pop("master_name", "mymaster"), options.pop("sentinel_kwargs", None)
    # All of them in turn, within the time; redis-py would ask again in between.
    once = {"retry": Retry(NoBackoff(), 0)}
    seconds = TIMEOUT_SECONDS / len(addresses)
    asking = {"socket_timeout": seconds, "socket_connect_timeout": seconds, **once, **(sentinel_kwargs or {})}
    sentinel = Sentinel(addresses, sentinel_kwargs=asking)  # type: ignore[no-untyped-call]
    client: Redis = sentinel.master_for(master, **{**options, **once})  # type: ignore[no-untyped-call]
    return client


def _without_provider(url: str) -> tuple[str, str | None]:
    """Return *url* without its option `credential_provider`, and that."""
    found = _PROVIDER.search(url)
    return (url, None) if found is None else (_PROVIDER.sub(r"\1", url).rstrip("?&"), unquote(found[2]))


_PROVIDER = re.compile(r"([?&])credential_provider=([^&;]*)&?")

_FIELDS = ("v", "server", "state", "opened_at", "opened_by", "used_at", "ended_at")


def _record(
    key: str, fields: Sequence[str | None], holders: Mapping[str, str], deadline: float | None
) -> SessionRecord | None:
    version, server, state, opened_at, opened_by, used_at, ended_at = fields
    if version != str(VERSION) or server is None or state is None:
        return None  # gone, or of a release of this package that lists it as well
    return SessionRecord(
        key=key,
        server=server,
        state=state,
        opened_at=float(opened_at or 0),
        opened_by=json.loads(opened_by or "{}"),
        holders=holders,
        used_at=float(used_at or 0),
        deadline=deadline,
        ended_at=None if ended_at is None else float(ended_at),
    )
