"""What went through a recorder, and which faults it still has to commit: values and their thread-safe log."""

import json
import re
import threading
from collections.abc import Callable
from dataclasses import dataclass, replace
from http.cookies import SimpleCookie
from typing import Any, Literal


@dataclass(frozen=True, slots=True)
class Exchange:
    """One HTTP request and what became of it; later snapshots hold later states."""

    number: int
    connection: int
    method: str
    path: str
    headers: dict[str, str]
    body: bytes
    started: float
    #: Of a JSON-RPC request or notification; None for anything else.
    rpc_method: str | None = None
    #: Of any JSON-RPC message, so also of a response that the client POSTs.
    rpc_id: str | int | None = None
    rpc_params: dict[str, Any] | None = None
    #: What the client sees; None while, or when, no response byte has reached it.
    status: int | None = None
    response_headers: dict[str, str] | None = None
    #: When the last byte was passed on or the connection broke (`time.monotonic`).
    ended: float | None = None

    @property
    def session_id(self) -> str | None:
        """The `Mcp-Session-Id` that the client sent."""
        return self.headers.get("mcp-session-id")

    @property
    def cookies(self) -> dict[str, str]:
        """The cookies that the client sent."""
        return {name: morsel.value for name, morsel in SimpleCookie(self.headers.get("cookie", "")).items()}

    @property
    def name(self) -> str:
        """Such as "POST tools/call" or "GET"."""
        return f"{self.method} {self.rpc_method}" if self.rpc_method else self.method


def read_rpc(body: bytes) -> dict[str, Any]:
    """The `rpc_*` fields of the message in *body*; empty when it holds no single JSON-RPC message."""
    try:
        message = json.loads(body)
    except ValueError:
        return {}
    if not isinstance(message, dict):
        return {}
    return {
        "rpc_method": message.get("method"),
        "rpc_id": message.get("id"),
        "rpc_params": message.get("params"),
    }


@dataclass(frozen=True, slots=True)
class Answer:
    """A response that the recorder gives itself."""

    status: int
    body: bytes
    headers: dict[str, str]


@dataclass(slots=True)
class Fault:
    """What to do to the next *times* requests that match.

    *after_events* counts the server-sent events that pass before it happens: None is before any byte of
    the response, 0 is after its headers. Comments are not counted; an event that only carries an ID is.
    """

    action: Literal["answer", "close", "stall"]
    http_method: str | None
    rpc_method: str | None
    times: int
    after_events: int | None = None
    answer: Answer | None = None

    def matches(self, exchange: Exchange) -> bool:
        """Whether *exchange* has the HTTP and JSON-RPC method asked for (None: any)."""
        return self.http_method in {None, exchange.method} and self.rpc_method in {None, exchange.rpc_method}


class EventCounter:
    """Finds where, in a stream of server-sent events, the last one that may pass has ended."""

    _END = re.compile(rb"\r\n\r\n|\n\n|\r\r")

    def __init__(self, allowed: int) -> None:
        self._left = allowed
        self._block = b""

    def allow(self, chunk: bytes) -> tuple[bytes, bool]:
        """Return what of *chunk* may pass, and whether that was the last of it."""
        if self._left <= 0:
            return b"", True
        earlier = len(self._block)
        self._block += chunk
        start = 0
        for end in self._END.finditer(self._block):
            lines = self._block[start : end.start()].splitlines()
            start = end.end()
            self._left -= any(line and not line.startswith(b":") for line in lines)
            if not self._left:
                return chunk[: start - earlier], True
        self._block = self._block[start:]
        return chunk, False


class Record:
    """The exchanges and pending faults of one recorder, shared by its own thread and the test's."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._exchanges: dict[int, Exchange] = {}
        self._faults: list[Fault] = []
        self._requests = 0
        self._connections = 0
        self._cleared_connections = 0

    @property
    def exchanges(self) -> list[Exchange]:
        with self._changed:
            return list(self._exchanges.values())

    @property
    def connections(self) -> int:
        with self._changed:
            return self._connections - self._cleared_connections

    def connected(self) -> int:
        """Count one more client connection; returns its number."""
        with self._changed:
            self._connections += 1
            return self._connections

    def opened(self, **fields: Any) -> tuple[Exchange, Fault | None]:
        """Log a new request and claim the first fault that is meant for it."""
        with self._changed:
            self._requests += 1
            exchange = Exchange(number=self._requests, **fields)
            self._exchanges[exchange.number] = exchange
            fault = next((fault for fault in self._faults if fault.matches(exchange)), None)
            if fault is not None:
                fault.times -= 1
                if not fault.times:
                    self._faults.remove(fault)
            self._changed.notify_all()
            return exchange, fault

    def update(self, number: int, **fields: Any) -> None:
        """Fill in what is now known; silently nothing when the log was cleared meanwhile."""
        with self._changed:
            if number in self._exchanges:
                self._exchanges[number] = replace(self._exchanges[number], **fields)
                self._changed.notify_all()

    def add_fault(self, fault: Fault) -> None:
        with self._changed:
            self._faults.append(fault)

    def clear(self) -> None:
        """Forget all exchanges and pending faults, and count connections from zero again."""
        with self._changed:
            self._exchanges.clear()
            self._faults.clear()
            self._cleared_connections = self._connections

    def wait_for(self, predicate: Callable[[Exchange], bool], timeout: float) -> Exchange | None:
        """Block until an exchange satisfies *predicate*; None when none did in *timeout* seconds."""

        def found() -> Exchange | None:
            return next((exchange for exchange in self._exchanges.values() if predicate(exchange)), None)

        with self._changed:
            return self._changed.wait_for(found, timeout)
