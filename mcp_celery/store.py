"""What outlives a worker: which sessions there are, who still holds each, until when, and what happened in them.

The store is never needed to go on: the handle in a message is enough to resume. Without an answer from the store a
session is left to the idle timeout of its server.
"""

import socket
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import Any, Literal, NamedTuple, Protocol

from .handle import SessionHandle


class Standing(Enum):
    """Where a session stands once its holders have changed."""

    #: Somebody holds it.
    HELD = "held"
    #: The caller has left it without holders, and is the one to end it.
    LAST = "last"
    #: It has ended, was lost, or somebody else is ending it: nothing is left to do.
    ENDED = "ended"
    #: The store does not know it: it never did, was flushed, or has forgotten it.
    UNCOUNTED = "uncounted"


class Leaving(Enum):
    """What is to become of a session that has no holders after a change."""

    #: The caller ends it at the server, then says so with `Store.ended`.
    CLOSE = "close"
    #: It stays alive at the server and is nobody's business here.
    DETACH = "detach"
    #: The reaper ends it soon: the caller may not, or cannot.
    ABANDON = "abandon"
    #: The server has lost it: there is nothing to end.
    LOST = "lost"


@dataclass(frozen=True, kw_only=True)
class Change:
    """What one step does to the holders of a session. Holders are task IDs."""

    leaving: Sequence[str] = ()
    #: Task ID to task name. Who has left does not join any more, not even where it left before it joined.
    joining: Mapping[str, str] = field(default_factory=dict)
    #: Unless it is said here: what replaces a task has its ID, and may come later.
    may_return: bool = False
    #: What to do where nobody holds it then.
    when_empty: Leaving = Leaving.CLOSE
    #: Begin to count where the store does not know the session: the caller knows all of its holders.
    create: bool = False
    #: For the history, JSON types.
    events: Sequence[Mapping[str, Any]] = ()
    #: Who opened the session, JSON types; kept when the counting begins.
    opened_by: Mapping[str, Any] | None = None
    #: Seconds without use after which the reaper pings the session; 0 for never.
    keepalive_seconds: float = 0
    #: `ServerSettings.place` of the server, as the caller has it; empty where it does not.
    place: str = ""
    #: More holders may join within so many seconds, though nobody should be there meanwhile.
    settling_seconds: float = 0


class Parked(NamedTuple):
    """A session that the reaper has taken on. *place* is where it was used last; empty where that is not known."""

    key: str
    handle: SessionHandle
    place: str = ""


@dataclass(frozen=True, kw_only=True)
class SessionRecord:
    """What the store knows of a session. Holds no secret. Times are seconds since the epoch, by the store's clock."""

    #: `SessionHandle.key`.
    key: str
    server: str
    #: "open", "closing", "closed", "detached" or "lost".
    state: str
    opened_at: float
    #: `{"task": name, "id": task ID, "worker": host name}`; empty for a session that was given from outside.
    opened_by: Mapping[str, Any]
    #: Task ID to task name.
    holders: Mapping[str, str]
    used_at: float
    #: When the reaper ends it, unless it is used before; None once it has ended.
    deadline: float | None
    ended_at: float | None

    @property
    def short_id(self) -> str:
        """The first 8 hex digits of the SHA-256 of the session ID."""
        return self.key[:8]


class Claim(NamedTuple):
    """What the store says to one who wants a journal.

    Attributes:
        standing: "mine"; "held" by another execution; or "done", where the task has ended.
        fields: The journal, as it was written, where it is "mine".
    """

    standing: Literal["mine", "held", "done"]
    fields: Mapping[str, str]


def process_name(pid: int) -> str:
    """Return what the owners of journals in a process of this machine begin with."""
    return f"{socket.gethostname()}:{pid}:"


class JournalStore(Protocol):
    """Keeps journals by task ID, as flat mappings of texts. Each method is one atomic step and one round trip.

    Raises (each method):
        StoreError: The store did not answer.
    """

    def claim_journal(self, task_id: str, owner: str, lease_seconds: float) -> Claim:
        """Take the lease, or say who has it.

        Raises:
            JournalError: The journal is of another version.
        """
        ...

    def write_journal(self, task_id: str, owner: str, fields: Mapping[str, str], lease_seconds: float) -> bool:
        """Add *fields* and renew the lease; False, and nothing, where *owner* has lost it.

        Raises:
            JournalError: There is no journal any more: the store has lost it.
        """
        ...

    def cut_journal(self, task_id: str, owner: str, fields: Sequence[str]) -> bool:
        """Remove *fields*; False, and nothing, where *owner* has lost the lease.

        Raises:
            JournalError: As above.
        """
        ...

    def end_journal(self, task_id: str, owner: str, *, is_done: bool, attempt: int | None) -> None:
        """Give the lease back. Where the task has ended, forget all but that; else note the *attempt* that has."""
        ...

    def drop_journal(self, task_id: str) -> None:
        """Forget all of a task that will never run again."""
        ...

    def release_journal(self, task_id: str, process: str) -> None:
        """Take the lease from an execution in a process that is known to be dead: its owner begins with *process*."""
        ...


class Store(JournalStore, Protocol):
    """Counts the holders of sessions, and keeps the journals of durable tasks.

    Each method that changes something is one atomic step.
    A session goes by `SessionHandle.key`, a hash of its ID. Where *servers* are asked for (name to place), sessions of
    others are passed over, and so are those that were used at another place.

    Raises (each method):
        StoreError: The store did not answer.
    """

    def check(self) -> None:
        """Look at the settings; nothing is sent.

        Raises:
            ConfigurationError: With these, no store can be reached.
        """
        ...

    # -- For tasks

    def change(self, handle: SessionHandle, change: Change) -> Standing:
        """Have holders leave and join, note what happened, and renew the deadline."""
        ...

    def ended(self, key: str, event: Mapping[str, Any]) -> None:
        """Note that the session has ended at its server; forget all but its history."""
        ...

    def lost_at(self, key: str) -> float | None:
        """Return when the session was found to be lost at its server, or None."""
        ...

    # -- For workers

    def held_by(self, task_id: str) -> list[SessionHandle]:
        """Return the handles of the sessions that a task holds."""
        ...

    def abandon(self, task_ids: Sequence[str]) -> None:
        """Have these tasks, which never run or have died, hold nothing; what nobody holds then, the reaper ends."""
        ...

    def renew(self, task_ids: Sequence[str]) -> dict[str, list[SessionRecord]]:
        """Renew the deadlines of all sessions that these tasks hold, for they run; return the sessions of each."""
        ...

    def announce(self, names: Sequence[str]) -> None:
        """Note that these tasks are MCP tasks, for workers that do not have them. Forgotten when not said again."""
        ...

    def announced(self) -> frozenset[str]:
        """Return the names of all MCP tasks that some worker has."""
        ...

    def lead(self, worker: str, seconds: float, servers: Mapping[str, str]) -> bool:
        """Return whether *worker* leads those that know *servers*, for the next *seconds*: it did, or nobody does."""
        ...

    def resign(self, worker: str, servers: Mapping[str, str]) -> None:
        """Have *worker* lead no more."""
        ...

    def has_due(self, servers: Mapping[str, str]) -> bool:
        """Return whether a session of *servers* is past its deadline or is to be pinged."""
        ...

    # -- For the reaper

    def take_expired(self, limit: int, servers: Mapping[str, str]) -> list[Parked]:
        """Return sessions of *servers* past their deadline, for the caller to end; not again within a minute."""
        ...

    def take_idle(self, limit: int, servers: Mapping[str, str]) -> list[Parked]:
        """Return held sessions of *servers* that were idle for their time, for the caller to ping; once."""
        ...

    def note_lost(self, key: str) -> None:
        """Note that the server no longer knows the session."""
        ...

    # -- For commands

    def sessions(self, *, ended: bool = False) -> Iterator[SessionRecord]:
        """Return the sessions that have not ended, the next deadline first.

        With *ended* those whose history is kept, the last ended first.
        """
        ...

    def find(self, digits: str) -> list[SessionRecord]:
        """Return the sessions, ended ones too, whose key begins with *digits*."""
        ...

    def history(self, key: str) -> list[dict[str, Any]]:
        """Return what happened in a session, in order; of a long history its end."""
        ...

    def take(self, key: str) -> Parked | None:
        """Return a session for the caller to end now, whoever holds it; None where it has ended."""
        ...
