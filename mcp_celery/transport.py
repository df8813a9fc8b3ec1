"""The resumable Streamable HTTP transport: an SDK `Transport` that can start from a session which already exists.

What it does beyond the SDK's own (MCP 2025-11-25, Transports; each point is a way in which sessions got lost):

* It starts from a handle and sends no second handshake: `initialize` is answered here, `notifications/initialized`
  goes nowhere.
* JSON-RPC ids, progress tokens and cancellations carry a prefix of this connection. Two processes on one session
  would both count from 1, and servers then give one the answer to the other.
* A lost session is told by the HTTP status and becomes `SessionLostError`.
* A response stream that breaks off is continued with `GET` and `Last-Event-ID`, a bounded number of times.
* Event streams are read to their end, so that the connection can be used again.
* Leaving it keeps the session alive; `terminate` ends it.

It runs on asyncio and trio alike, and knows neither Celery nor Redis.
"""

import logging
import math
import secrets
import time
from collections.abc import AsyncGenerator, Mapping
from contextlib import AbstractAsyncContextManager, asynccontextmanager, nullcontext
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, Self

import anyio
import anyio.abc
import httpx2
from anyio.streams.memory import MemoryObjectReceiveStream, MemoryObjectSendStream
from mcp.shared.message import ClientMessageMetadata, SessionMessage
from mcp_types import (
    CONNECTION_CLOSED,
    INVALID_REQUEST,
    METHOD_NOT_FOUND,
    UNSUPPORTED_PROTOCOL_VERSION,
    ErrorData,
    JSONRPCError,
    JSONRPCMessage,
    JSONRPCNotification,
    JSONRPCRequest,
    JSONRPCResponse,
    RequestId,
    jsonrpc_message_adapter,
)
from mcp_types.version import LATEST_MODERN_VERSION
from pydantic import ValidationError

from .exceptions import MCPCeleryError, SessionError, SessionHandleError, SessionLostError, TransportError
from .handle import SessionHandle, short_hash
from .http import Endpoint, new_client, shown, split_credentials

logger = logging.getLogger(__name__)

SESSION_HEADER = "mcp-session-id"
VERSION_HEADER = "mcp-protocol-version"
ACCEPT = {"accept": "application/json, text/event-stream"}

#: Failed attempts in a row (no connection, an error status, a stream that ends with nothing new) before giving up.
RESUME_ATTEMPTS = 10
#: The pause before an attempt grows to this, as does the time that a continued stream may say nothing. A server whose
#: store gives the events only after the tool has finished (server-everything) is asked again at this pace.
RESUME_PAUSE_SECONDS = 10.0
#: How long the rest of an answered stream is waited for, to use its connection again.
DRAIN_SECONDS = 0.5
#: What has no answer to wait for (a notification, `DELETE`) may take this long.
ONE_WAY_SECONDS = 10.0
#: One server-sent event may be this large.
MAX_EVENT_BYTES = 64 * 1024 * 1024
#: Longer `instructions` do not travel in a handle, which goes into every message of a workflow.
MAX_INSTRUCTIONS = 512
#: How long a tool listing serves the SDK's look-ups of output schemas.
LISTING_SECONDS = 300.0
#: "Server error" of JSON-RPC 2.0, which TypeScript servers give with a 400 for a session that they do not know.
_SERVER_ERROR = -32000
_BUFFERED_MESSAGES = 64


class ToolListings:
    """What `tools/list` of one server last gave, page by page, so that a call costs one request.

    The SDK lists the tools before it checks the output of one that its session object has not seen; sessions come and
    go with each task, and this stays. One for a server in a process.
    """

    def __init__(self) -> None:
        self._pages: dict[str | None, dict[str, Any]] = {}
        self._since = -math.inf
        self._unlisted: set[str] = set()

    def get(self, cursor: str | None) -> dict[str, Any] | None:
        """Return the page at *cursor*, or None where it is not known or too old."""
        if time.monotonic() - self._since > LISTING_SECONDS:
            self.drop()
        return self._pages.get(cursor)

    def put(self, cursor: str | None, page: dict[str, Any]) -> None:
        """Keep a page; the first one starts the listing anew."""
        if cursor is None:
            self._pages.clear()
            self._since = time.monotonic()
        self._pages[cursor] = page

    def drop(self) -> None:
        """Forget the listing, for instance because the server said that it changed."""
        self._pages.clear()
        self._unlisted.clear()

    def expect(self, tool: str) -> None:
        """Make sure that a *tool* which the listing lacks is looked for once more, not at every call."""
        listed = {entry.get("name") for page in self._pages.values() for entry in page.get("tools", ())}
        if self._pages and tool not in listed and tool not in self._unlisted:
            unlisted = self._unlisted | {tool}
            self.drop()
            self._unlisted = unlisted


@dataclass(slots=True, eq=False)
class _Exchange:
    """One JSON-RPC request under way."""

    request: JSONRPCRequest
    #: The id on the wire. None for a request sent by another process and continued here: the stream is its own.
    wire_id: str | None
    metadata: ClientMessageMetadata | None
    scope: anyio.CancelScope = field(default_factory=anyio.CancelScope)
    last_event_id: str | None = None
    pause_seconds: float | None = None
    #: While a stream is continued: how long it may say nothing new before the server is asked again.
    window: anyio.CancelScope | None = None
    window_seconds: float = 0.0
    can_resume: bool = True
    is_given_up: bool = False
    answered: bool = False

    @property
    def progress_token(self) -> RequestId | None:
        meta = (self.request.params or {}).get("_meta") or {}
        token = meta.get("progressToken")
        return token if isinstance(token, str | int) else None


class ResumableHTTPTransport(AbstractAsyncContextManager[Any]):
    """An MCP SDK transport over Streamable HTTP that starts from a handle and leaves the session alive.

    Give it to `mcp.Client` or, entered, its two streams to `ClientSession`. It is entered once.

    Attributes:
        session_id: `Mcp-Session-Id`; None before `initialize` was answered, after `terminate` or loss, and for a
            server that gives none.
        lost: The error that every request gets once the server has disowned the session.
    """

    def __init__(
        self,
        endpoint: Endpoint,
        *,
        handle: SessionHandle | None = None,
        listings: ToolListings | None = None,
        listen: bool = False,
        owned_client: httpx2.AsyncClient | None = None,
    ) -> None:
        self.session_id = handle.session_id if handle else None
        self.lost: SessionLostError | None = None
        self._endpoint = endpoint
        self._negotiated: Mapping[str, Any] | None = handle.negotiated if handle else None
        self._resumed = handle is not None
        self._is_shared = handle.shared if handle else False
        self._version = handle.protocol_version if handle else None
        self._listings = listings
        self._listen = listen
        self._owned_client = owned_client
        #: Set when the server refuses the handshake: then, and only then, `server/discover` is let through.
        self._may_discover = False
        self._prefix = secrets.token_hex(6)
        self._exchanges: dict[RequestId, _Exchange] = {}
        self._draining: dict[_Exchange, anyio.Event] = {}
        self._inbox: MemoryObjectSendStream[SessionMessage | Exception] | None = None
        self._tasks: anyio.abc.TaskGroup | None = None
        self._connected: AbstractAsyncContextManager[Any] | None = None

    # -- The session

    @property
    def handle(self) -> SessionHandle | None:
        """What another process needs to continue: None before the handshake and once the session has ended."""
        if self._negotiated is None or self.lost is not None:
            return None
        return SessionHandle(
            self._endpoint.name, self.session_id, self._negotiated, dict(self._endpoint.cookies), self._is_shared
        )

    @property
    def requests_sent(self) -> int:
        """How many HTTP requests this transport has sent."""
        return self._endpoint.requests_sent

    async def terminate(self) -> None:
        """End the session at the server with `DELETE`. Need not be entered; does nothing without a session.

        A server that no longer knows the session or does not let clients end one (405) is no error.

        Raises:
            TransportError: The server could not be reached or refused.
            SessionError: The transport was left and its HTTP client with it; a new one with its handle can do it.
        """
        if self.session_id is None:
            self._negotiated = None
            return
        own_client = self._owned_client if self._connected is None else None
        if self._owned_client is not None and self._owned_client.is_closed:
            raise SessionError(
                f"The transport of server {self._endpoint.name!r} was left: terminate() inside the block, or on "
                "resumable_http(url, handle=transport.handle)"
            )
        try:
            with anyio.fail_after(ONE_WAY_SECONDS):
                async with (
                    own_client or nullcontext(),
                    self._endpoint.stream("DELETE", headers=self._headers()) as response,
                ):
                    content = await response.aread()
        except TimeoutError:
            raise self._failure(f"did not answer to the end of the session within {ONE_WAY_SECONDS:g} s") from None
        status = response.status_code
        is_gone = response.is_success or _tells_loss(status, _refusal_in(response, content))
        if not is_gone and status != httpx2.codes.METHOD_NOT_ALLOWED:
            raise self._failure("refused to end the session", status)
        self.session_id = self._negotiated = None

    # -- The SDK's side: two streams

    async def __aenter__(self) -> tuple[MemoryObjectReceiveStream[SessionMessage | Exception], "_Outbox"]:
        self._connected = self._connection()
        return await self._connected.__aenter__()

    async def __aexit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None
    ) -> bool | None:
        if self._connected is None:  # pragma: no cover - `async with` always enters first
            return None
        return await self._connected.__aexit__(exc_type, exc, tb)

    @asynccontextmanager
    async def _connection(
        self,
    ) -> AsyncGenerator[tuple[MemoryObjectReceiveStream[SessionMessage | Exception], "_Outbox"]]:
        inbox, receive = anyio.create_memory_object_stream[SessionMessage | Exception](_BUFFERED_MESSAGES)
        async with (
            self._owned_client or nullcontext(),
            receive,
            inbox,
            anyio.create_task_group() as tasks,
        ):
            self._inbox, self._tasks = inbox, tasks
            try:
                yield receive, _Outbox(self)
            finally:
                self._inbox = self._tasks = None
                with anyio.move_on_after(DRAIN_SECONDS, shield=True):
                    for drained in list(self._draining.values()):
                        await drained.wait()
                tasks.cancel_scope.cancel()

    async def send(self, item: SessionMessage) -> None:
        """Take a message of the SDK. A request goes on in the background, anything else is sent before this returns.

        Runs in the sender's task, so that context variables (tracing among them) reach the HTTP request.
        """
        if self._tasks is None:
            raise anyio.ClosedResourceError
        metadata = item.metadata if isinstance(item.metadata, ClientMessageMetadata) else None
        match item.message:
            case JSONRPCRequest() as request:
                answer = self._answer_here(request, metadata)
                if answer is not None:
                    await self._deliver(answer)
                    return
                self._tasks.start_soon(self._run, self._register(request, metadata))
            case JSONRPCNotification(method="notifications/initialized") if self._resumed:
                self._start_listening()
            case JSONRPCNotification(method="notifications/cancelled") as notification:
                await self._cancel(notification)
            case message:
                await self._post_one_way(message, metadata)
                if isinstance(message, JSONRPCNotification) and message.method == "notifications/initialized":
                    self._start_listening()

    async def _deliver(self, message: JSONRPCMessage) -> None:
        if self._inbox is None:
            return
        try:
            await self._inbox.send(SessionMessage(message))
        except (anyio.BrokenResourceError, anyio.ClosedResourceError):
            logger.debug("A message of server %r came after the session object was left", self._endpoint.name)

    # -- What needs no request

    def _answer_here(self, request: JSONRPCRequest, metadata: ClientMessageMetadata | None) -> JSONRPCMessage | None:
        """Return the answer to *request* where it is known without asking the server."""
        if self.lost is not None:
            return _error(request.id, INVALID_REQUEST, str(self.lost), self.lost)
        match request.method:
            case "initialize" if self._resumed:
                return self._repeat_handshake(request.id)
            case "server/discover" if self._resumed and self._version is None:
                return _result(request.id, self._negotiated or {})
            case "server/discover" if not self._may_discover:
                # A server that offers both eras is asked for a session: that is what a handle is for.
                return _error(request.id, METHOD_NOT_FOUND, "Not asked: the handshake comes first")
            case "tools/list" if self._listings is not None and not (metadata and metadata.resumption_token):
                page = self._listings.get((request.params or {}).get("cursor"))
                return None if page is None else _result(request.id, page)
        return None

    def _repeat_handshake(self, request_id: RequestId) -> JSONRPCMessage:
        """Answer `initialize` from the handle: TypeScript servers refuse a second one, others start over."""
        negotiated = self._negotiated or {}
        if self._version is not None:
            return _result(request_id, negotiated)
        supported = {"supported": negotiated.get("supportedVersions", []), "requested": "initialize"}
        return _error(request_id, UNSUPPORTED_PROTOCOL_VERSION, "This server has no handshake", supported)

    def _take_result(self, request: JSONRPCRequest, result: dict[str, Any]) -> None:
        """Keep what later steps and sessions need of an answer."""
        match request.method:
            case "initialize":
                version = result.get("protocolVersion")
                self._version = version if isinstance(version, str) else None
                self._negotiated = _portable(result)
            case "server/discover":
                self._negotiated = _portable(result)
            case "tools/list" if self._listings is not None:
                self._listings.put((request.params or {}).get("cursor"), result)

    # -- One request

    def _register(self, request: JSONRPCRequest, metadata: ClientMessageMetadata | None) -> _Exchange:
        token = metadata.resumption_token if metadata else None
        wire_id = None if token else f"{self._prefix}-{request.id}"
        exchange = _Exchange(request, wire_id, metadata, last_event_id=token)
        # A reused id means that nobody waits for the earlier one any more.
        if (earlier := self._exchanges.get(request.id)) is not None:
            earlier.scope.cancel()
        self._exchanges[request.id] = exchange
        return exchange

    async def _run(self, exchange: _Exchange) -> None:
        """Bring the answer to one request, or the error that stands for it. Raises nothing."""
        try:
            with exchange.scope:
                self._heard(exchange)
                if exchange.wire_id is None or not await self._post(exchange):
                    await self._resume(exchange)
            if exchange.scope.cancelled_caught and not exchange.is_given_up and not exchange.answered:
                limit = self._endpoint.read_timeout_seconds or 0
                await self._fail(exchange, self._failure(f"was silent for {limit:g} s (read_timeout_seconds)"))
                await self._tell_cancelled(exchange, "read timeout")
        except MCPCeleryError as exc:
            if not exchange.answered:
                await self._fail(exchange, exc)
        finally:
            if self._exchanges.get(exchange.request.id) is exchange:
                del self._exchanges[exchange.request.id]

    async def _fail(self, exchange: _Exchange, error: MCPCeleryError) -> None:
        code = INVALID_REQUEST if isinstance(error, SessionLostError) else CONNECTION_CLOSED
        await self._deliver(_error(exchange.request.id, code, str(error), error))

    def _heard(self, exchange: _Exchange) -> None:
        """The read timeout of a request starts anew with each message of its stream, progress among them."""
        exchange.scope.deadline = anyio.current_time() + (self._endpoint.read_timeout_seconds or math.inf)

    async def _post(self, exchange: _Exchange) -> bool:
        """Send the request and read its response. False where the stream broke off and can be resumed."""
        if self.lost is not None:
            raise self.lost
        body = _on_wire(exchange)
        headers = self._headers(exchange.metadata, initialize=exchange.request.method == "initialize")
        try:
            async with self._endpoint.stream("POST", headers=headers, json=body) as response:
                if response.is_success and _media_type(response) == "text/event-stream":
                    self._take_session_id(exchange, response)
                    await self._read_events(exchange, response)
                else:
                    await self._read_body(exchange, response)
        except TransportError:
            if exchange.last_event_id is None or not exchange.can_resume:
                raise
            logger.debug("The response stream of server %r broke off; continuing it", self._endpoint.name)
        if not exchange.answered and exchange.last_event_id is None:
            raise self._failure(f"ended its response to {exchange.request.method} without an answer")
        return exchange.answered

    async def _read_body(self, exchange: _Exchange, response: httpx2.Response) -> None:
        """Read a response that is not an event stream: a JSON-RPC answer, or a refusal."""
        content = await response.aread()
        message = _parse(content) if _media_type(response) == "application/json" else None
        status = response.status_code
        if response.is_success:
            if not isinstance(message, JSONRPCResponse | JSONRPCError):
                kind = _media_type(response) or "no content"
                raise self._failure(f"answered {exchange.request.method} with {kind} instead of JSON-RPC", status)
            self._take_session_id(exchange, response)
            await self._accept(exchange, message)
            return
        refusal = message if isinstance(message, JSONRPCError) else None
        is_handshake = exchange.request.method in {"initialize", "server/discover"}
        if self._has_session and not is_handshake and _tells_loss(status, refusal):
            raise self._lose(status)
        if refusal is None:
            raise self._failure(f"answered {exchange.request.method} with HTTP {status}", status)
        await self._accept(exchange, JSONRPCError(jsonrpc="2.0", id=exchange.wire_id, error=refusal.error))

    def _take_session_id(self, exchange: _Exchange, response: httpx2.Response) -> None:
        if exchange.request.method == "initialize":
            self.session_id = response.headers.get(SESSION_HEADER) or None

    async def _read_events(self, exchange: _Exchange, response: httpx2.Response) -> None:
        """Hand on the events of a stream until it ends; after the answer, only as long as `DRAIN_SECONDS`."""
        drain = anyio.CancelScope()
        try:
            with drain:
                async for event in httpx2.EventSource(response, max_event_size=MAX_EVENT_BYTES):
                    if not exchange.answered:
                        await self._take_event(exchange, event)
                        if exchange.answered:
                            if exchange.window is not None:
                                # A continued stream is not: most servers leave it open.
                                break
                            self._draining[exchange] = anyio.Event()
                            drain.deadline = anyio.current_time() + DRAIN_SECONDS
        except httpx2.SSEError as exc:
            exchange.can_resume = False
            raise self._failure(f"sent an event stream that cannot be read ({exc})") from exc
        finally:
            if (drained := self._draining.pop(exchange, None)) is not None:
                drained.set()

    async def _take_event(self, exchange: _Exchange, event: httpx2.ServerSentEvent) -> None:
        if event.retry is not None:
            exchange.pause_seconds = min(event.retry / 1000, RESUME_PAUSE_SECONDS)
        if event.event == "message" and event.data:
            await self._accept_event(exchange, event.data)
        if event.id and event.id != exchange.last_event_id and not exchange.answered:
            exchange.last_event_id = event.id
            if exchange.window is not None:
                exchange.window.deadline = anyio.current_time() + exchange.window_seconds
            if exchange.metadata is not None and exchange.metadata.on_resumption_token_update is not None:
                await exchange.metadata.on_resumption_token_update(event.id)

    async def _accept_event(self, exchange: _Exchange, data: str) -> None:
        message = _parse(data)
        if message is None and data == "{}" and exchange.wire_id is not None:
            # server-everything replays all streams of a session, and an event that only gives an ID like this.
            return
        if message is None:
            exchange.can_resume = False
            raise self._failure(f"sent an event that is not JSON-RPC in answer to {exchange.request.method}")
        await self._accept(exchange, message)

    async def _accept(self, exchange: _Exchange, message: JSONRPCMessage) -> None:
        """Hand a message of the exchange's stream to the SDK, under the ids that the SDK knows."""
        self._heard(exchange)
        is_answer = False
        match message:
            case JSONRPCResponse() | JSONRPCError():
                if message.id is not None and exchange.wire_id not in {None, message.id}:
                    logger.debug("Server %r sent an answer that is not to this request", self._endpoint.name)
                    return
                is_answer = True
                if isinstance(message, JSONRPCResponse):
                    self._take_result(exchange.request, message.result)
                    message = JSONRPCResponse(jsonrpc="2.0", id=exchange.request.id, result=message.result)
                else:
                    error = self._hint_at_discovery(exchange, message.error)
                    message = JSONRPCError(jsonrpc="2.0", id=exchange.request.id, error=error)
            case JSONRPCNotification(method="notifications/progress"):
                message = self._with_known_token(exchange, message)
            case JSONRPCNotification(method="notifications/tools/list_changed") if self._listings is not None:
                self._listings.drop()
        await self._deliver(message)
        # Not before: a deadline may strike in between, and an answer that went nowhere has to be asked for again.
        exchange.answered = exchange.answered or is_answer

    def _hint_at_discovery(self, exchange: _Exchange, error: ErrorData) -> ErrorData:
        """A server that refuses the handshake speaks 2026-07-28 only: have the SDK ask it by `server/discover`."""
        if exchange.request.method != "initialize":
            return error
        if error.code not in {METHOD_NOT_FOUND, UNSUPPORTED_PROTOCOL_VERSION}:
            return error
        self._may_discover = True
        if error.code == UNSUPPORTED_PROTOCOL_VERSION:
            return error
        supported = {"supported": [LATEST_MODERN_VERSION], "requested": "initialize"}
        return ErrorData(code=UNSUPPORTED_PROTOCOL_VERSION, message=error.message, data=supported)

    def _with_known_token(self, exchange: _Exchange, message: JSONRPCNotification) -> JSONRPCNotification:
        params = dict(message.params or {})
        wire_token = params.get("progressToken")
        for other in (exchange, *self._exchanges.values()):
            # A stream continued from another process names the token of that process.
            if other.progress_token is not None and other.wire_id in {None, wire_token}:
                params["progressToken"] = other.progress_token
                break
        return JSONRPCNotification(jsonrpc="2.0", method=message.method, params=params)

    # -- Resumption (MCP 2025-11-25, Transports, Resumability and Redelivery)

    async def _resume(self, exchange: _Exchange) -> None:
        """Continue a stream that broke off, until its answer; the read timeout goes on meanwhile.

        Raises:
            SessionLostError: The server no longer knows the session.
            TransportError: It cannot be resumed, or `RESUME_ATTEMPTS` in a row gave nothing new.
        """
        failures, quiet_windows, why = 0, 0, ""
        while failures < RESUME_ATTEMPTS:
            await anyio.sleep(exchange.pause_seconds if exchange.pause_seconds is not None else _pause(failures))
            before = exchange.last_event_id
            exchange.window_seconds = _pause(quiet_windows + 3)
            with anyio.move_on_after(exchange.window_seconds) as window:
                exchange.window = window
                try:
                    await self._get_rest(exchange)
                    why = "its stream ended without the answer"
                except TransportError as exc:
                    if not exchange.can_resume or not _may_try_again(exc):
                        raise
                    why = str(exc)
            if exchange.answered:
                return
            if window.cancelled_caught:
                # Also after something new: server-everything gives what its tool has said so far, and then no more.
                quiet_windows += 1
            elif exchange.last_event_id != before:
                # Something new, so this is no failure; but a server that ends each stream is not asked at full speed.
                failures, quiet_windows = 1, 0
            else:
                failures += 1
        raise self._failure(f"broke off its response to {exchange.request.method}, and resuming it failed: {why}")

    async def _get_rest(self, exchange: _Exchange) -> None:
        if self.lost is not None:
            raise self.lost
        headers = {**self._headers(), "last-event-id": exchange.last_event_id or ""}
        async with self._endpoint.stream("GET", headers=headers) as response:
            status = response.status_code
            if status == httpx2.codes.NOT_FOUND and self._has_session:
                raise self._lose(status)
            if not response.is_success or _media_type(response) != "text/event-stream":
                raise self._failure(f"cannot resume a response (HTTP {status})", status)
            await self._read_events(exchange, response)

    # -- Cancellation and one-way messages

    async def _cancel(self, notification: JSONRPCNotification) -> None:
        """Tell the server that a request is given up, and stop reading its response.

        Up to 2025-11-25 the notification tells; in 2026-07-28 closing the response does, and there is no notification.
        """
        params = notification.params or {}
        request_id = params.get("requestId")
        exchange = self._exchanges.get(request_id) if isinstance(request_id, str | int) else None
        if exchange is not None:
            exchange.is_given_up = True
            await self._tell_cancelled(exchange, params.get("reason"))
            exchange.scope.cancel()

    async def _tell_cancelled(self, exchange: _Exchange, reason: object) -> None:
        if self._version is None or exchange.wire_id is None:
            return
        params = {"requestId": exchange.wire_id, "reason": str(reason)}
        await self._post_one_way(
            JSONRPCNotification(jsonrpc="2.0", method="notifications/cancelled", params=params), None
        )

    async def _post_one_way(self, message: JSONRPCMessage, metadata: ClientMessageMetadata | None) -> None:
        """Send a notification, or the answer to a request of the server. What goes wrong shows at the next request."""
        if self.lost is not None:
            return
        body = message.model_dump(by_alias=True, mode="json", exclude_unset=True)
        try:
            with anyio.fail_after(ONE_WAY_SECONDS):
                async with self._endpoint.stream("POST", headers=self._headers(metadata), json=body) as response:
                    content = await response.aread()
        except (TransportError, TimeoutError) as exc:
            logger.debug("A message could not be sent: %s", exc)
            return
        if self._has_session and _tells_loss(response.status_code, _refusal_in(response, content)):
            self._lose(response.status_code)

    # -- The standalone stream, where it is asked for

    def _start_listening(self) -> None:
        if self._listen and self._tasks is not None and self._version is not None:
            self._tasks.start_soon(self._listen_on)

    async def _listen_on(self) -> None:
        """Read what the server sends outside of requests. One holder at a time may: 409 and 405 end it quietly."""
        session_id = self.session_id
        last_event_id: str | None = None
        failures = 0
        # Not past the end of the session: Python servers open one for a GET that names none.
        while failures < RESUME_ATTEMPTS and self.session_id == session_id:
            headers = self._headers() | ({"last-event-id": last_event_id} if last_event_id else {})
            pause: float | None = None
            try:
                async with self._endpoint.stream("GET", headers=headers) as response:
                    if not response.is_success or _media_type(response) != "text/event-stream":
                        logger.debug("Server %r gives no stream (HTTP %s)", self._endpoint.name, response.status_code)
                        return
                    async for event in httpx2.EventSource(response, max_event_size=MAX_EVENT_BYTES):
                        failures = 0
                        last_event_id = event.id or last_event_id
                        pause = event.retry / 1000 if event.retry is not None else pause
                        if event.data and (message := _parse(event.data)) is not None:
                            await self._accept_unasked(message)
            except (TransportError, httpx2.SSEError) as exc:
                logger.debug("The stream of server %r broke off: %s", self._endpoint.name, exc)
            await anyio.sleep(min(pause if pause is not None else _pause(failures), RESUME_PAUSE_SECONDS))
            failures += 1

    async def _accept_unasked(self, message: JSONRPCMessage) -> None:
        match message:
            case JSONRPCResponse() | JSONRPCError():
                return
            case JSONRPCNotification(method="notifications/tools/list_changed") if self._listings is not None:
                self._listings.drop()
        await self._deliver(message)

    # -- Headers and errors

    def _headers(self, metadata: ClientMessageMetadata | None = None, *, initialize: bool = False) -> dict[str, str]:
        headers = dict(ACCEPT)
        if initialize:
            return headers
        if self.session_id is not None:
            headers[SESSION_HEADER] = self.session_id
        if self._version is not None:
            headers[VERSION_HEADER] = self._version
        if metadata is not None and metadata.headers:
            headers.update({name.lower(): value for name, value in metadata.headers.items()})
        return headers

    def _failure(self, what: str, status: int | None = None) -> TransportError:
        return TransportError(f"Server {self._endpoint.name!r} {what}", self._endpoint.name, status)

    @property
    def _has_session(self) -> bool:
        """Also true once it is lost: the requests under way all hear of it, and each is told the same."""
        return self.session_id is not None or self.lost is not None

    def _lose(self, status: int) -> SessionLostError:
        if self.lost is not None:
            return self.lost
        session = short_hash(self.session_id or "")
        self.lost = SessionLostError(
            f"Server {self._endpoint.name!r} no longer knows session {session} (HTTP {status}): it was restarted or "
            "dropped the session as idle. What the session held is gone; open() starts another",
            self._endpoint.name,
            session,
            status,
        )
        self.session_id = None
        return self.lost


class _Outbox:
    """The write stream that the SDK gets: hands each message to the transport, in the sender's own task."""

    def __init__(self, transport: ResumableHTTPTransport) -> None:
        self._transport = transport
        self._is_closed = False

    async def send(self, item: SessionMessage) -> None:
        if self._is_closed:
            raise anyio.ClosedResourceError
        await self._transport.send(item)

    async def aclose(self) -> None:
        self._is_closed = True

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None
    ) -> bool | None:
        await self.aclose()
        return None


def resumable_http(
    url: str,
    *,
    handle: SessionHandle | str | None = None,
    headers: Mapping[str, str] | None = None,
    server: str | None = None,
    listen: bool = False,
) -> ResumableHTTPTransport:
    """Return a transport for the endpoint *url*, from *handle* where the session exists already.

    Example:
        async with Client(transport := resumable_http(url)) as client:
            await client.call_tool("assign", {"name": "x", "value": 1})
            text = transport.handle.dumps()         # keep it; leaving the block keeps the session alive

        async with Client(transport := resumable_http(url, handle=text)) as client:   # elsewhere, later
            await client.call_tool("evaluate", {"expression": "x + 1"})
            await transport.terminate()

    Args:
        url: http or https. Credentials in it are sent by HTTP Basic and never shown.
        handle: A `SessionHandle`, or what its `dumps` gave.
        headers: Sent with each request.
        server: What error texts and handles call the server; the URL without credentials by default.
        listen: Open the server's standalone stream as well. Some servers end a session when it is dropped.

    Raises:
        SessionHandleError: The handle cannot be read or is of another server.
    """
    place, auth = split_credentials(url)
    name = server or shown(place)
    session = None if handle is None else SessionHandle.load(handle)
    if session is not None and session.server != name:
        raise SessionHandleError(f"The session handle is of server {session.server!r}, not of {name!r}")
    client = new_client(place, headers=headers, auth=auth)
    endpoint = Endpoint(place, client, name=name, cookies=session.cookies if session else None)
    return ResumableHTTPTransport(endpoint, handle=session, listen=listen, owned_client=client)


def _result(request_id: RequestId, result: Mapping[str, Any]) -> JSONRPCResponse:
    # A copy: the SDK edits what it validates.
    return JSONRPCResponse(jsonrpc="2.0", id=request_id, result=dict(result))


def _error(request_id: RequestId, code: int, message: str, data: object = None) -> JSONRPCError:
    """An error made here. One of our exceptions as *data* stays in this process, where the session raises it."""
    return JSONRPCError(jsonrpc="2.0", id=request_id, error=ErrorData(code=code, message=message, data=data))


def _parse(content: bytes | str) -> JSONRPCMessage | None:
    try:
        return jsonrpc_message_adapter.validate_json(content, by_name=False)
    except ValidationError:
        return None


def _refusal_in(response: httpx2.Response, content: bytes) -> JSONRPCError | None:
    message = _parse(content) if _media_type(response) == "application/json" else None
    return message if isinstance(message, JSONRPCError) else None


def _on_wire(exchange: _Exchange) -> dict[str, Any]:
    """Return the request under its wire id, its parameters as the SDK dumped them."""
    request = exchange.request
    body: dict[str, Any] = {"jsonrpc": "2.0", "id": exchange.wire_id, "method": request.method}
    if request.params is not None:
        body["params"] = request.params
        if exchange.progress_token is not None:
            meta = {**request.params["_meta"], "progressToken": exchange.wire_id}
            body["params"] = {**request.params, "_meta": meta}
    return body


def _media_type(response: httpx2.Response) -> str:
    media_type: str = response.headers.get("content-type", "").partition(";")[0]
    return media_type.strip().lower()


def _tells_loss(status: int, error: JSONRPCError | None) -> bool:
    """Whether a refusal says that the session is unknown (MCP 2025-11-25, Transports, Session Management: 404).

    By the status, not the code: Python servers give -32600 with the 404, and TypeScript's -32001 is also its timeout.
    Servers written after the TypeScript examples answer 400, with an error that is to no request or with none.
    """
    if status == httpx2.codes.NOT_FOUND:
        return True
    if status != httpx2.codes.BAD_REQUEST:
        return False
    return error is None or (error.id is None and error.error.code == _SERVER_ERROR)


def _may_try_again(exc: TransportError) -> bool:
    """Whether a failed resumption can go better the next time: not after a refusal that will not change."""
    return exc.status is None or exc.status in {409, 425, 429} or exc.status >= httpx2.codes.INTERNAL_SERVER_ERROR


def _pause(attempt: int) -> float:
    """0, 0.25, 0.5, 1, 2 ... seconds."""
    return 0.0 if attempt == 0 else min(0.125 * 2.0**attempt, RESUME_PAUSE_SECONDS)


def _portable(result: Mapping[str, Any]) -> dict[str, Any]:
    """What of a negotiated result travels in a handle: all but what is large and for show."""
    portable = {key: value for key, value in result.items() if key != "instructions"}
    instructions = result.get("instructions")
    if isinstance(instructions, str) and len(instructions) <= MAX_INSTRUCTIONS:
        portable["instructions"] = instructions
    info = result.get("serverInfo")
    if isinstance(info, Mapping):
        portable["serverInfo"] = {key: info[key] for key in ("name", "version", "title") if key in info}
    return portable
