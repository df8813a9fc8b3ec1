"""One JSON-RPC request over Streamable HTTP: its POST, the response in either form, and the resumption of that."""

import logging
import math
from collections.abc import Awaitable, Callable
from typing import Any

import anyio
import httpx2
from mcp.shared.message import ClientMessageMetadata
from mcp_types import (
    CONNECTION_CLOSED,
    INVALID_REQUEST,
    ErrorData,
    JSONRPCError,
    JSONRPCMessage,
    JSONRPCNotification,
    JSONRPCRequest,
    JSONRPCResponse,
    RequestId,
    jsonrpc_message_adapter,
)
from pydantic import ValidationError

from .exceptions import MCPCeleryError, SessionLostError, TransportError
from .remote_session import RemoteSession

logger = logging.getLogger(__name__)

#: Failed attempts in a row (no connection, an error status, a stream that ends with nothing new) before giving up.
RESUME_ATTEMPTS = 10
#: The pause before an attempt grows to this, as does the time that a continued stream may say nothing. A server whose
#: store gives the events only after the tool has finished (server-everything) is asked again at this pace.
RESUME_PAUSE_SECONDS = 10.0
#: How long the rest of an answered stream is waited for, to use its connection again.
DRAIN_SECONDS = 0.5
#: Between the parts of a resumption token; no character of a line.
_SEPARATOR = "\x1f"
#: What takes the resumption tokens of a request.
TokenCallback = Callable[[str], Awaitable[None]]
#: One server-sent event may be this large.
MAX_EVENT_BYTES = 64 * 1024 * 1024


class Exchange:
    """One request of the SDK, under way.

    Every message of its response goes to *deliver*: notifications as the server sent them, the answer under the id
    that the SDK gave the request. An error stands in where no answer can come.

    Attributes:
        wire_id: The id on the wire, and the progress token. None for a request that another process has sent and that
            is continued here by a token which does not name it: all of the stream is its own.
        ended: Set at the end of `run`, when the rest of the response was read or given up.
    """

    def __init__(
        self,
        session: RemoteSession,
        request: JSONRPCRequest,
        metadata: ClientMessageMetadata | None,
        *,
        prefix: str,
        deliver: Callable[["Exchange", JSONRPCMessage], Awaitable[None]],
    ) -> None:
        self.request = request
        token = metadata.resumption_token if metadata else None
        #: Another process has sent the request: its response is continued here.
        self._is_continued = bool(token)
        self._last_event_id: str | None = None
        self.wire_id: str | None = f"{prefix}-{request.id}"
        if token:
            self._last_event_id, self.wire_id = read_token(token)
        self.ended = anyio.Event()
        self.is_answered = False
        #: The ids of what the server has asked and waits for.
        self.unanswered: set[RequestId] = set()
        self._session = session
        self._endpoint = session.endpoint
        self._metadata = metadata
        self._deliver = deliver
        self._scope = anyio.CancelScope()
        self._is_given_up = False
        self._can_resume = True
        self._pause_seconds: float | None = None
        #: While a stream is continued: how long it may say nothing new before the server is asked again.
        self._window: anyio.CancelScope | None = None
        self._window_seconds = 0.0

    @property
    def progress_token(self) -> RequestId | None:
        """The token by which the SDK knows the progress of this request; None where it wants none."""
        token = ((self.request.params or {}).get("_meta") or {}).get("progressToken")
        return token if isinstance(token, str | int) else None

    @property
    def on_token(self) -> TokenCallback | None:
        """What takes the resumption tokens of this request."""
        return self._metadata.on_resumption_token_update if self._metadata is not None else None

    def give_up(self) -> None:
        """Stop reading the response: nobody waits for it."""
        self._is_given_up = True
        self._scope.cancel()

    def asked(self, request_id: RequestId) -> None:
        """The server waits for an answer of ours: the read timeout does not run meanwhile."""
        self.unanswered.add(request_id)
        self._heard()

    def answered(self, request_id: RequestId) -> None:
        """The server has its answer, or wants none any more."""
        if request_id in self.unanswered:
            self.unanswered.discard(request_id)
            self._heard()

    async def run(self) -> bool:
        """Bring the answer, or the error that stands for it. Raises nothing.

        Returns:
            False where the server was silent for the read timeout, and is to be told that the request is given up.
        """
        try:
            with self._scope:
                self._heard()
                if self._is_continued or not await self._post():
                    await self._resume()
            if self._scope.cancelled_caught and not (self._is_given_up or self.is_answered):
                limit = self._endpoint.read_timeout_seconds or 0
                what = f"was silent for {limit:g} s (read_timeout_seconds)"
                await self._fail(self._session.failure(what, cancelled=True))
                return False
        except MCPCeleryError as exc:
            if not self.is_answered:
                await self._fail(exc)
        finally:
            self.ended.set()
        return True

    async def _fail(self, error: MCPCeleryError) -> None:
        code = INVALID_REQUEST if isinstance(error, SessionLostError) else CONNECTION_CLOSED
        await self._deliver(self, error_message(self.request.id, code, str(error), error))

    def _heard(self) -> None:
        """The read timeout starts anew with each message of the response, progress among them."""
        patience = math.inf if self.unanswered else self._endpoint.read_timeout_seconds or math.inf
        self._scope.deadline = anyio.current_time() + patience

    # -- The request and its response

    async def _post(self) -> bool:
        """Send the request and read its response. False where the stream broke off and can be resumed."""
        if self._session.lost is not None:
            raise self._session.lost
        try:
            # `run` bounds the silence: while the server waits for an answer of ours, it is not the server's.
            async with self._endpoint.stream(
                "POST", headers=self._headers(), json=self._body(), is_patient=True
            ) as response:
                if response.is_success and media_type(response) == "text/event-stream":
                    self._take_session_id(response)
                    await self._read_events(response)
                else:
                    await self._read_body(response)
        except TransportError:
            if self._last_event_id is None or not self._can_resume:
                raise
            logger.debug("The response stream of server %r broke off; continuing it", self._endpoint.name)
        if not self.is_answered and self._last_event_id is None:
            raise self._session.failure(f"ended its response to {self.request.method} without an answer")
        return self.is_answered

    def _headers(self) -> dict[str, str]:
        headers = self._session.headers(self._metadata)
        if self.request.method == "initialize":
            return {"accept": headers["accept"]}
        return headers

    def _body(self) -> dict[str, Any]:
        """Return the request under its wire id, its parameters as the SDK dumped them."""
        body: dict[str, Any] = {"jsonrpc": "2.0", "id": self.wire_id, "method": self.request.method}
        if self.request.params is not None:
            body["params"] = self.request.params
            if self.progress_token is not None:
                meta = {**self.request.params["_meta"], "progressToken": self.wire_id}
                body["params"] = {**self.request.params, "_meta": meta}
        return body

    def _take_session_id(self, response: httpx2.Response) -> None:
        if self.request.method == "initialize":
            self._session.take_id(response)

    async def _read_body(self, response: httpx2.Response) -> None:
        """Read a response that is not an event stream: a JSON-RPC answer, or a refusal."""
        content = await response.aread()
        message = parse(content) if media_type(response) == "application/json" else None
        method, status = self.request.method, response.status_code
        if response.is_success:
            if not isinstance(message, JSONRPCResponse | JSONRPCError):
                kind = media_type(response) or "no content"
                raise self._session.failure(f"answered {method} with {kind} instead of JSON-RPC", status)
            self._take_session_id(response)
            await self._accept(message)
            return
        refusal = message if isinstance(message, JSONRPCError) else None
        if method not in {"initialize", "server/discover"} and self._session.is_loss(status, refusal):
            raise self._session.lose(status)
        if refusal is None:
            raise self._session.failure(f"answered {method} with HTTP {status}", status)
        await self._accept(JSONRPCError(jsonrpc="2.0", id=self.wire_id, error=refusal.error))

    async def _read_events(self, response: httpx2.Response) -> None:
        """Hand on the events of a stream until it ends; after the answer, only as long as `DRAIN_SECONDS`."""
        drain = anyio.CancelScope()
        try:
            with drain:
                async for event in httpx2.EventSource(response, max_event_size=MAX_EVENT_BYTES):
                    if not self.is_answered:
                        await self._take_event(event)
                        if self.is_answered:
                            if self._window is not None:
                                # A continued stream is not read on: most servers leave it open.
                                break
                            drain.deadline = anyio.current_time() + DRAIN_SECONDS
        except httpx2.SSEError as exc:
            self._can_resume = False
            raise self._session.failure(f"sent an event stream that cannot be read ({exc})") from exc

    async def _take_event(self, event: httpx2.ServerSentEvent) -> None:
        if event.retry is not None:
            self._pause_seconds = min(event.retry / 1000, RESUME_PAUSE_SECONDS)
        if event.event == "message" and event.data:
            await self._accept_event(event.data)
        if event.id and event.id != self._last_event_id and not self.is_answered:
            self._last_event_id = event.id
            if self._window is not None:
                self._window.deadline = anyio.current_time() + self._window_seconds
            # Not past a request of the server that has no answer: who continues the response is to be asked again.
            if self.on_token is not None and not self.unanswered:
                await self._tell_token(self.on_token, write_token(event.id, self.wire_id))

    async def _tell_token(self, callback: TokenCallback, token: str) -> None:
        try:
            await callback(token)
        except Exception:
            # The caller's own code: the call goes on, and can be resumed from an earlier token.
            logger.exception("The callback for resumption tokens of server %r raised", self._endpoint.name)

    async def _accept_event(self, data: str) -> None:
        message = parse(data)
        if message is None and data == "{}" and self.wire_id is not None:
            # server-everything replays all streams of a session, and an event that only gives an ID like this.
            return
        if message is None:
            self._can_resume = False
            raise self._session.failure(f"sent an event that is not JSON-RPC in answer to {self.request.method}")
        await self._accept(message)

    async def _accept(self, message: JSONRPCMessage) -> None:
        """Hand on a message of the response, the answer under the id that the SDK knows."""
        self._heard()
        if not isinstance(message, JSONRPCResponse | JSONRPCError):
            await self._deliver(self, message)
            return
        if message.id is not None and self.wire_id not in {None, message.id}:
            logger.debug("Server %r sent an answer that is not to this request", self._endpoint.name)
            return
        await self._deliver(self, message.model_copy(update={"id": self.request.id}))
        # Not before: a deadline may strike in between, and an answer that went nowhere has to be asked for again.
        self.is_answered = True

    # -- Resumption (MCP 2025-11-25, Transports, Resumability and Redelivery)

    async def _resume(self) -> None:
        """Continue a stream that broke off, until its answer; the read timeout goes on meanwhile.

        Raises:
            SessionLostError: The server no longer knows the session.
            TransportError: It cannot be resumed, or `RESUME_ATTEMPTS` in a row gave nothing new.
        """
        failures, quiet_windows, why = 0, 0, ""
        while failures < RESUME_ATTEMPTS:
            await anyio.sleep(self._pause_seconds if self._pause_seconds is not None else pause(failures))
            before = self._last_event_id
            self._window_seconds = pause(quiet_windows + 3)
            with anyio.move_on_after(self._window_seconds) as self._window:
                try:
                    await self._get_rest()
                    why = "its stream ended without the answer"
                except TransportError as exc:
                    if not self._can_resume or not _may_try_again(exc):
                        raise
                    why = str(exc)
            if self.is_answered:
                return
            if self._window.cancelled_caught:
                # Also after something new: server-everything gives what its tool has said so far, and then no more.
                quiet_windows += 1
            elif self._last_event_id != before:
                # Something new, so this is no failure; but a server that ends each stream is not asked at full speed.
                failures, quiet_windows = 1, 0
            else:
                failures += 1
        raise self._session.failure(f"broke off its response to {self.request.method}, and resuming it failed: {why}")

    async def _get_rest(self) -> None:
        if self._session.lost is not None:
            raise self._session.lost
        headers = {**self._session.headers(), "last-event-id": self._last_event_id or ""}
        async with self._endpoint.stream("GET", headers=headers, is_patient=True) as response:
            status = response.status_code
            if status == httpx2.codes.NOT_FOUND and self._session.is_loss(status, None):
                raise self._session.lose(status)
            if not response.is_success or media_type(response) != "text/event-stream":
                raise self._session.failure(f"cannot resume a response (HTTP {status})", status)
            await self._read_events(response)


def write_token(event_id: str, wire_id: str | None) -> str:
    """Return the resumption token of a request: where its response is continued, and under which id it was sent.

    The id tells its answer from others: server-everything replays all streams of a session at once.
    """
    return event_id if wire_id is None else f"{event_id}{_SEPARATOR}{wire_id}"


def read_token(token: str) -> tuple[str, str | None]:
    """Return the event ID of a resumption token, and the id of the request where the token has it."""
    event_id, _, wire_id = token.partition(_SEPARATOR)
    return event_id, wire_id or None


def parse(content: bytes | str) -> JSONRPCMessage | None:
    """Return the JSON-RPC message in *content*, or None where there is none."""
    try:
        return jsonrpc_message_adapter.validate_json(content, by_name=False)
    except ValidationError:
        return None


def refusal_in(response: httpx2.Response, content: bytes) -> JSONRPCError | None:
    """Return the JSON-RPC error that a response carries, if it does."""
    message = parse(content) if media_type(response) == "application/json" else None
    return message if isinstance(message, JSONRPCError) else None


def error_message(request_id: RequestId, code: int, message: str, data: object = None) -> JSONRPCError:
    """Return an error made here. One of our exceptions as *data* stays in this process, where the session raises it."""
    return JSONRPCError(jsonrpc="2.0", id=request_id, error=ErrorData(code=code, message=message, data=data))


def media_type(response: httpx2.Response) -> str:
    """Return the media type of a response in lower case, without its parameters."""
    content_type: str = response.headers.get("content-type", "")
    return content_type.partition(";")[0].strip().lower()


def pause(attempt: int) -> float:
    """Return the seconds before an attempt: 0, 0.25, 0.5, 1, 2 ... `RESUME_PAUSE_SECONDS`."""
    return 0.0 if attempt == 0 else min(0.125 * 2.0**attempt, RESUME_PAUSE_SECONDS)


def is_progress(message: JSONRPCMessage) -> bool:
    """Whether *message* reports progress."""
    return isinstance(message, JSONRPCNotification) and message.method == "notifications/progress"


def _may_try_again(exc: TransportError) -> bool:
    """Whether a failed resumption can go better the next time: not after a refusal that will not change."""
    return exc.status is None or exc.status in {409, 425, 429} or exc.status >= httpx2.codes.INTERNAL_SERVER_ERROR
