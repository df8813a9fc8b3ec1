"""A TCP relay, before a Valkey or a RabbitMQ, whose connections can be cut or held up."""

import asyncio
import threading
from concurrent.futures import Future
from contextlib import suppress
from typing import Self


class TcpRelay:
    """Listens on a free port of 127.0.0.1 and passes bytes on to *port* of *host*, between `__enter__` and `__exit__`.

    Runs in a thread of its own. Methods may be called from any thread.
    """

    def __init__(self, port: int, host: str = "127.0.0.1") -> None:
        self._upstream = host, port
        self._writers: set[asyncio.StreamWriter] = set()
        self._started: Future[int] = Future()
        self._thread = threading.Thread(target=lambda: asyncio.run(self._serve()), name="relay", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        self.port = self._started.result(timeout=10)
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._loop.call_soon_threadsafe(self._stop.set)
        self._thread.join(timeout=10)

    def cut(self) -> int:
        """Break all connections; return how many there were. New ones are taken at once."""

        async def cut() -> int:
            writers = list(self._writers)
            for writer in writers:
                writer.transport.abort()
            return len(writers) // 2

        return asyncio.run_coroutine_threadsafe(cut(), self._loop).result(timeout=10)

    def hold(self) -> None:
        """Pass nothing on, until `let_go`."""
        self._loop.call_soon_threadsafe(self._flows.clear)

    def let_go(self) -> None:
        self._loop.call_soon_threadsafe(self._flows.set)

    async def _serve(self) -> None:
        self._loop, self._stop, self._flows = asyncio.get_running_loop(), asyncio.Event(), asyncio.Event()
        self._flows.set()
        server = await asyncio.start_server(self._accept, "127.0.0.1", 0, backlog=1024)
        self._started.set_result(server.sockets[0].getsockname()[1])
        await self._stop.wait()
        server.close()
        for writer in list(self._writers):
            writer.transport.abort()

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            upstream_reader, upstream_writer = await asyncio.open_connection(*self._upstream)
        except OSError:
            writer.transport.abort()
            return
        both = {writer, upstream_writer}
        self._writers |= both
        flows = [
            asyncio.create_task(self._pass_on(reader, upstream_writer)),
            asyncio.create_task(self._pass_on(upstream_reader, writer)),
        ]
        try:
            await asyncio.wait(flows, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for flow in flows:
                flow.cancel()
            await asyncio.gather(*flows, return_exceptions=True)
            self._writers -= both
            for end in both:
                end.close()

    async def _pass_on(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with suppress(OSError):
            while data := await reader.read(65536):
                await self._flows.wait()
                writer.write(data)
                await writer.drain()
