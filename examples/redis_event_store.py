"""An event store of the MCP SDK over Redis: a response that broke off is continued, whichever process has the events.

    events = RedisEventStore("redis://localhost")
    app = events.around(server.streamable_http_app(event_store=events))

The SDK names a stream by the JSON-RPC id of its request alone, and many clients count those from 0. So the streams
here go by session as well, which `around` finds out: without it, one session could be given the answers of another.

Where Redis does not answer, messages go to the client all the same, and cannot be continued.
"""

import hashlib
import logging
from contextvars import ContextVar
from dataclasses import dataclass
from secrets import token_hex

from mcp.server.streamable_http import EventCallback, EventId, EventMessage, EventStore, StreamId
from mcp.types import JSONRPCMessage, jsonrpc_message_adapter
from redis import RedisError
from redis.asyncio import Redis
from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

logger = logging.getLogger(__name__)

TIMEOUT_SECONDS = 2
#: Events that are read at once.
PAGE = 100


@dataclass
class Session:
    """Whose streams they are. The task that serves a session inherits this from the request that has opened it."""

    #: A guess at it is as hard as one at the session ID.
    name: str


_session: ContextVar[Session] = ContextVar("session")
#: The event up to which this task has replayed a stream.
_replayed: ContextVar[EventId | None] = ContextVar("replayed", default=None)


class RedisEventStore(EventStore):
    """Keeps the last *max_events* of each stream (about: Redis cuts in blocks), *ttl_seconds* long after its last one.

    One Redis stream for each: `{prefix}:{hash of session and request}`. An event ID is that hash and the ID there.
    """

    def __init__(
        self, url: str, *, prefix: str = "mcp-events", max_events: int = 1000, ttl_seconds: int = 3600
    ) -> None:
        self._redis = Redis.from_url(url, socket_timeout=TIMEOUT_SECONDS, socket_connect_timeout=TIMEOUT_SECONDS)
        self._prefix = prefix
        self._max_events = max_events
        self._ttl_seconds = ttl_seconds

    async def aclose(self) -> None:
        """Close the connections to Redis."""
        await self._redis.aclose()

    def around(self, app: ASGIApp) -> ASGIApp:
        """Return *app*, with each request in the name of its session."""

        async def serve(scope: Scope, receive: Receive, send: Send) -> None:
            session_id = Headers(scope=scope).get("mcp-session-id") if scope["type"] == "http" else None
            session = Session(_hash(session_id) if session_id else token_hex(16))

            async def send_named(message: Message) -> None:
                if message["type"] == "http.response.start" and session_id is None:
                    opened = Headers(raw=message["headers"]).get("mcp-session-id")
                    session.name = _hash(opened) if opened else session.name
                await send(message)

            token = _session.set(session)
            try:
                await app(scope, receive, send_named)
            finally:
                _session.reset(token)

        return serve

    async def store_event(self, stream_id: StreamId, message: JSONRPCMessage | None) -> EventId:
        replayed = _replayed.get()
        if message is None and replayed is not None:
            # The SDK begins a continued response with an event of its own. A message may have come since the replay:
            # who continues from this event must get it.
            return replayed
        stream = _hash(_session.get().name, stream_id)
        key = f"{self._prefix}:{stream}"
        text = "" if message is None else message.model_dump_json(by_alias=True, exclude_unset=True)
        try:
            async with self._redis.pipeline() as pipe:
                pipe.xadd(key, {"stream": stream_id, "message": text}, maxlen=self._max_events)
                pipe.expire(key, self._ttl_seconds)
                entry, _ = await pipe.execute()
        except RedisError as exc:
            # An error here would end the SDK's task that hands on all messages of the session.
            logger.warning("An event is not kept (%s): its response cannot be continued", type(exc).__name__)
            return ""
        return f"{stream}:{entry.decode()}"

    async def replay_events_after(self, last_event_id: EventId, send_callback: EventCallback) -> StreamId | None:
        """Send what came after an event on its stream; the SDK then attaches the caller to what is to come.

        Nothing where the event is not there any more: what came next may be gone as well.
        """
        stream, _, last = last_event_id.partition(":")
        key = f"{self._prefix}:{stream}"
        try:
            known = await self._redis.xrange(key, min=last, max=last)
            if not known:
                return None
            while found := await self._redis.xrange(key, min=f"({last}", count=PAGE):
                for entry, fields in found:
                    last = entry.decode()
                    if fields[b"message"]:
                        message = jsonrpc_message_adapter.validate_json(fields[b"message"], by_name=False)
                        await send_callback(EventMessage(message, f"{stream}:{last}"))
        except RedisError as exc:
            logger.warning("A response is not continued (%s)", type(exc).__name__)
            return None
        _replayed.set(f"{stream}:{last}")
        stream_id: StreamId = known[0][1][b"stream"].decode()
        return stream_id


def _hash(*parts: str) -> str:
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:32]
