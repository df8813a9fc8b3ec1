"""One client connection of a recorder: HTTP/1.1 in, HTTP/1.1 out, byte for byte as it comes."""

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from urllib.parse import SplitResult

import h11
from peers.exchanges import Answer, EventCounter, Exchange, Fault, Record, read_rpc

_HOP_BY_HOP = {b"connection", b"keep-alive"}


class ConnectionBroken(Exception):  # noqa: N818 - it ends a connection, which is no error here
    """Either end of the connection went away, or a fault asks for it to look so."""


@dataclass
class Target:
    """Where requests go, and what is added to the answers."""

    url: SplitResult
    cookies: list[str] = field(default_factory=list)


async def close(writer: asyncio.StreamWriter) -> None:
    """Close without waiting for a peer that does not read."""
    writer.close()
    with contextlib.suppress(OSError, TimeoutError):
        async with asyncio.timeout(1):
            await writer.wait_closed()
    writer.transport.abort()


@contextlib.asynccontextmanager
async def connect(url: SplitResult) -> AsyncIterator[tuple[asyncio.StreamReader, asyncio.StreamWriter]]:
    """A connection to *url* for one exchange."""
    try:
        reader, writer = await asyncio.open_connection(url.hostname, url.port)
    except OSError as exc:
        raise ConnectionBroken from exc
    try:
        yield reader, writer
    finally:
        await close(writer)


async def next_event(http: h11.Connection, reader: asyncio.StreamReader) -> h11.Event | type[h11.PAUSED]:
    """The next event of *http*, reading as much as it takes.

    Raises:
        ConnectionBroken: The stream ended in the middle of a message.
    """
    while (event := http.next_event()) is h11.NEED_DATA:
        try:
            http.receive_data(await reader.read(65536))
        except OSError as exc:
            raise ConnectionBroken from exc
    return event


class Relay:
    """Passes the requests of one client connection on, one upstream connection for each.

    A request is read whole before it is sent on; a response is passed on chunk by chunk. The client's
    connection stays open between requests. When the client leaves, the upstream connection is closed too.
    """

    def __init__(
        self, record: Record, target: Target, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        self._record = record
        self._target = target
        self._reader = reader
        self._writer = writer
        self._http = h11.Connection(h11.SERVER)
        self._number = record.connected()
        # `drain` then returns only once the kernel has everything, so that a cut loses nothing that was passed on.
        writer.transport.set_write_buffer_limits(high=0)

    async def run(self) -> None:
        """Serve until either end closes the connection."""
        try:
            while request := await self._read_request():
                await self._unless_client_leaves(self._exchange(*request))
                if self._http.our_state is not h11.DONE or self._http.their_state is not h11.DONE:
                    return
                self._http.start_next_cycle()
        except (ConnectionBroken, h11.RemoteProtocolError, ConnectionError):
            pass
        finally:
            await close(self._writer)

    async def _read_request(self) -> tuple[h11.Request, bytes] | None:
        request = await next_event(self._http, self._reader)
        if not isinstance(request, h11.Request):
            return None
        body = bytearray()
        while isinstance(event := await next_event(self._http, self._reader), h11.Data):
            body += event.data
        return request, bytes(body)

    async def _unless_client_leaves(self, exchange: asyncio.Future) -> None:
        """Await *exchange*, but cancel it when the client closes its connection meanwhile."""
        working = asyncio.ensure_future(exchange)
        reading = asyncio.ensure_future(self._reader.read(65536))
        try:
            while not working.done():
                await asyncio.wait({working, reading}, return_when=asyncio.FIRST_COMPLETED)
                if reading.done():
                    if not (early := reading.result()):
                        raise ConnectionBroken
                    self._http.receive_data(early)
                    reading = asyncio.ensure_future(self._reader.read(65536))
            working.result()
        finally:
            working.cancel()
            reading.cancel()
            await asyncio.gather(working, reading, return_exceptions=True)
            if not reading.cancelled() and reading.exception() is None:
                self._http.receive_data(reading.result())

    async def _exchange(self, request: h11.Request, body: bytes) -> None:
        exchange, fault = self._record.opened(
            connection=self._number,
            method=request.method.decode(),
            path=request.target.decode(),
            headers={name.decode(): value.decode("latin-1") for name, value in request.headers},
            body=body,
            started=time.monotonic(),
            **read_rpc(body),
        )
        try:
            if fault is not None and fault.answer is not None:
                await self._give(exchange, fault.answer)
            else:
                await self._forward(exchange, request, fault)
        finally:
            self._record.update(exchange.number, ended=time.monotonic())

    async def _give(self, exchange: Exchange, answer: Answer) -> None:
        headers = [*answer.headers.items(), ("Content-Length", str(len(answer.body)))]
        await self._send_head(exchange, h11.Response(status_code=answer.status, headers=headers))
        await self._send(h11.Data(data=answer.body), h11.EndOfMessage())

    async def _forward(self, exchange: Exchange, request: h11.Request, fault: Fault | None) -> None:
        async with connect(self._target.url) as (reader, writer):
            http = h11.Connection(h11.CLIENT)
            headers = [(name, value) for name, value in request.headers.raw_items() if name.lower() != b"host"]
            headers.insert(0, (b"Host", self._target.url.netloc.encode()))
            head = h11.Request(method=request.method, target=request.target, headers=headers)
            for event in (head, h11.Data(data=exchange.body), h11.EndOfMessage()):
                writer.write(http.send(event))
            try:
                await writer.drain()
                response = await next_event(http, reader)
                while isinstance(response, h11.InformationalResponse):
                    response = await next_event(http, reader)
                await self._pass_on(exchange, response, http, reader, fault)
            except (h11.RemoteProtocolError, ConnectionError) as exc:
                raise ConnectionBroken from exc

    async def _pass_on(
        self,
        exchange: Exchange,
        response: h11.Response,
        http: h11.Connection,
        reader: asyncio.StreamReader,
        fault: Fault | None,
    ) -> None:
        if fault is not None and fault.after_events is None:
            await self._commit(fault)
        headers = [item for item in response.headers.raw_items() if item[0].lower() not in _HOP_BY_HOP]
        if exchange.rpc_method == "initialize":
            headers += [(b"Set-Cookie", cookie.encode()) for cookie in self._target.cookies]
        await self._send_head(exchange, h11.Response(status_code=response.status_code, headers=headers))
        counter = EventCounter(fault.after_events or 0) if fault is not None else None
        if fault is not None and fault.after_events == 0:
            await self._commit(fault)
        while isinstance(event := await next_event(http, reader), h11.Data):
            if counter is None:
                await self._send(h11.Data(data=event.data))
                continue
            chunk, last = counter.allow(bytes(event.data))
            await self._send(h11.Data(data=chunk))
            if last:
                await self._commit(fault)
        await self._send(h11.EndOfMessage())

    async def _commit(self, fault: Fault) -> None:
        """Hang until the client leaves, or break the connection now."""
        if fault.action == "stall":
            await asyncio.Event().wait()
        raise ConnectionBroken

    async def _send_head(self, exchange: Exchange, response: h11.Response) -> None:
        await self._send(response)
        self._record.update(
            exchange.number,
            status=response.status_code,
            response_headers={name.decode(): value.decode("latin-1") for name, value in response.headers},
        )

    async def _send(self, *events: h11.Event) -> None:
        for event in events:
            self._writer.write(self._http.send(event) or b"")
        await self._writer.drain()
