"""An MCP server in a thread of the test: just enough of Streamable HTTP, answered in JSON, and a journal of it all."""

import asyncio
import json
import threading
import uuid
from collections.abc import Iterable
from concurrent.futures import Future
from typing import Any, Protocol, Self

from mcp_celery.handle import short_hash

_TOOLS = {"tools": [{"name": "echo", "inputSchema": {"type": "object"}}]}
_ECHO = {"content": [{"type": "text", "text": "x"}], "isError": False}
_NEGOTIATED = {
    "protocolVersion": "2025-11-25",
    "capabilities": {"tools": {}},
    "serverInfo": {"name": "q", "version": "1"},
}


class Journal(Protocol):
    """Takes what happens, in order."""

    def append(self, event: dict[str, Any], /) -> object:
        """Return when *event* is written."""


class QuickServer:
    """Listens on a free port of 127.0.0.1 between `__enter__` and `__exit__`.

    What it is asked goes to `journal`, in order: `{"what": "opened" | "used" | "deleted" | "refused", "session": the
    short form of its ID}`. "refused" is any request in a session that it does not know, or no longer. It knows
    *sessions* from the beginning, and takes *delete_seconds* to end one.
    """

    def __init__(self, journal: Journal, sessions: Iterable[str] = (), *, delete_seconds: float = 0) -> None:
        self._journal = journal
        self._delete_seconds = delete_seconds
        self._sessions = set(sessions)
        self._started: Future[tuple[asyncio.AbstractEventLoop, asyncio.Event, int]] = Future()
        self._thread = threading.Thread(target=lambda: asyncio.run(self._serve()), name="quick server", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        *_, port = self._started.result(timeout=10)
        self.url = f"http://127.0.0.1:{port}/mcp"
        return self

    def __exit__(self, *exc_info: object) -> None:
        loop, stop, _ = self._started.result()
        loop.call_soon_threadsafe(stop.set)
        self._thread.join(timeout=10)

    async def _serve(self) -> None:
        stop = asyncio.Event()
        connections: dict[asyncio.Task[None] | None, asyncio.StreamWriter] = {}

        async def accept(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            task = asyncio.current_task()
            connections[task] = writer
            try:
                await self._converse(reader, writer)
            finally:
                del connections[task]
                writer.close()

        server = await asyncio.start_server(accept, "127.0.0.1", 0)
        self._started.set_result((asyncio.get_running_loop(), stop, server.sockets[0].getsockname()[1]))
        await stop.wait()
        server.close()
        for writer in connections.values():
            writer.close()
        if tasks := [task for task in connections if task is not None]:
            await asyncio.wait(tasks, timeout=5)
        await server.wait_closed()

    async def _converse(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while line := await reader.readline():
            headers = {}
            while (field := await reader.readline()) not in {b"\r\n", b""}:
                name, _, value = field.decode().partition(":")
                headers[name.lower()] = value.strip()
            body = await reader.readexactly(int(headers.get("content-length", 0)))
            method = line.split(b" ")[0].decode()
            if method == "DELETE":
                await asyncio.sleep(self._delete_seconds)
            status, more, answer = self._answer(method, headers, body)
            content = b"" if answer is None else json.dumps(answer).encode()
            fields = {"Content-Length": str(len(content)), **({"Content-Type": "application/json"} if content else {})}
            head = "".join(f"{name}: {value}\r\n" for name, value in {**fields, **more}.items())
            writer.write(f"HTTP/1.1 {status} X\r\n{head}\r\n".encode() + content)
            await writer.drain()

    def _answer(self, method: str, headers: dict[str, str], body: bytes) -> tuple[int, dict[str, str], Any]:
        session = headers.get("mcp-session-id")
        message = json.loads(body) if body else {}
        if method == "POST" and message.get("method") == "initialize":
            session = str(uuid.uuid4())
            self._sessions.add(session)
            self._note("opened", session)
            return 200, {"Mcp-Session-Id": session}, {"jsonrpc": "2.0", "id": message["id"], "result": _NEGOTIATED}
        if session not in self._sessions:
            self._note("refused", session or "")
            return 404, {}, None
        if method == "DELETE":
            self._sessions.remove(session)
            self._note("deleted", session)
            return 200, {}, None
        if method != "POST":
            return 405, {}, None
        self._note("used", session)
        if "id" not in message:
            return 202, {}, None
        result = _TOOLS if message["method"] == "tools/list" else _ECHO
        return 200, {}, {"jsonrpc": "2.0", "id": message["id"], "result": result}

    def _note(self, what: str, session: str) -> None:
        self._journal.append({"what": what, "session": short_hash(session)})
