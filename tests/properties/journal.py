"""A journal that several processes write to."""

import json
from typing import Any

from redis import Redis


class SharedJournal:
    """A list in a Redis: what was appended first, in whatever process, comes first."""

    def __init__(self, url: str) -> None:
        self._client = Redis.from_url(url, decode_responses=True)

    def append(self, event: dict[str, Any]) -> None:
        """Return when *event* is written."""
        self._client.rpush("journal", json.dumps(event))

    def read(self) -> list[dict[str, Any]]:
        """Return all events, in order."""
        return [json.loads(event) for event in self._client.lrange("journal", 0, -1)]

    def clear(self) -> None:
        """Forget all events."""
        self._client.delete("journal")

    def close(self) -> None:
        """Close the connections of this process."""
        self._client.close()
