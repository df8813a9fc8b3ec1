"""A reverse proxy between a client and a real MCP server that records every request and injects faults."""

import asyncio
import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import Self
from urllib.parse import urlsplit, urlunsplit

from peers.exchanges import Answer, Exchange, Fault, Record
from peers.relay import Relay, Target

#: What a recorder's listening socket tells its owner once it runs: loop, stop event, port.
_Started = Future[tuple[asyncio.AbstractEventLoop, asyncio.Event, int]]


class Recorder:
    """Listens on a free port of 127.0.0.1 and passes everything on to *upstream_url*.

    Runs in a thread of its own between `__enter__` and `__exit__`. All methods may be called from any
    thread. When upstream cannot be reached or breaks off, the client's connection is closed, no more.

    Faults are claimed in the order in which they were added, each by the next requests that match both
    its `http_method` and its `rpc_method` (None: any), *times* times. Except for `answer`, the request
    really is sent on, so that a tool runs.
    """

    def __init__(self, upstream_url: str) -> None:
        self._target = Target(urlsplit(upstream_url))
        self._record = Record()
        self._failures: list[Exception] = []
        self._relays: set[asyncio.Task[None]] = set()
        self._started: _Started = Future()
        self._thread = threading.Thread(target=lambda: asyncio.run(self._serve()), name="recorder", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        *_, port = self._started.result(timeout=10)
        self.url = urlunsplit(self._target.url._replace(netloc=f"127.0.0.1:{port}"))
        return self

    def __exit__(self, *exc_info: object) -> None:
        """Close every connection, of clients too.

        Raises:
            ExceptionGroup: The recorder itself failed on a request, which no test should survive.
        """
        loop, stop, _ = self._started.result()
        loop.call_soon_threadsafe(stop.set)
        self._thread.join(timeout=10)
        if self._thread.is_alive():
            raise TimeoutError("the recorder did not stop")
        if self._failures:
            raise ExceptionGroup("the recorder failed", self._failures)

    # What was seen

    @property
    def exchanges(self) -> list[Exchange]:
        """All exchanges since the last `clear()`, in the order in which their requests were complete."""
        return self._record.exchanges

    @property
    def connections(self) -> int:
        """How many TCP connections clients have opened since the last `clear()`."""
        return self._record.connections

    @property
    def session_ids(self) -> list[str]:
        """The distinct session IDs that answers to `initialize` handed out, oldest first."""
        answers = [e.response_headers or {} for e in self.exchanges if e.rpc_method == "initialize"]
        return list(dict.fromkeys(headers["mcp-session-id"] for headers in answers if "mcp-session-id" in headers))

    def methods(self) -> list[str]:
        """The requests in short, such as ["POST initialize", "POST tools/call", "GET", "DELETE"]."""
        return [exchange.name for exchange in self.exchanges]

    def clear(self) -> None:
        """Forget the exchanges and the pending faults, and count connections from zero; cookies stay."""
        self._record.clear()

    def wait_for(self, predicate: Callable[[Exchange], bool], timeout: float = 30) -> Exchange:
        """Return the first exchange that satisfies *predicate*, once there is one.

        Raises:
            TimeoutError: There was none in *timeout* seconds.
        """
        exchange = self._record.wait_for(predicate, timeout)
        if exchange is None:
            raise TimeoutError(f"no such exchange in {timeout} s; there were {self.methods()}")
        return exchange

    # Faults

    def cut(
        self,
        *,
        http_method: str | None = None,
        rpc_method: str | None = None,
        after_events: int = 1,
        times: int = 1,
    ) -> None:
        """Break the connection once *after_events* server-sent events have passed (0: after the headers).

        A response with fewer events passes unharmed.
        """
        self._record.add_fault(Fault("close", http_method, rpc_method, times, after_events))

    def drop(self, *, http_method: str | None = None, rpc_method: str | None = None, times: int = 1) -> None:
        """Break the connection when upstream has begun to answer, before a byte of that reaches the client."""
        self._record.add_fault(Fault("close", http_method, rpc_method, times))

    def stall(
        self,
        *,
        http_method: str | None = None,
        rpc_method: str | None = None,
        after_events: int | None = None,
        times: int = 1,
    ) -> None:
        """Pass nothing on after *after_events* events (None: nothing at all), until the client leaves."""
        self._record.add_fault(Fault("stall", http_method, rpc_method, times, after_events))

    def answer(
        self,
        *,
        status: int,
        http_method: str | None = None,
        rpc_method: str | None = None,
        body: bytes = b"",
        content_type: str = "application/json",
        headers: dict[str, str] | None = None,
        times: int = 1,
    ) -> None:
        """Answer without asking upstream."""
        answer = Answer(status, body, {"Content-Type": content_type, **(headers or {})})
        self._record.add_fault(Fault("answer", http_method, rpc_method, times, answer=answer))

    def set_cookie(self, cookie: str) -> None:
        """Add `Set-Cookie: <cookie>` to every answer to `initialize` from now on."""
        self._target.cookies.append(cookie)

    # The thread

    async def _serve(self) -> None:
        stop = asyncio.Event()
        try:
            server = await asyncio.start_server(self._accept, "127.0.0.1", 0, backlog=1024)
        except OSError as exc:
            self._started.set_exception(exc)
            return
        self._started.set_result((asyncio.get_running_loop(), stop, server.sockets[0].getsockname()[1]))
        await stop.wait()
        server.close()
        while self._relays:
            for relay in self._relays:
                relay.cancel()
            await asyncio.wait(self._relays)
        await server.wait_closed()

    def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.create_task(Relay(self._record, self._target, reader, writer).run())
        self._relays.add(task)
        task.add_done_callback(self._forget)

    def _forget(self, task: asyncio.Task[None]) -> None:
        self._relays.discard(task)
        if not task.cancelled() and isinstance(failure := task.exception(), Exception):
            self._failures.append(failure)
