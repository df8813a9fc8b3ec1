"""The tools that a server has listed, kept for all sessions of a process."""

import math
import time
from typing import Any

#: How long a listing serves the SDK's look-ups of output schemas.
LISTING_SECONDS = 300.0


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
