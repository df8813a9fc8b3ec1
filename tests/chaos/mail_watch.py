"""Messages that the broker's client loses: Kombu takes them off a Redis queue before it notes that it has them.

A worker that is killed between the two, or whose connection breaks, takes the message along, whatever is configured.
That is not what is tested here, so such messages are put back, and counted.
"""

import re
import socket
import threading
import time
from contextlib import suppress
from typing import Self

from redis import Redis, RedisError

#: A message that is nowhere for so long is lost.
LOST_SECONDS = 3.0

_PIECE = re.compile(rb'"((?:[^"\\]|\\.)*)"')
_TAG = re.compile(r'"delivery_tag": "([0-9a-f-]+)"')


class MailWatch:
    """Follows what is done to a queue by MONITOR, in a thread of its own."""

    def __init__(self, port: int, queue: str = "celery") -> None:
        self._port = port
        self._queue = queue
        self._sent: dict[str, tuple[str, float]] = {}
        self._lock = threading.Lock()
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="mail watch", daemon=True)
        #: How many were put back.
        self.put_back = 0

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._ended.set()
        self._thread.join(timeout=10)

    def tend(self) -> None:
        """Put back what is lost."""
        with self._lock:
            old = {tag: text for tag, (text, at) in self._sent.items() if time.monotonic() - at > LOST_SECONDS}
        if not old:
            return
        with suppress(RedisError), Redis(port=self._port, decode_responses=True) as client:
            queued = {found[1] for text in client.lrange(self._queue, 0, -1) if (found := _TAG.search(text))}
            for tag, text in old.items():
                with self._lock:
                    is_lost = tag not in queued and self._sent.pop(tag, None) is not None
                if is_lost and not client.hexists("unacked", tag):
                    client.lpush(self._queue, text)
                    self.put_back += 1

    def _watch(self) -> None:
        while not self._ended.is_set():
            try:
                with socket.create_connection(("127.0.0.1", self._port), timeout=1) as connection:
                    connection.sendall(b"MONITOR\r\n")
                    self._follow(connection)
            except OSError:
                self._ended.wait(0.05)

    def _follow(self, connection: socket.socket) -> None:
        rest = b""
        while not self._ended.is_set():
            try:
                data = connection.recv(1 << 20)
            except TimeoutError:
                continue
            if not data:
                return
            *lines, rest = (rest + data).split(b"\r\n")
            for line in lines:
                self._note(line)

    def _note(self, line: bytes) -> None:
        pieces = [piece.decode("unicode_escape") for piece in _PIECE.findall(line)]
        match pieces:
            case ["LPUSH" | "RPUSH", self._queue, text] if found := _TAG.search(text):
                with self._lock:
                    self._sent[found[1]] = (text, time.monotonic())
            case ["HSET", "unacked", tag, *_]:
                with self._lock:
                    self._sent.pop(tag, None)
            case _:
                pass
