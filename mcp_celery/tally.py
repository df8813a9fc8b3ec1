"""What one execution tells the store of the sessions that it holds, and asks it.

Nothing here raises where there is no store, or no answer from it: then it is not known who holds a session.
"""

import logging
import time
from collections.abc import Callable, Mapping
from functools import cache
from typing import Any

from .exceptions import ConfigurationError, StoreError
from .handle import SessionHandle
from .known_tasks import of_server, warn_of_store
from .redis_store import get_store
from .store import Change, Leaving, Standing, Store

logger = logging.getLogger(__name__)


class Tally:
    """Who holds the sessions of one execution, as its holder *holder* tells it to the store.

    Args:
        task: The MCP task that names the servers.
        holder: The ID that the execution goes by, among other holders.
        worker: The `hostname` of the request, for the history.
        counts: False where nothing is counted: for tasks that are executed eagerly and share their sessions.
    """

    def __init__(self, task: Any, holder: str, worker: str | None, *, counts: bool) -> None:
        self._task = task
        self._holder = holder
        self._worker = worker
        self._counts = counts

    def has_store(self) -> bool:
        """Whether there is a store."""
        return self._store() is not None

    def held(self) -> list[SessionHandle]:
        """Return the sessions that earlier attempts of the execution hold."""
        return self._ask(lambda store: store.held_by(self._holder)) or []

    def lost_at(self, handle: SessionHandle) -> float | None:
        """Return when a ping has found the session lost; None where none has."""
        found: float | None = self._ask(lambda store: store.lost_at(handle.key))
        return found

    def hold(self, handle: SessionHandle, *, is_opened_here: bool) -> None:
        """Join the holders. The session is counted from now on, unless others may hold it that nobody has counted."""
        event = self.event("opened")
        change = Change(
            joining={self._holder: self._task.name},
            create=not handle.shared,
            events=[event] if is_opened_here else [],
            opened_by={name: event[name] for name in ("task", "id", "worker")} if is_opened_here else None,
            **of_server(self._task, handle),
        )
        self.change(handle, change)

    def hold_if_alive(self, handle: SessionHandle) -> bool:
        """Join the holders unless the session has ended; return whether it is held now, as far as is known."""
        joining = Change(joining={self._holder: self._task.name}, **of_server(self._task, handle))
        if self.change(handle, joining) not in {Standing.ENDED, Standing.UNCOUNTED}:
            return True
        self.change(handle, Change(leaving=[self._holder]))
        return False

    def share(self, handle: SessionHandle, joining: Mapping[str, str]) -> Standing | None:
        """Have others hold the session as well."""
        return self.change(handle, Change(joining=joining, **of_server(self._task, handle)))

    def closed(self, handle: SessionHandle) -> None:
        """The session has ended at its server."""
        end = {**self.event("closed"), "why": "done"}
        self._ask(lambda store: store.ended(handle.key, end))

    def detached(self, handle: SessionHandle) -> None:
        """The session stays alive for whoever has its handle."""
        event = self.event("detached")
        self.change(handle, Change(leaving=[self._holder], when_empty=Leaving.DETACH, events=[event]))

    def abandoned(self, handle: SessionHandle) -> None:
        """The session is left to the reaper."""
        self.change(handle, Change(leaving=[self._holder], when_empty=Leaving.ABANDON))

    def change(self, handle: SessionHandle, change: Change) -> Standing | None:
        """Do what `Store.change` does; None where nothing is known of it."""
        standing: Standing | None = None
        if handle.session_id is not None and self._counts:
            standing = self._ask(lambda store: store.change(handle, change))
        return standing

    def warn_if_uncounted(self, handle: SessionHandle, standing: Standing | None) -> None:
        """Warn, once a process and server, of a session that several hold whom nobody counts."""
        # Where the store has not answered, that has been said.
        if standing is Standing.UNCOUNTED or (standing is None and not self.has_store()):
            _warn_of_uncounted(handle.server)

    def event(self, what: str) -> dict[str, Any]:
        """Return what the history says happened now, JSON types."""
        return {"what": what, "at": time.time(), "task": self._task.name, "id": self._holder, "worker": self._worker}

    def _store(self) -> Store | None:
        try:
            return get_store(self._task.app.conf)
        except ConfigurationError as exc:  # said before, by `MCPTask`
            logger.debug("%s", exc)
            return None

    def _ask(self, question: Callable[[Store], Any]) -> Any:
        """Return the answer; None without a store, or where it does not answer."""
        store = self._store()
        if store is None:
            return None
        try:
            answer = question(store)
        except StoreError as exc:
            logger.debug("%s", exc)
            warn_of_store(str(exc))
            return None
        warn_of_store.cache_clear()
        return answer


@cache
def _warn_of_uncounted(server: str) -> None:
    logger.warning(
        "A session of server %r goes on in several branches of a workflow, and no store counts who still holds it: "
        "it is left to the idle timeout of the server",
        server,
    )
