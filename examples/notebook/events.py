"""The events of a server that is one process: with them a response that broke off is continued, by any client."""

from itertools import count

from mcp.server.streamable_http import EventCallback, EventId, EventMessage, EventStore, StreamId
from mcp.types import JSONRPCMessage

MOST_EVENTS = 10_000


class EventsInMemory(EventStore):
    """Keeps the last events of all sessions, numbered from 1."""

    def __init__(self) -> None:
        self._numbers = count(1)
        self._events: dict[int, tuple[StreamId, JSONRPCMessage | None]] = {}

    async def store_event(self, stream_id: StreamId, message: JSONRPCMessage | None) -> EventId:
        number = next(self._numbers)
        self._events[number] = (stream_id, message)
        self._events.pop(number - MOST_EVENTS, None)
        return str(number)

    async def replay_events_after(self, last_event_id: EventId, send_callback: EventCallback) -> StreamId | None:
        """Send what came after an event on its stream; the SDK then attaches the caller to what is to come."""
        number = int(last_event_id) if last_event_id.isdecimal() else 0
        if number not in self._events:
            return None
        stream_id, _ = self._events[number]
        while (number := number + 1) in self._events:
            stream, message = self._events[number]
            if stream == stream_id and message is not None:
                await send_callback(EventMessage(message, str(number)))
        return stream_id
