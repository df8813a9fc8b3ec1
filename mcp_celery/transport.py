"""The resumable Streamable HTTP transport: an SDK `Transport` that can start from a session which already exists.

What it does beyond the SDK's own (MCP 2025-11-25, Transports; each point is a way in which sessions got lost):

* It starts from a handle and sends no second handshake: `initialize` is answered here, `notifications/initialized`
  goes nowhere.
* JSON-RPC ids, progress tokens and cancellations carry a prefix of this connection. Two processes on one session
  would both count from 1, and servers then give one the answer to the other.
* A lost session is told by the HTTP status and becomes `SessionLostError`.
* A response stream that breaks off is continued with `GET` and `Last-Event-ID`, a bounded number of times.
* Event streams are read to their end, so that the connection can be used again.
* What a server asks the client while a call is under way is answered in the context of that call.
* Leaving it keeps the session alive; `terminate` ends it.

It knows neither Celery nor Redis.
"""

import contextvars
import logging
import secrets
from collections.abc import AsyncGenerator, Mapping
from contextlib import AbstractAsyncContextManager, asynccontextmanager, nullcontext
from types import TracebackType
from typing import Any, Self

import anyio
import anyio.abc
import httpx2
from anyio.streams.memory import MemoryObjectReceiveStream, MemoryObjectSendStream
from mcp.shared.message import ClientMessageMetadata, SessionMessage
from mcp_types import (
    CONNECTION_CLOSED,
    HEADER_MISMATCH,
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
    Result,
)
from mcp_types.version import LATEST_MODERN_VERSION, MODERN_PROTOCOL_VERSIONS

from .exceptions import SessionError, SessionHandleError, SessionLostError, TransportError
from .exchange import (
    DRAIN_SECONDS,
    MAX_EVENT_BYTES,
    RESUME_ATTEMPTS,
    RESUME_PAUSE_SECONDS,
    Exchange,
    TokenCallback,
    error_message,
    is_progress,
    media_type,
    parse,
    pause,
    refusal_in,
)
from .handle import SessionHandle, server_name
from .http import Endpoint, new_client, split_credentials
from .listings import ToolListings
from .remote_session import RemoteSession

logger = logging.getLogger(__name__)

#: What has no answer to wait for (a notification, `DELETE`) may take this long.
ONE_WAY_SECONDS = 5.0
_BUFFERED_MESSAGES = 64
#: How servers that speak 2026-07-28 only refuse a handshake: they do not know it or its version, or they miss the
#: headers that each request has there.
_NO_HANDSHAKE = frozenset({METHOD_NOT_FOUND, UNSUPPORTED_PROTOCOL_VERSION, HEADER_MISMATCH})


class ResumableHTTPTransport(AbstractAsyncContextManager[Any]):
    """An MCP SDK transport over Streamable HTTP that starts from a handle and leaves the session alive.

    Give it to `mcp.Client` or, entered, its two streams to `ClientSession`. It is entered once.
    """

    def __init__(
        self,
        endpoint: Endpoint,
        *,
        handle: SessionHandle | None = None,
        listings: ToolListings | None = None,
        listen: bool = False,
        declines: Mapping[str, ErrorData | Result] | None = None,
        prefer_stateless: bool = False,
        owned_client: httpx2.AsyncClient | None = None,
    ) -> None:
        self._session = RemoteSession(endpoint, handle)
        self._endpoint = endpoint
        self._listings = listings
        self._listen = listen
        #: The answers to requests of the server that go no further, by method.
        self._declines = declines or {}
        self._owned_client = owned_client
        #: Also set when the server refuses the handshake; otherwise `server/discover` is not let through.
        self._may_discover = prefer_stateless and handle is None
        self._prefix = secrets.token_hex(6)
        self._exchanges: dict[RequestId, Exchange] = {}
        self._inbox: MemoryObjectSendStream[_Envelope] | None = None
        self._tasks: anyio.abc.TaskGroup | None = None
        self._connected: AbstractAsyncContextManager[Any] | None = None

    # -- The session

    @property
    def session_id(self) -> str | None:
        """`Mcp-Session-Id`, read live.

        None before `initialize` was answered, after `terminate` or loss, and for a server that gives none.
        """
        return self._session.session_id

    @property
    def lost(self) -> SessionLostError | None:
        """The error that every request gets once the server has disowned the session."""
        return self._session.lost

    @property
    def handle(self) -> SessionHandle | None:
        """What another process needs to continue: None before the handshake and once the session has ended."""
        return self._session.handle

    @property
    def requests_sent(self) -> int:
        """How many HTTP requests this transport has sent."""
        return self._endpoint.requests_sent

    def detach(self) -> SessionHandle:
        """Return the handle for another process to `resume`. Sends nothing, and can be used on until it is left.

        Raises:
            SessionLostError: The server no longer knows the session.
            SessionError: There is nothing to resume: the handshake is still to come, or the session has ended.
        """
        if self._session.lost is not None:
            raise self._session.lost
        handle = self.handle
        if handle is None:
            raise SessionError(f"No session of server {self._endpoint.name!r} is open: detach() comes before its end")
        return handle

    async def terminate(self) -> None:
        """End the session at the server with `DELETE`. Need not be entered; does nothing without a session.

        A server that no longer knows the session or does not let clients end one (405) is no error.

        Raises:
            TransportError: The server could not be reached or refused.
            SessionError: The transport was left and its HTTP client with it; a new one with its handle can do it.
        """
        self._listen = False
        if self.session_id is None:
            self._session.end()
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
                    self._endpoint.stream("DELETE", headers=self._session.headers()) as response,
                ):
                    content = await response.aread()
        except TimeoutError:
            raise self._session.failure(
                f"did not answer to the end of the session within {ONE_WAY_SECONDS:g} s"
            ) from None
        status = response.status_code
        is_gone = response.is_success or self._session.is_loss(status, refusal_in(response, content))
        if not is_gone and status != httpx2.codes.METHOD_NOT_ALLOWED:
            raise self._session.failure("refused to end the session", status)
        self._session.end()

    # -- The SDK's side: two streams

    async def __aenter__(self) -> tuple["_Incoming", "_Outbox"]:
        if self._connected is not None:
            raise SessionError(
                f"The transport of server {self._endpoint.name!r} was entered before, and goes no second time"
            )
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
    ) -> AsyncGenerator[tuple["_Incoming", "_Outbox"]]:
        inbox, receive = anyio.create_memory_object_stream[_Envelope](_BUFFERED_MESSAGES)
        async with (
            self._owned_client or nullcontext(),
            receive,
            inbox,
            anyio.create_task_group() as tasks,
        ):
            self._inbox, self._tasks = inbox, tasks
            try:
                yield _Incoming(receive), _Outbox(self)
            finally:
                self._inbox = self._tasks = None
                with anyio.move_on_after(DRAIN_SECONDS, shield=True):
                    for exchange in [exchange for exchange in self._exchanges.values() if exchange.is_answered]:
                        await exchange.ended.wait()
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
                self._tasks.start_soon(self._run, self._new_exchange(request, metadata))
            case JSONRPCNotification(method="notifications/initialized") if self._session.is_resumed:
                self._start_listening()
            case JSONRPCNotification(method="notifications/cancelled") as notification:
                await self._cancel(notification)
            case JSONRPCError() as refusal if self._is_for_others(refusal):
                pass
            case JSONRPCResponse() | JSONRPCError() as answer:
                await self._answer(answer)
            case message:
                await self._post_one_way(message, metadata)
                if isinstance(message, JSONRPCNotification) and message.method == "notifications/initialized":
                    self._start_listening()

    async def _deliver(self, message: JSONRPCMessage) -> None:
        if self._inbox is None:
            return
        try:
            await self._inbox.send((contextvars.copy_context(), SessionMessage(message)))
        except (anyio.BrokenResourceError, anyio.ClosedResourceError):
            logger.debug("A message of server %r came after the session object was left", self._endpoint.name)

    # -- What needs no request

    def _answer_here(self, request: JSONRPCRequest, metadata: ClientMessageMetadata | None) -> JSONRPCMessage | None:
        """Return the answer to *request* where it is known without asking the server."""
        session = self._session
        if session.lost is not None:
            return error_message(request.id, INVALID_REQUEST, str(session.lost), session.lost)
        match request.method:
            case "initialize" if session.is_resumed:
                return self._repeat_handshake(request.id)
            case "server/discover" if session.is_resumed and session.version is None:
                return _result(request.id, session.negotiated or {})
            case "server/discover" if not self._may_discover:
                # A server that offers both eras is asked for a session: that is what a handle is for.
                return error_message(request.id, METHOD_NOT_FOUND, "Not asked: the handshake comes first")
            case "tools/list" if self._listings is not None and not (metadata and metadata.resumption_token):
                page = self._listings.get((request.params or {}).get("cursor"))
                return None if page is None else _result(request.id, page)
        return None

    def _repeat_handshake(self, request_id: RequestId) -> JSONRPCMessage:
        """Answer `initialize` from the handle: TypeScript servers refuse a second one, others start over."""
        negotiated = self._session.negotiated or {}
        if self._session.version is not None:
            return _result(request_id, negotiated)
        supported = {"supported": negotiated.get("supportedVersions", []), "requested": "initialize"}
        return error_message(request_id, UNSUPPORTED_PROTOCOL_VERSION, "This server has no handshake", supported)

    # -- Requests

    def _new_exchange(self, request: JSONRPCRequest, metadata: ClientMessageMetadata | None) -> Exchange:
        exchange = Exchange(self._session, request, metadata, prefix=self._prefix, deliver=self._take)
        if (earlier := self._exchanges.get(request.id)) is not None:
            earlier.give_up()  # A reused id means that nobody waits for the earlier one any more.
        self._exchanges[request.id] = exchange
        return exchange

    async def _run(self, exchange: Exchange) -> None:
        try:
            if not await exchange.run():
                await self._tell_cancelled(exchange, "read timeout")
        finally:
            if self._exchanges.get(exchange.request.id) is exchange:
                del self._exchanges[exchange.request.id]

    async def _take(self, exchange: Exchange, message: JSONRPCMessage) -> None:
        """Take a message of a response, keep what later requests need of it, and hand it to the SDK."""
        match message:
            case JSONRPCResponse() if _is_misplaced_handshake(exchange.request, message.result):
                self._session.session_id = None
                message = self._discover_instead(exchange.request.id, "A handshake of a version that has none")
            case JSONRPCResponse():
                self._keep(exchange.request, message.result)
            case JSONRPCError():
                if message.error.code == HEADER_MISMATCH and self._listings is not None:
                    self._listings.drop()  # the SDK lists the tools anew, and is to see what has changed
                message = self._hint_at_discovery(exchange.request, message)
            case JSONRPCNotification() if is_progress(message):
                message = self._with_known_token(exchange, message)
            case JSONRPCRequest():
                exchange.asked(message.id)
            case _:
                self._note_change(message)
        await self._deliver_or_decline(message)

    def _keep(self, request: JSONRPCRequest, result: dict[str, Any]) -> None:
        match request.method:
            case "initialize" | "server/discover":
                self._session.take_handshake(result)
            case "tools/list" if self._listings is not None:
                self._listings.put((request.params or {}).get("cursor"), result)

    def _note_change(self, message: JSONRPCMessage) -> None:
        match message:
            case JSONRPCNotification(method="notifications/tools/list_changed") if self._listings is not None:
                self._listings.drop()
            case JSONRPCNotification(method="notifications/cancelled", params={"requestId": str() | int() as asked}):
                self._note_answer(asked)

    def _hint_at_discovery(self, request: JSONRPCRequest, message: JSONRPCError) -> JSONRPCError:
        """A server that refuses the handshake speaks 2026-07-28 only: have the SDK ask it by `server/discover`."""
        error = message.error
        if request.method != "initialize" or error.code not in _NO_HANDSHAKE:
            return message
        if error.code == UNSUPPORTED_PROTOCOL_VERSION:
            self._may_discover = True
            return message
        return self._discover_instead(request.id, error.message)

    def _discover_instead(self, request_id: RequestId, why: str) -> JSONRPCError:
        self._may_discover = True
        supported = {"supported": [LATEST_MODERN_VERSION], "requested": "initialize"}
        return error_message(request_id, UNSUPPORTED_PROTOCOL_VERSION, why, supported)

    def _with_known_token(self, exchange: Exchange, message: JSONRPCNotification) -> JSONRPCNotification:
        params = dict(message.params or {})
        wire_token = params.get("progressToken")
        for other in (exchange, *self._exchanges.values()):
            # A stream continued from another process names the token of that process.
            if other.progress_token is not None and other.wire_id in {None, wire_token}:
                params["progressToken"] = other.progress_token
                break
        return JSONRPCNotification(jsonrpc="2.0", method=message.method, params=params)

    # -- What the server asks of the client

    async def _deliver_or_decline(self, message: JSONRPCMessage) -> None:
        if not isinstance(message, JSONRPCRequest) or message.method not in self._declines or self._tasks is None:
            await self._deliver(message)
            return
        answer = self._declines[message.method]
        if isinstance(answer, ErrorData):
            refusal = JSONRPCError(jsonrpc="2.0", id=message.id, error=answer)
            self._tasks.start_soon(self._answer, refusal)
        else:
            content = answer.model_dump(by_alias=True, mode="json", exclude_none=True)
            self._tasks.start_soon(self._answer, _result(message.id, content))

    async def _answer(self, answer: JSONRPCResponse | JSONRPCError) -> None:
        await self._post_one_way(answer, None)
        if answer.id is not None:
            self._note_answer(answer.id)

    def _is_for_others(self, refusal: JSONRPCError) -> bool:
        """Whether this end has no answer only because it is left: the call goes on, and who continues it is asked."""
        is_left = refusal.error.code == CONNECTION_CLOSED
        waiting = (refusal.id in exchange.unanswered for exchange in self._exchanges.values())
        return is_left and any(waiting)

    def _note_answer(self, request_id: RequestId) -> None:
        for exchange in self._exchanges.values():
            exchange.answered(request_id)

    # -- Cancellation and one-way messages

    async def cancel(self, on_token: TokenCallback, reason: str) -> None:
        """Cancel the request whose resumption tokens *on_token* takes; nothing where it is not under way.

        The SDK cancels no request that can be resumed: left alone, it goes on here and at the server.
        """
        for exchange in list(self._exchanges.values()):
            if exchange.on_token is on_token:
                await self._give_up(exchange, reason)

    async def _cancel(self, notification: JSONRPCNotification) -> None:
        params = notification.params or {}
        request_id = params.get("requestId")
        exchange = self._exchanges.get(request_id) if isinstance(request_id, str | int) else None
        if exchange is not None:
            await self._give_up(exchange, params.get("reason"))

    async def _give_up(self, exchange: Exchange, reason: object) -> None:
        """Tell the server that a request is given up, and stop reading its response.

        Up to 2025-11-25 the notification tells; in 2026-07-28 closing the response does, and there is no notification.
        """
        await self._tell_cancelled(exchange, reason)
        exchange.give_up()

    async def _tell_cancelled(self, exchange: Exchange, reason: object) -> None:
        if self._session.version is None or exchange.wire_id is None:
            return
        params = {"requestId": exchange.wire_id, "reason": str(reason)}
        message = JSONRPCNotification(jsonrpc="2.0", method="notifications/cancelled", params=params)
        await self._post_one_way(message, None)

    async def _post_one_way(self, message: JSONRPCMessage, metadata: ClientMessageMetadata | None) -> None:
        """Send a notification, or the answer to a request of the server. What goes wrong shows at the next request."""
        if self.lost is not None:
            return
        body = message.model_dump(by_alias=True, mode="json", exclude_unset=True)
        headers = self._session.headers(metadata)
        try:
            with anyio.fail_after(ONE_WAY_SECONDS):
                async with self._endpoint.stream("POST", headers=headers, json=body) as response:
                    content = await response.aread()
        except (TransportError, TimeoutError) as exc:
            logger.debug("A message could not be sent: %s", exc)
            return
        if self._session.is_loss(response.status_code, refusal_in(response, content)):
            self._session.lose(response.status_code)

    # -- The standalone stream, where it is asked for

    def _start_listening(self) -> None:
        if self._listen and self._tasks is not None and self._session.version is not None:
            self._tasks.start_soon(self._listen_on)

    async def _listen_on(self) -> None:
        """Read what the server sends outside of requests. One holder at a time may: 409 and 405 end it quietly."""
        session_id = self.session_id
        last_event_id: str | None = None
        failures = 0
        # Not past the end of the session: Python servers open one for a GET that names none.
        while self._listen and failures < RESUME_ATTEMPTS and self.session_id == session_id:
            headers = self._session.headers() | ({"last-event-id": last_event_id} if last_event_id else {})
            pause_seconds: float | None = None
            try:
                async with self._endpoint.stream("GET", headers=headers) as response:
                    if not response.is_success or media_type(response) != "text/event-stream":
                        logger.debug("Server %r gives no stream (HTTP %s)", self._endpoint.name, response.status_code)
                        return
                    async for event in httpx2.EventSource(response, max_event_size=MAX_EVENT_BYTES):
                        failures = 0
                        last_event_id = event.id or last_event_id
                        pause_seconds = event.retry / 1000 if event.retry is not None else pause_seconds
                        await self._take_unasked(event.data)
            except (TransportError, httpx2.SSEError) as exc:
                logger.debug("The stream of server %r broke off: %s", self._endpoint.name, exc)
            await anyio.sleep(min(pause_seconds or pause(failures), RESUME_PAUSE_SECONDS))
            failures += 1

    async def _take_unasked(self, data: str) -> None:
        message = parse(data) if data else None
        if message is not None and not isinstance(message, JSONRPCResponse | JSONRPCError):
            self._note_change(message)
            await self._deliver_or_decline(message)


#: A message, and the context variables of the call to which it belongs.
_Envelope = tuple[contextvars.Context, SessionMessage | Exception]


class _Incoming:
    """The read stream that the SDK gets: what the server sends is taken in the context of the call it belongs to."""

    def __init__(self, stream: MemoryObjectReceiveStream[_Envelope]) -> None:
        self._stream = stream
        #: Of the message that was received last; the SDK's dispatcher looks for this name.
        self.last_context: contextvars.Context | None = None

    async def receive(self) -> SessionMessage | Exception:
        self.last_context, message = await self._stream.receive()
        return message

    async def aclose(self) -> None:
        await self._stream.aclose()

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> SessionMessage | Exception:
        try:
            return await self.receive()
        except anyio.EndOfStream:
            raise StopAsyncIteration from None

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None
    ) -> bool | None:
        await self.aclose()
        return None


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
    prefer_stateless: bool = False,
) -> ResumableHTTPTransport:
    """Return a transport for the endpoint *url*, from *handle* where the session exists already.

    Example:
        async with Client(transport := resumable_http(url)) as client:
            await client.call_tool("assign", {"name": "x", "value": 1})
            text = transport.detach().dumps()         # keep it; leaving the block keeps the session alive

        async with Client(transport := resumable_http(url, handle=text)) as client:   # elsewhere, later
            await client.call_tool("evaluate", {"expression": "x + 1"})
            await transport.terminate()

    Args:
        url: http or https. Credentials in it are sent by HTTP Basic and never shown.
        handle: A `SessionHandle`, or what its `dumps` gave.
        headers: Sent with each request.
        server: What error texts and handles call the server; by default the name in the handle, or the URL without
            credentials.
        listen: Open the server's standalone stream as well. Some servers end a session when it is dropped.
        prefer_stateless: Ask a server that offers both for the stateless protocol (2026-07-28), as the SDK's own
            transport does, and not for a session. Means nothing with *handle*: that says which it is.

    Raises:
        SessionHandleError: The handle cannot be read or is of another server.
    """
    place, auth = split_credentials(url)
    session = None if handle is None else SessionHandle.load(handle)
    # A handle out of a task may carry a name of `mcp_servers`, which says nothing of the URL.
    is_named = session is not None and "://" not in session.server
    name = server or (session.server if session is not None and is_named else server_name(url))
    if session is not None and session.server != name:
        raise SessionHandleError(f"The session handle is of server {session.server!r}, not of {name!r}")
    client = new_client(place, headers=headers, auth=auth)
    endpoint = Endpoint(place, client, name=name, cookies=session.cookies if session else None)
    return ResumableHTTPTransport(
        endpoint, handle=session, listen=listen, prefer_stateless=prefer_stateless, owned_client=client
    )


def resume(
    handle: SessionHandle | str,
    *,
    url: str | None = None,
    headers: Mapping[str, str] | None = None,
    listen: bool = False,
) -> ResumableHTTPTransport:
    """Return a transport that continues the session behind *handle*: `resumable_http` for who has nothing else.

    Example:
        async with Client(resume(text)) as client:  # the next invocation of a function, anywhere
            await client.call_tool("evaluate", {"expression": "x + 1"})

    Args:
        handle: What `ResumableHTTPTransport.detach` gave, or its `dumps`.
        url: Where the handle does not say: it holds no credentials and no query, and the server's name in
            `mcp_servers` in place of the URL where a task has opened the session.
        headers: Sent with each request; none are in the handle.
        listen: As `resumable_http` has it.

    Raises:
        SessionHandleError: The handle cannot be read, is of another server than *url*, or a URL is needed.
    """
    session = SessionHandle.load(handle)
    if url is None and "://" not in session.server:
        raise SessionHandleError(f"The session handle names server {session.server!r} and no URL: pass url=...")
    return resumable_http(url or session.server, handle=session, headers=headers, listen=listen)


def _is_misplaced_handshake(request: JSONRPCRequest, result: Mapping[str, Any]) -> bool:
    """Whether a handshake is answered with a version of the stateless era, as some servers of that era do."""
    return request.method == "initialize" and result.get("protocolVersion") in MODERN_PROTOCOL_VERSIONS


def _result(request_id: RequestId, result: Mapping[str, Any]) -> JSONRPCResponse:
    # A copy: the SDK edits what it validates.
    return JSONRPCResponse(jsonrpc="2.0", id=request_id, result=dict(result))
