"""The journal of a durable task: which calls it has made, and what came of them, kept outside of the worker.

When the task runs again, after its worker was killed or as a retry, calls that have finished give the result that they
gave, without a word to the server; the call that was under way is continued by its resumption token; from there on the
task goes on live.

A journal belongs to one execution at a time, by a lease that is renewed while the task runs. A second execution of the
same task waits for it to lapse. Whoever has lost the lease can write no more.
"""

import asyncio
import base64
import hashlib
import json
import logging
import os
import secrets
import time
import zlib
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

import anyio

from .exceptions import HAS_TAKEN_OVER, JournalError, JournalMismatchError, StoreError, SupersededError
from .handle import SessionHandle
from .store import JournalStore, process_name
from .threads import aside

logger = logging.getLogger(__name__)

#: A lease lasts so long, and is renewed three times meanwhile.
LEASE_SECONDS = 15.0
#: How long the store may be away before a durable task gives up.
PATIENCE_SECONDS = 10.0
#: How often a second execution looks whether the lease has lapsed.
POLL_SECONDS = 0.5
#: Longer results are compressed.
COMPRESS_BYTES = 4096


Ending = Literal["result", "failed", "broken", "cancelled"]


@dataclass(frozen=True, kw_only=True)
class Entry:
    """One call of an execution.

    Attributes:
        number: From 0, in the order of the calls.
        what: For people, such as "tool 'add'".
        digest: A hash of server, method and arguments. Arguments themselves are not kept: they may hold secrets.
        attempt: `request.retries` of the attempt that made the call.
        token: Where the response can be continued; None where the server has said nothing yet.
        ending: How it ended; None while it is under way. "broken": nobody knows whether it has run, and its task went
            on. "cancelled": the same, and it cannot be continued.
        ended_in: `request.retries` of the attempt in which it ended.
        result: What the server answered, JSON types.
        failure: Class name and arguments of the error that the call ended with; JSON types.
        question: Kept free for what the server asks of the client while the call is under way.
    """

    number: int
    what: str
    digest: str
    attempt: int
    token: str | None = None
    ending: Ending | None = None
    ended_in: int = 0
    result: Mapping[str, Any] | None = None
    failure: Mapping[str, Any] | None = None
    question: Mapping[str, Any] | None = None

    @property
    def has_ended(self) -> bool:
        """Whether the call has a result or an error."""
        return self.ending is not None


def digest_of(server: str, method: str, params: Mapping[str, Any]) -> str:
    """Return the hash by which a call is known again. Without `_meta`, where each attempt has tokens of its own."""
    essential = {key: value for key, value in params.items() if key != "_meta"}
    body = json.dumps([server, method, essential], sort_keys=True, separators=(",", ":"), default=str)
    return hashlib.sha256(body.encode()).hexdigest()[:32]


class Journal:
    """The journal of one execution. Used on the event loop of the process; store operations run in a thread."""

    def __init__(
        self,
        store: JournalStore,
        task_id: str,
        *,
        attempt: int,
        max_result_bytes: int,
        keeps_over_retries: bool = True,
        calls_again: bool = False,
    ) -> None:
        self._store = store
        self._task_id = task_id
        self._attempt = attempt
        self._max_result_bytes = max_result_bytes
        self._keeps_over_retries = keeps_over_retries
        #: Whether a call that may have run is made again, whatever its tool says of itself.
        self.calls_again = calls_again
        self._owner = process_name(os.getpid()) + secrets.token_hex(8)
        self._entries: dict[int, Entry] = {}
        self._next = 0
        self._entering = anyio.Lock()
        self._renewal: asyncio.Task[None] | None = None
        #: When the lease was renewed last, by two clocks.
        self._owned_at = (0.0, 0.0)
        #: What is written with the next call: that the one before it broke off.
        self._pending: dict[str, str] = {}
        #: By number of the call: what notes its tokens, one after the other.
        self._token_writes: dict[int, asyncio.Task[None]] = {}
        #: Whether another execution has taken over: what this one does counts no more.
        self.is_superseded = False
        #: The sessions that earlier executions have opened, by server.
        self.sessions: dict[str, SessionHandle] = {}
        #: Whether the task has ended before: nothing is left to do.
        self.is_done = False
        #: Whether an earlier execution has left entries.
        self.is_continued = False

    # -- The lease

    async def begin(self) -> None:
        """Take the lease and read what earlier executions have left. Waits while another execution has it.

        Raises:
            StoreError: The store does not answer.
        """
        has_waited = False
        while True:
            self._owned_at = time.monotonic(), time.time()
            claim = await self._patiently(lambda: self._store.claim_journal(self._task_id, self._owner, LEASE_SECONDS))
            if claim.standing != "held":
                break
            if not has_waited:
                logger.info("Task %s runs elsewhere, or its worker was killed: waiting for its lease", self._task_id)
                has_waited = True
            await anyio.sleep(POLL_SECONDS)
        if claim.standing == "done":
            self.is_done = True
            return
        self._read(claim.fields)
        self._renewal = asyncio.create_task(self._renew(), name=f"mcp_celery lease of {self._task_id}")
        # An attempt whose process was killed has not ended by itself, and is gone on with.
        ended = int(claim.fields.get("ended", -1))
        if not self._keeps_over_retries and 0 <= ended < self._attempt:
            await self._cut(0, "ended")

    async def end(self, *, is_done: bool, is_retried: bool = False) -> None:
        """Give the lease back. With *is_done* the task has ended, and all is forgotten; *is_retried* is noted."""
        if self._renewal is not None:
            self._renewal.cancel()
            self._renewal = None
        if self.is_superseded or self.is_done:
            return
        if not is_done and self._token_writes:
            await asyncio.wait(self._token_writes.values())  # by them, the next attempt continues a call
        try:
            attempt = self._attempt if is_retried else None
            await aside(lambda: self._store.end_journal(self._task_id, self._owner, is_done=is_done, attempt=attempt))
        except StoreError as exc:
            logger.debug("A journal is left to its time to live: %s", exc)

    async def _renew(self) -> None:
        pause_seconds = LEASE_SECONDS / 3
        while True:
            await anyio.sleep(pause_seconds)
            try:
                if not await aside(self._write_now, {}):
                    return
                pause_seconds = LEASE_SECONDS / 3
            except StoreError as exc:
                # The lease may lapse while the store is asked for nothing: again, as soon as it may be asked.
                pause_seconds = POLL_SECONDS
                logger.debug("A lease could not be renewed: %s", exc)
            except JournalError as exc:
                logger.debug("A lease could not be renewed: %s", exc)

    # -- Calls

    @property
    def knows_next(self) -> bool:
        """Whether an earlier execution has noted the next call."""
        return self._next in self._entries

    async def enter(
        self,
        what: str,
        server: str,
        method: str,
        params: Mapping[str, Any],
        prepare: Callable[[], Awaitable[None]] | None = None,
    ) -> tuple[Entry, bool]:
        """Return the entry of the next call, and whether an earlier execution has made it.

        *prepare* is awaited first, where none has noted it; what it raises leaves the call out of the journal.

        Raises:
            JournalMismatchError: The earlier execution made another call here.
            SupersededError: Another execution has taken over.
            StoreError: The store does not answer; the call was not made.
        """
        async with self._entering:  # calls that are made at once are known by the order of their beginnings
            if prepare is not None and not self.knows_next:
                await prepare()
            return await self._enter(what, digest_of(server, method, params))

    async def _enter(self, what: str, digest: str) -> tuple[Entry, bool]:
        number = self._next
        entry = self._entries.get(number)
        if entry is not None and entry.failure is not None and entry.ended_in < self._attempt:
            # A retry is there to do better where the attempt before it has failed; not twice what may have run.
            may_have_run = entry.ending in {"broken", "cancelled"}
            await self._cut(number + may_have_run)
            token = None if entry.ending == "cancelled" else entry.token
            entry = replace(entry, token=token, ending=None, failure=None) if may_have_run else None
        if entry is not None:
            self._entries[number] = entry
            if entry.digest != digest:
                raise JournalMismatchError(
                    f"Call {number + 1} of the task was {entry.what} when it ran before, and is {what} now"
                    + (" with other arguments, or of another server" if entry.what == what else "")
                    + ": a durable task has to make the same calls in the same order when it runs again",
                    number + 1,
                    entry.what,
                    what,
                )
            self._next += 1
            return entry, True
        entry = Entry(number=number, what=what, digest=digest, attempt=self._attempt)
        await self._write(_noted(entry))
        self._entries[number] = entry
        self._next += 1
        return entry, False

    def token_of(self, entry: Entry) -> Callable[[str], Awaitable[None]]:
        """Return what notes the resumption tokens of a call, off its path."""

        async def note(token: str) -> None:
            self._entries[entry.number] = replace(self._entries[entry.number], token=token)
            if entry.number not in self._token_writes:
                self._token_writes[entry.number] = asyncio.create_task(self._note_tokens(entry.number))

        return note

    async def _note_tokens(self, number: int) -> None:
        """Write the last token of a call until there is no later one: of those that come meanwhile, only the last."""
        written = None
        try:
            while (token := self._entries[number].token) != written and token is not None:
                await aside(self._write_now, {f"token:{number}": token})
                written = token
        except (StoreError, JournalError) as exc:
            logger.debug("A resumption token could not be kept: %s", exc)
        finally:
            del self._token_writes[number]

    async def finish(self, entry: Entry, result: Mapping[str, Any], ending: Ending = "result") -> None:
        """Keep what the server has answered, or how the call failed.

        Raises:
            JournalError: It is too large to keep.
            SupersededError: Another execution has taken over.
            StoreError: The store does not answer.
        """
        await self._write({f"end:{entry.number}": self._ended(entry, result, ending)})

    def break_off(self, entry: Entry, failure: Mapping[str, Any]) -> None:
        """Keep how a call broke off, once the task makes another one: till then it can be continued."""
        self._pending = {**self._pending, f"end:{entry.number}": self._ended(entry, failure, "broken")}

    def without_token(self, entry: Entry) -> Entry:
        """Return a call that is made anew: its server does not know the token any more."""
        entry = self._entries[entry.number] = replace(entry, token=None)
        return entry

    async def withdraw(self, entry: Entry, failure: Mapping[str, Any]) -> None:
        """Forget a call that has not reached the server, unless the task makes another one after it."""
        if entry.number + 1 < self._next:  # it has, at the same time
            await self.finish(entry, failure, "failed")
            return
        await self._cut(entry.number)
        self._entries[entry.number] = entry
        self._pending = {**_noted(entry), f"end:{entry.number}": self._ended(entry, failure, "failed")}

    async def note_session(self, handle: SessionHandle) -> None:
        """Keep the handle of a session that this execution has opened, for the next one."""
        self.sessions[handle.server] = handle
        await self._write({f"session:{handle.server}": handle.dumps()})

    # -- Within

    def _ended(self, entry: Entry, value: Mapping[str, Any], ending: Ending) -> str:
        """Note the end of a call here, and return what is to be written of it."""
        text = self._packed({"kind": ending, "attempt": self._attempt, "value": value}, entry.what)
        result, failure = (value, None) if ending == "result" else (None, value)
        known = self._entries[entry.number]
        self._entries[entry.number] = replace(
            known, ending=ending, ended_in=self._attempt, result=result, failure=failure
        )
        return text

    def _read(self, fields: Mapping[str, str]) -> None:
        for name, text in fields.items():
            kind, _, rest = name.partition(":")
            if kind == "call":
                what, digest, attempt = json.loads(text)
                number = int(rest)
                ended = _unpacked(fields[f"end:{number}"]) if f"end:{number}" in fields else {}
                self._entries[number] = Entry(
                    number=number,
                    what=what,
                    digest=digest,
                    attempt=attempt,
                    token=fields.get(f"token:{number}"),
                    ending=ended.get("kind"),
                    ended_in=ended.get("attempt", 0),
                    result=ended.get("value") if ended.get("kind") == "result" else None,
                    failure=ended.get("value") if ended.get("kind") != "result" else None,
                    question=json.loads(fields.get(f"question:{number}", "null")),
                )
            elif kind == "session":
                self.sessions[rest] = SessionHandle.load(text)
        self.is_continued = bool(self._entries or self.sessions)

    async def _cut(self, first: int, *more: str) -> None:
        """Forget the calls from number *first* on, which are made anew, and *more* fields."""
        gone = [number for number in self._entries if number >= first]
        names = [*more, *(f"{kind}:{number}" for number in gone for kind in ("call", "token", "end", "question"))]
        if names and not await self._patiently(lambda: self._store.cut_journal(self._task_id, self._owner, names)):
            raise self._superseded()
        for number in gone:
            del self._entries[number]

    def _packed(self, value: Mapping[str, Any], what: str) -> str:
        text = json.dumps(value, separators=(",", ":"))
        if len(text) > COMPRESS_BYTES:
            text = "z" + base64.b85encode(zlib.compress(text.encode())).decode()
        if len(text) > self._max_result_bytes:
            raise JournalError(
                f"The result of {what} takes {len(text)} bytes in the journal, and {self._max_result_bytes} may be "
                "kept (mcp_journal_max_result_bytes). The call has run. Have the tool return less, or a link to it"
            )
        return text

    async def _write(self, fields: Mapping[str, str]) -> None:
        pending = self._pending
        if not await self._patiently(lambda: self._write_now({**pending, **fields})):
            raise self._superseded()
        if self._pending is pending:  # else another call has broken off meanwhile
            self._pending = {}

    async def has_lost_lease(self) -> bool:
        """Return whether another execution has taken over; where the store does not answer, that is not known.

        It is asked only where the lease may have lapsed since it was renewed.
        """
        if not self.is_superseded and self._is_lease_fresh:
            return False
        return await aside(self.has_lost_lease_now)

    def has_lost_lease_now(self) -> bool:
        """Return what `has_lost_lease` does, without an await: where the store is asked, others on the loop wait."""
        if self.is_superseded or self._is_lease_fresh:
            return self.is_superseded
        try:
            return not self._write_now({})
        except (StoreError, JournalError) as exc:
            logger.debug("It is not known whether a lease was lost: %s", exc)
            return False

    @property
    def _is_lease_fresh(self) -> bool:
        since_monotonic, since_wall = self._owned_at
        # One of the two stops while a machine sleeps.
        age = max(time.monotonic() - since_monotonic, time.time() - since_wall)
        return 0 <= age < LEASE_SECONDS / 2

    def _write_now(self, fields: Mapping[str, str]) -> bool:
        now = time.monotonic(), time.time()
        is_mine = self._store.write_journal(self._task_id, self._owner, fields, LEASE_SECONDS)
        self.is_superseded = self.is_superseded or not is_mine
        if is_mine:
            self._owned_at = now
        return is_mine

    def _superseded(self) -> SupersededError:
        self.is_superseded = True
        return SupersededError(HAS_TAKEN_OVER)

    async def _patiently(self, question: Callable[[], Any]) -> Any:
        """Ask the store, for `PATIENCE_SECONDS` where it does not answer."""
        deadline = time.monotonic() + PATIENCE_SECONDS
        while True:
            try:
                return await aside(question)
            except StoreError:
                if time.monotonic() > deadline:
                    raise
                await anyio.sleep(POLL_SECONDS)


def _noted(entry: Entry) -> dict[str, str]:
    """Return what is written before a call is sent."""
    return {f"call:{entry.number}": json.dumps([entry.what, entry.digest, entry.attempt])}


def _unpacked(text: str) -> dict[str, Any]:
    if text.startswith("z"):
        text = zlib.decompress(base64.b85decode(text[1:])).decode()
    value: dict[str, Any] = json.loads(text)
    return value
