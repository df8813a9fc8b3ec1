"""The life of an MCP session: opened or resumed, asked, left or ended.

It belongs to one execution of a task and to one event loop. What outlives it in the process (the HTTP client, the tool
listings) is in `Connections`.
"""

import asyncio
import logging
import time
from collections import deque
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from functools import partial
from typing import Literal, NamedTuple, Protocol, TypeVar, cast

import anyio
import mcp_types as types
from mcp import Client, MCPError
from mcp_types.version import MODERN_PROTOCOL_VERSIONS
from pydantic import ValidationError

from ._version import __version__
from .asked import Asked, belong_to_no_call, declines
from .connections import Connections
from .durable import DurableCalls
from .events import Event, Events, Why
from .exceptions import MCPCeleryError, SessionError, SessionHandleError, SessionLostError, TransportError
from .exchange import TokenCallback
from .handle import SessionHandle
from .http import Endpoint
from .journal import Journal
from .settings import ServerSettings
from .threads import aside
from .transport import ResumableHTTPTransport

T = TypeVar("T")

logger = logging.getLogger(__name__)

#: How long ending a session may take whose opening was broken off, perhaps by a timeout of the call.
BROKEN_OFF_SECONDS = 2.0
#: How long asking the server for its logs may take.
LOG_LEVEL_SECONDS = 10.0
#: Calls of one task that are remembered for the history.
MAX_CALLS = 100
_CLIENT_INFO = types.Implementation(name="mcp-celery-task", version=__version__)


class Ledger(Protocol):
    """Who is told of the life of a session. Each method may block for a moment; not called on the event loop."""

    def opened(self, handle: SessionHandle) -> None:
        """The server has opened a session; no call was made yet."""
        ...

    def closed(self, handle: SessionHandle) -> None:
        """The session has ended at the server."""
        ...

    def detached(self, handle: SessionHandle) -> None:
        """The session stays alive at the server, and is this one's business no more."""
        ...


class Call(NamedTuple):
    """One call that was made, for the history."""

    what: str
    #: Seconds since the epoch.
    at: float
    seconds: float
    ok: bool


class LiveSession:
    """One MCP session, opened or resumed at the first question to its server.

    Attributes:
        calls: The questions put so far; of many, the last.
    """

    def __init__(
        self,
        settings: ServerSettings,
        connections: Connections,
        handle: SessionHandle | None = None,
        *,
        ledger: Ledger | None = None,
        lost_at: float | None = None,
        journal: Journal | None = None,
        tell: Callable[[Event], object] | None = None,
        asked: Asked | None = None,
    ) -> None:
        if handle is not None and handle.server != settings.name:
            raise SessionHandleError(
                f"The session handle is of server {handle.server!r}, and this task uses {settings.name!r}"
            )
        self._settings = settings
        self._connections = connections
        self._given = handle
        self._ledger = ledger
        self._journal = journal
        self._durable = None if journal is None else DurableCalls(self, journal)
        self._events = Events(settings.name, tell)
        self._asked = asked
        #: When somebody else has found the given session to be lost, in seconds since the epoch.
        self._lost_at = lost_at
        self.calls: deque[Call] = deque(maxlen=MAX_CALLS)
        self._transport: ResumableHTTPTransport | None = None
        self._client: Client | None = None
        self._owner: asyncio.Task[None] | None = None
        self._leave: asyncio.Event | None = None
        self._lock = anyio.Lock()
        self._ended: str | None = None
        self._requests_before = 0

    # -- What is known of the session

    @property
    def server(self) -> str:
        """The server's name in `mcp_servers`, or its URL without credentials."""
        return self._settings.name

    @property
    def session_id(self) -> str | None:
        """The server's `Mcp-Session-Id`, read live. A secret.

        None before the session is open, after it was closed, detached or lost, and for a server without sessions.
        """
        return self._transport.session_id if self._transport is not None and self._is_open else None

    @property
    def handle(self) -> SessionHandle | None:
        """What continues the session elsewhere; None before it is open and once it has ended."""
        if self._ended is not None or self._lost_at is not None:
            return None
        return self._transport.handle if self._transport is not None else self._given

    @property
    def resumed(self) -> bool:
        """Whether the session came with a handle, so another task opened it."""
        return self._given is not None

    @property
    def is_open(self) -> bool:
        """Whether the session was opened or resumed here and has neither ended nor been lost."""
        return self._is_open and not self.is_lost

    @property
    def is_lost(self) -> bool:
        """Whether the server has lost the session."""
        return self._lost_at is not None or (self._transport is not None and self._transport.lost is not None)

    @property
    def is_untouched(self) -> bool:
        """Whether the session was neither opened nor resumed here, and has not ended."""
        return self._client is None and self._ended is None and self._lost_at is None

    @property
    def requests_sent(self) -> int:
        """How many HTTP requests this object has sent."""
        return self._requests_before + (self._transport.requests_sent if self._transport is not None else 0)

    @property
    def protocol_version(self) -> str | None:
        """The negotiated protocol version; None before the session is open."""
        return self._client.protocol_version if self._client is not None else None

    @property
    def server_info(self) -> types.Implementation | None:
        """The server's name and version; None before the session is open, or where the server does not say."""
        return self._client.server_info if self._client is not None else None

    @property
    def server_capabilities(self) -> types.ServerCapabilities | None:
        """What the server offers; None before the session is open."""
        return self._client.server_capabilities if self._client is not None else None

    @property
    def _is_open(self) -> bool:
        return self._client is not None and self._ended is None

    def __repr__(self) -> str:
        state = self._ended or ("lost" if self.is_lost else "open" if self._is_open else "not open yet")
        handle = self.handle
        return f"<{type(self).__name__} {self.server} {handle.short_id if handle else None} {state}>"

    # -- Life

    async def open(self) -> None:
        """Open the session, or resume the one that was given; nothing where it is open. Resuming sends nothing.

        Called after the session has ended (`close`, `detach`, or lost at the server), it starts a new one.

        Raises:
            TransportError: The server could not be reached.
        """

        async def open_again(handle: SessionHandle | None) -> None:
            """Go on in the session that this has opened before."""
            current = self.handle
            if handle is not None and (current is None or current.key != handle.key):
                await self._drop()
                self._given, self._ended, self._lost_at = handle, None, None

        if self._durable is None or (self._ended is None and not self.is_lost):
            await self._open()
        else:
            await self._durable.once("open", self._open, self._locked(open_again))

    async def _open(self) -> SessionHandle | None:
        async with self._lock:
            if self.is_open:
                return self.handle
            before = self._given, self._ended, self._lost_at or (time.time() if self.is_lost else None)
            if self._ended is not None or self.is_lost:
                await self._drop()
                self._given = self._ended = self._lost_at = None
            try:
                await self._enter()
            except BaseException:
                self._given, self._ended, self._lost_at = before
                raise
            self._events.opened(_short_id(self.handle), resumed=self.resumed)
            if self._given is None:
                await self._tell("opened", self.handle)
                if self._journal is not None and self.handle is not None:
                    await self._journal.note_session(self.handle)
                await self._ask_for_logs()
            return self.handle

    async def _ask_for_logs(self) -> None:
        """Tell the server of a new session which of its logs are wanted; in the stateless era, each request does."""
        level = self._asked.log_level if self._asked is not None else None
        client = self.client
        if level is None or client.server_capabilities.logging is None:
            return
        if client.protocol_version in MODERN_PROTOCOL_VERSIONS:
            return
        request = types.SetLevelRequest(params=types.SetLevelRequestParams(level=level))
        try:
            with anyio.fail_after(LOG_LEVEL_SECONDS):
                await client.session.send_request(request, types.EmptyResult)
        except (MCPError, ValidationError, TimeoutError) as exc:
            logger.debug("Server %r takes no log level (%s)", self.server, type(exc).__name__)

    async def detach(self) -> SessionHandle:
        """Leave the session alive at the server and disown it: return its handle. The task will not close it.

        Raises:
            SessionError: There is no session to detach.
        """

        async def disown(handle: SessionHandle | None) -> None:
            await self._drop()
            self._ended = "detached"
            await self._tell("detached", handle)

        async def detach() -> SessionHandle:
            async with self._lock:
                handle = self.handle
                if handle is None:
                    raise SessionError(f"There is no session of server {self.server!r} to detach; open() one first")
                await disown(handle)
                return handle

        if self._durable is None:
            return await detach()
        # `detach` raises where there is none.
        return cast("SessionHandle", await self._durable.once("detach", detach, self._locked(disown)))

    async def close(self) -> None:
        """End the session at the server. Nothing where it has ended, or was never opened and none was given.

        Raises:
            TransportError: The server could not be reached; it will drop the session as idle.
        """

        async def forget(handle: SessionHandle | None) -> None:
            await self._drop()
            self._ended = self._ended or "closed"
            await self._tell("closed", handle)

        if self._durable is None:
            await self.end("task")
        else:
            await self._durable.once("close", partial(self.end, "task"), self._locked(forget))

    async def end(self, why: Why = "workflow") -> SessionHandle | None:
        """Do what `close` does, for who ends the session of a task that has ended. Returns what was ended.

        Raises:
            TransportError: As above.
        """
        async with self._lock:
            if self._ended is not None:
                return None
            if self._transport is None and self._given is not None:
                self._transport = self._new_transport()
            transport, handle = self._transport, self.handle
            is_lost, self._ended = self.is_lost, "closed"
            try:
                if transport is not None and not is_lost:
                    await transport.terminate()
                    self._events.closed(_short_id(handle), why)
                    await self._tell("closed", handle)
            finally:
                await self._drop()
            return handle

    async def release(self) -> None:
        """Drop this end without a word to the server, at the end of a task. Calls raise from here on."""
        async with self._lock:
            await self._drop()
            self._ended = self._ended or "released"

    async def open_for(self, what: str, timeout_seconds: float | None) -> None:
        """Do what `open` does, for the call *what*. Errors are those of calls."""
        with self._translated(what, timeout_seconds), anyio.fail_after(timeout_seconds):
            await self._open()

    def note_loss(self) -> None:
        """Take the session for lost: somebody else has found it so, just now."""
        self._lost_at = time.time()

    # -- Questions

    @property
    def client(self) -> Client:
        """The SDK's `mcp.Client` on this session.

        Raises:
            SessionError: The session is not open.
        """
        if self._client is None or self._ended is not None:
            raise SessionError(f"The session of server {self.server!r} is not open; await open() first")
        return self._client

    def _locked(
        self, act: Callable[[SessionHandle | None], Awaitable[None]]
    ) -> Callable[[SessionHandle | None], Awaitable[None]]:
        async def locked(handle: SessionHandle | None) -> None:
            async with self._lock:
                await act(handle)

        return locked

    async def _tell(self, what: Literal["opened", "closed", "detached"], handle: SessionHandle | None) -> None:
        if self._ledger is not None and handle is not None and handle.session_id is not None:
            await aside(getattr(self._ledger, what), handle)  # others use this loop

    async def ask(
        self,
        what: str,
        call: Callable[[Client], Awaitable[T]],
        timeout_seconds: float | None = None,
        *,
        on_token: TokenCallback | None = None,
    ) -> T:
        """Make a call. Where *on_token* takes its resumption tokens, only its timeout cancels it at the server."""
        if self._ended is not None:
            raise SessionError(
                f"The session of server {self.server!r} was {self._ended} by this task; open() starts a new one"
            )
        if self._lost_at is not None and self._given is not None:
            self._events.session = self._given.short_id
            raise SessionLostError(
                f"Server {self.server!r} has lost session {self._given.short_id}: a ping found it gone at "
                f"{datetime.fromtimestamp(self._lost_at, UTC):%Y-%m-%d %H:%M:%S} UTC",
                self.server,
                self._given.short_id,
            )
        started, answered = time.time(), False
        try:
            with self._translated(what, timeout_seconds):
                try:
                    with anyio.fail_after(timeout_seconds):
                        if not self._is_open:
                            await self._open()
                        answer = await call(self.client)
                except TimeoutError:
                    if on_token is not None and self._transport is not None:
                        await self._transport.cancel(on_token, "timeout")
                    raise
            answered = True
            return answer
        finally:
            self.calls.append(Call(what, started, time.time() - started, answered))

    @contextmanager
    def _translated(self, what: str, timeout_seconds: float | None) -> Iterator[None]:
        try:
            yield
        except MCPError as exc:
            # The transport puts its own error into the place that a JSON-RPC error has for data.
            if isinstance(exc.data, MCPCeleryError):
                # A new one each time: that of a lost session is met again by every call.
                raise type(exc.data)(*exc.data.args) from exc.data.__cause__
            if exc.code == types.CONNECTION_CLOSED and exc.message == "Connection closed":
                raise TransportError(f"The connection to server {self.server!r} was closed", self.server) from exc
            raise
        except RuntimeError as exc:
            if what == "initialize":  # the SDK refuses the server's protocol version so
                raise TransportError(f"Server {self.server!r} cannot be used: {exc}", self.server) from exc
            raise
        except ValidationError as exc:
            if what == "initialize" and self._given is not None:
                raise SessionHandleError("The session handle holds no result of a handshake that can be read") from exc
            raise TransportError(
                f"Server {self.server!r} answered to {what} with what is not MCP", self.server
            ) from exc
        except TimeoutError as exc:
            text = f"Server {self.server!r} did not answer to {what} within {timeout_seconds:g} s; it was cancelled"
            raise TransportError(text, self.server, cancelled=True) from exc

    def _new_transport(self) -> ResumableHTTPTransport:
        url, client, listings = self._connections.of(self._settings)
        cookies = self._given.cookies if self._given is not None else None
        endpoint = Endpoint(url, client, name=self.server, cookies=cookies)
        return ResumableHTTPTransport(
            endpoint,
            handle=self._given,
            listings=listings,
            listen=self._settings.listen,
            declines=declines() if self._asked is None else self._asked.declines(),
        )

    def _new_client(self, transport: ResumableHTTPTransport) -> Client:
        """Return the SDK's client in the mode that asks the server least."""
        asked = {} if self._asked is None else self._asked.callbacks(self.server, lambda: transport.session_id)
        if self._given is None:
            return Client(transport, client_info=_CLIENT_INFO, **asked)
        if not self._given.is_stateless_era:
            return Client(transport, client_info=_CLIENT_INFO, mode="legacy", **asked)
        discovered = types.DiscoverResult.model_validate(dict(self._given.negotiated), by_name=False)
        mode = next(
            version for version in reversed(MODERN_PROTOCOL_VERSIONS) if version in discovered.supported_versions
        )
        return Client(transport, client_info=_CLIENT_INFO, mode=mode, prior_discover=discovered, **asked)

    async def _enter(self) -> None:
        """Enter the client in a task of its own, which also leaves it: the SDK's scopes may not change tasks."""
        transport = self._new_transport()
        client = self._new_client(transport)
        leave = asyncio.Event()
        entered: asyncio.Future[None] = asyncio.get_running_loop().create_future()

        async def own() -> None:
            belong_to_no_call()
            try:
                async with client:
                    entered.set_result(None)
                    await leave.wait()
            except BaseException as exc:
                if entered.done():
                    raise
                cause = _first_leaf(exc)
                if isinstance(cause, asyncio.CancelledError):
                    entered.cancel()
                    raise
                entered.set_exception(cause)

        owner = asyncio.create_task(own(), name=f"mcp_celery session of {self.server}")
        try:
            with self._translated("initialize", None):
                await asyncio.shield(entered)
        except BaseException:
            owner.cancel()
            with suppress(asyncio.CancelledError):
                await asyncio.shield(asyncio.wait([owner]))
            if entered.done() and not entered.cancelled():
                entered.exception()  # mark as retrieved
            if self._given is None:
                await self._end_half_open(transport)
            self._requests_before += transport.requests_sent
            raise
        self._transport, self._client, self._owner, self._leave = transport, client, owner, leave

    async def _end_half_open(self, transport: ResumableHTTPTransport) -> None:
        """End a session that the server has opened, where the handshake was not completed."""
        with anyio.move_on_after(BROKEN_OFF_SECONDS, shield=True):
            try:
                await transport.terminate()
            except TransportError as exc:
                logger.debug("A session whose opening was broken off is left to its server: %s", exc)

    async def _drop(self) -> None:
        """Leave the client and keep the session at the server."""
        owner, leave = self._owner, self._leave
        if self._transport is not None:
            self._requests_before += self._transport.requests_sent
        self._transport = self._client = self._owner = self._leave = None
        if owner is not None and leave is not None:
            leave.set()
            await asyncio.wait([owner])
            if not owner.cancelled() and (exc := owner.exception()) is not None:
                logger.debug("Leaving the session of server %r: %s", self.server, type(exc).__name__)


def _short_id(handle: SessionHandle | None) -> str | None:
    return None if handle is None else handle.short_id


def _first_leaf(exc: BaseException) -> BaseException:
    """Return what went wrong first: the SDK's task groups wrap it, once for each."""
    while isinstance(exc, BaseExceptionGroup):
        exc = exc.exceptions[0]
    return exc
