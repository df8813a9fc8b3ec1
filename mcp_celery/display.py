"""Sessions, servers, checks and histories as the rows of tables, and as JSON. Nothing here shows a secret."""

import time
from collections.abc import Iterable
from dataclasses import asdict
from datetime import UTC, datetime
from itertools import islice
from typing import TYPE_CHECKING, Any

from .exceptions import ConfigurationError
from .handle import server_name
from .history import History, duration
from .settings import ServerSettings
from .store import SessionRecord

if TYPE_CHECKING:
    from .check import Check

#: Tasks that are named of those that hold a session.
NAMED_HOLDERS = 3

SESSION_HEADER = ("session", "server", "state", "opened by", "age", "idle", "deadline", "ended", "holders")
HISTORY_HEADER = ("at", "took", "worker", "what")
SERVER_HEADER = ("server", "url", "headers", "connect", "read", "keepalive", "problem")
CHECK_HEADER = ("server", "reachable", "protocol", "era", "session", "event store", "tools", "latency", "problem")


# -- Sessions


def session_row(record: SessionRecord) -> tuple[str, ...]:
    """Return the cells under `SESSION_HEADER`."""
    now = time.time()
    return (
        record.short_id,
        record.server,
        record.state,
        _opener(record),
        _age(now - record.opened_at),
        _age(now - record.used_at) if record.ended_at is None else "",
        _deadline(record),
        "" if record.ended_at is None else f"{_age(now - record.ended_at)} ago",
        _holders(record),
    )


def session_json(record: SessionRecord) -> dict[str, Any]:
    """Return what the store knows of a session as JSON types; times are seconds since the epoch."""
    fields = asdict(record)
    del fields["key"]
    return {"session": record.short_id, **fields}


def session_facts(record: SessionRecord) -> list[tuple[str, str]]:
    """Return names and values of what the store knows of a session."""
    facts = [
        ("Session", record.short_id),
        ("Server", record.server),
        ("State", record.state),
        ("Opened", f"{_clock(record.opened_at)} by {_opener(record)}"),
        ("Last used", _clock(record.used_at)),
    ]
    if record.ended_at is not None:
        return [*facts, ("Ended", _clock(record.ended_at))]
    return [*facts, ("Held by", _holders(record) or "nobody"), ("Deadline", _deadline(record))]


def history_rows(history: History) -> Iterable[tuple[str, ...]]:
    """Return the cells under `HISTORY_HEADER`."""
    for row in history.rows():
        took = "" if row.seconds is None else duration(row.seconds)
        yield f"+{duration(row.at)}", took, row.worker, "  " * row.is_inner + row.text


def _opener(record: SessionRecord) -> str:
    task, worker = record.opened_by.get("task"), record.opened_by.get("worker")
    return f"{task or '?'} on {worker or '?'}" if task or worker else "unknown"


def _holders(record: SessionRecord) -> str:
    names = list(dict.fromkeys(record.holders.values()))
    more = f" and {len(names) - NAMED_HOLDERS} more" if len(names) > NAMED_HOLDERS else ""
    count = f" ({len(record.holders)} tasks)" if len(record.holders) > len(names) else ""
    return ", ".join(islice(names, NAMED_HOLDERS)) + more + count


def _deadline(record: SessionRecord) -> str:
    if record.deadline is None:
        return ""
    left = record.deadline - time.time()
    return f"in {_age(left)}" if left > 0 else f"{_age(-left)} ago"


def _age(seconds: float) -> str:
    return duration(max(0, int(seconds)))


def _clock(at: float) -> str:
    clock = datetime.fromtimestamp(at, UTC).astimezone().isoformat(" ", "seconds")
    return f"{clock}, {_age(time.time() - at)} ago"


# -- Servers


def server_row(name: str, settings: ServerSettings | ConfigurationError) -> tuple[str, ...]:
    """Return the cells under `SERVER_HEADER`: no credentials, of headers the names."""
    if isinstance(settings, ConfigurationError):
        return (name, "", "", "", "", "", str(settings))
    return (
        name,
        server_name(settings.url),
        ", ".join(header for header, _ in settings.headers) or "-",
        duration(settings.connect_timeout_seconds),
        duration(settings.read_timeout_seconds),
        duration(settings.keepalive_seconds) if settings.keepalive_seconds else "never",
        "",
    )


def server_json(name: str, settings: ServerSettings | ConfigurationError) -> dict[str, Any]:
    """Return the settings of a server as JSON types: no credentials, of headers the names."""
    if isinstance(settings, ConfigurationError):
        return {"server": name, "error": str(settings)}
    fields = asdict(settings)
    del fields["name"]
    headers = [header for header, _ in settings.headers]
    return {"server": name, **fields, "url": server_name(settings.url), "headers": headers, "error": None}


def check_row(check: "Check") -> tuple[str, ...]:
    """Return the cells under `CHECK_HEADER`."""
    if check.error is not None:
        return (check.server, "no", "", "", "", "", "", "", check.error)
    return (
        check.server,
        "yes",
        check.protocol_version or "unknown",
        check.era or "unknown",
        _answer(check.session),
        _answer(check.event_store),
        str(check.tools),
        f"{(check.latency_seconds or 0) * 1000:.1f}ms",
        "",
    )


def check_json(check: "Check") -> dict[str, Any]:
    """Return what a server has shown as JSON types."""
    return {"reachable": check.error is None, **asdict(check)}


def _answer(value: bool | None) -> str:
    return "unknown" if value is None else "yes" if value else "no"
