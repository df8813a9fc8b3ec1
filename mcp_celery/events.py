"""What happens in a session, as it is told to who feeds metrics: `signals` sends it on, in the task's thread."""

import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Literal, NamedTuple

from .exceptions import SessionLostError

#: Who ended a session: the task by `close()`, or the end of the last task that held it.
Why = Literal["task", "workflow"]


class Event(NamedTuple):
    """What happened, by the name of its signal, and the arguments of that. Holds no secret."""

    name: str
    arguments: Mapping[str, Any]


class OpenCall:
    """A call under way."""

    def __init__(self) -> None:
        #: The class of the error that it has ended with, or None.
        self.error: str | None = None
        self.is_replayed = False

    def note_replay(self) -> None:
        """Nothing is sent: an earlier run of the task has made the call, and told of it."""
        self.is_replayed = True


class Events:
    """Tells of one session object, on the event loop: what is told may not wait.

    Args:
        server: The server, as handles call it.
        tell: Takes each event as it happens; None where nobody wants to know.
    """

    def __init__(self, server: str, tell: Callable[[Event], object] | None) -> None:
        self._server = server
        self._tell = tell
        #: The session, as a hash that may be shown; None before it is open, and for a server without sessions.
        self.session: str | None = None
        self._has_told_loss = False

    def opened(self, session: str | None, *, resumed: bool) -> None:
        """The session is open here. Told of real sessions only: others have nothing to open."""
        self.session = session
        self._has_told_loss = False
        self._send_of_session("session_resumed" if resumed else "session_opened")

    def closed(self, session: str | None, why: Why) -> None:
        """The session has ended at its server."""
        self.session = session
        self._send_of_session("session_closed", why=why)

    def lost(self) -> None:
        """A call has found the session gone; told once, though every other call finds the same."""
        if not self._has_told_loss:
            self._has_told_loss = True
            self._send_of_session("session_lost")

    @contextmanager
    def call(self, method: str, tool: str | None = None) -> Iterator[OpenCall]:
        """Tell of a call at its end."""
        call, started = OpenCall(), time.monotonic()
        try:
            yield call
        except BaseException as exc:
            call.error = type(exc).__name__
            if isinstance(exc, SessionLostError) and not call.is_replayed:
                self.lost()
            raise
        finally:
            if not call.is_replayed:
                seconds = time.monotonic() - started
                self._send("call_finished", method=method, tool=tool, seconds=seconds, error=call.error)

    def _send_of_session(self, name: str, **arguments: Any) -> None:
        if self.session is not None:
            self._send(name, **arguments)

    def _send(self, name: str, **arguments: Any) -> None:
        if self._tell is not None:
            self._tell(Event(name, {"server": self._server, "session": self.session, **arguments}))


class Told:
    """What has happened in a session on the event loop, until it is told in the thread of the task."""

    def __init__(self, tell: Callable[[Event], object]) -> None:
        self._tell = tell
        self._events: deque[Event] = deque()

    def note(self, event: Event) -> None:
        """Keep what has happened. Runs on the event loop."""
        self._events.append(event)

    def tell(self) -> None:
        """Tell what has happened, in order, and once. Runs in the thread of the task, perhaps in several."""
        while self._events:
            try:
                event = self._events.popleft()
            except IndexError:  # another thread of the task has told it
                return
            self._tell(event)
