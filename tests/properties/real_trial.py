"""One trial on real workers: a canvas is published, and once all of it is over all invariants are checked."""

from collections.abc import Sequence
from typing import Any, Self

from canvases import Canvas, signature
from invariants import Event, outcome
from journal import SharedJournal
from processes import wait_until
from quick_server import QuickServer
from redis import ConnectionError, Redis  # noqa: A004 - as redis-py calls it
from steps import new_app
from trial import check_run, stored

#: How long a canvas may take on a busy machine.
RUN_SECONDS = 60.0


class RealTrials:
    """What trials need beside the workers, who are to use the broker at *url*: a quick MCP server, and a publisher.

    Attributes:
        environment: What the workers find the broker and the server by.
    """

    def __init__(self, url: str) -> None:
        self._url = url
        self._client = Redis.from_url(url, decode_responses=True)
        self._journal = SharedJournal(url)
        self._server = QuickServer(self._journal)

    def __enter__(self) -> Self:
        self._client.flushdb()
        self._server.__enter__()
        url = self._server.url
        self.environment = {"BROKER": self._url, "PEER": url}
        self._app = new_app(self._url, self._url, url, self._journal.append, pause=lambda: None, has_sessions=True)
        return self

    def __exit__(self, *exc_info: object) -> None:
        consumer = self._app.backend.result_consumer
        consumer.stop()
        consumer.subscribed_to.clear()  # or results unsubscribe when they are collected, perhaps too late
        self._app.close()
        self._journal.close()
        self._client.close()
        self._server.__exit__(*exc_info)

    def check(self, canvas: Canvas, plain: tuple[Sequence[Event], Any], workers: int) -> None:
        """Run *canvas* on so many *workers*; *plain* is what it does with plain tasks.

        Raises:
            TimeoutError: It does not end.
            ViolationError: An invariant does not hold.
        """
        self._journal.clear()
        if left := stored(self._client):  # by a canvas that has failed
            self._client.delete(*left)
        result = signature(canvas, self._app).apply_async()
        self._wait_for_rest(workers)
        check_run(canvas, plain, (self._journal.read(), outcome(result)), stored(self._client))

    def _wait_for_rest(self, workers: int) -> None:
        """Wait until twice in turn nothing is queued, nothing is under way, and nothing was noted in between.

        A worker may have taken a message off the queue of which it does not tell yet. It does at the second time.
        """
        inspect = self._app.control.inspect(timeout=1, limit=workers)
        queue = self._app.conf.task_default_queue
        noted = [-1]

        def is_at_rest() -> bool:
            try:
                under_way = [inspect.active() or {}, inspect.reserved() or {}, inspect.scheduled() or {}]
            except ConnectionError:
                return False
            is_idle = all(len(told) == workers and not any(told.values()) for told in under_way)
            is_idle = is_idle and not self._client.exists(queue, "unacked")
            noted.append(len(self._journal.read()) if is_idle else -1)
            return is_idle and noted[-1] == noted[-2]

        wait_until(is_at_rest, RUN_SECONDS, "a canvas to be over on the workers")
