"""One run of a durable task: what earlier runs have left to it, and whether another one has taken over."""

import logging
import time
from typing import TYPE_CHECKING, Any

from billiard.exceptions import SoftTimeLimitExceeded
from celery.exceptions import Ignore, Reject

from .exceptions import HAS_TAKEN_OVER, ConfigurationError, SupersededError
from .known_tasks import is_redelivered, journal_id
from .redis_store import get_store
from .settings import JournalSettings
from .sync_session import new_journal

if TYPE_CHECKING:
    from .journal import Journal

logger = logging.getLogger(__name__)

#: How long Celery can hold a claim on a chord: two attempts to read results, or all attempts to publish.
CLAIM_SECONDS = 60.0
CLAIM_POLL_SECONDS = 0.5


class DurableRun:
    """What a durable task does with its journal while it runs, and when it ends.

    Args:
        task: The MCP task.
        request: What is executed; of a mapped task, Celery's own task that maps.
        settings: How the journal is kept.

    Raises:
        ConfigurationError: There is no store.
    """

    def __init__(self, task: Any, request: Any, settings: JournalSettings) -> None:
        store = get_store(task.app.conf)
        if store is None:
            raise ConfigurationError(f"Task {task.name} is durable, which takes a Redis or Valkey: set mcp_store_url")
        self._task = task
        self._request = request
        self._journal = new_journal(store, journal_id(request), request.retries, settings)

    @property
    def journal(self) -> "Journal":
        """Where its calls are recorded."""
        return self._journal.journal

    def begin(self) -> None:
        """Take the journal over from earlier runs, once none of them is alive.

        Raises:
            StoreError: The store does not answer.
            SupersededError: The task has ended before.
        """
        self._journal.begin()
        if self.journal.is_done:
            raise SupersededError("The task has ended before, and a copy of its message came again")

    def has_lost_lease(self) -> bool:
        """Return whether another run has taken over; see `Journal.has_lost_lease`."""
        return self._journal.has_lost_lease()

    def superseded_by(self, exc: BaseException | None, *, has_begun: bool) -> Ignore | Reject | None:
        """Return what the task raises instead of *exc* where all is left to another run; None where it goes on.

        To one that has taken over, or that has ended the task before. Asks the store, so for ends other than a return.
        """
        if isinstance(exc, Ignore) or not isinstance(exc, Exception | None):
            return None
        if not has_begun and isinstance(exc, SoftTimeLimitExceeded) and self._task.acks_late:
            why = "Its time has run out while it waited for another run"
        elif self.journal.is_done or isinstance(exc, SupersededError):
            why = str(exc)
        elif has_begun and self.has_lost_lease():
            why = HAS_TAKEN_OVER
        else:
            return None
        logger.warning("Task %s[%s] goes no further here: %s", self._task.name, self._request.id, why)
        # A message that is acknowledged here may be gone for the other run as well: Redis brokers know both by one tag.
        return Ignore(why) if self.journal.is_done else Reject(why, requeue=True)

    def wait_for_claim(self) -> None:
        """Wait until nobody claims the chord that this member of its header is about to tell of its end, again.

        Returns at once in a first run. In Celery's Redis backend, the last member to end claims the chord, so as to
        publish its body. Where its process is killed meanwhile, the claim lapses after some seconds; a member that told
        the chord before would see it and leave the body to the dead process.
        """
        if is_redelivered(self._request) or self.journal.is_continued:
            _wait_for_claim(self._task, self._request)

    def end(self, state: str | None, *, is_requeued: bool, is_retried: bool) -> None:
        """Give the journal back, once the result is stored."""
        has_ended = state in {"SUCCESS", "FAILURE", "IGNORED"} or (state == "REJECTED" and not is_requeued)
        self._journal.end(is_done=has_ended and not is_retried, is_retried=is_retried)


def _wait_for_claim(task: Any, request: Any) -> None:
    from celery.backends.redis import RedisBackend  # noqa: PLC0415 - only where there is one
    from redis import RedisError  # noqa: PLC0415 - as above

    if not request.chord or not request.group or not isinstance(task.backend, RedisBackend):
        return
    claim, deadline = task.backend.get_key_for_group(request.group, ".c"), time.monotonic() + CLAIM_SECONDS
    try:
        while task.backend.client.get(claim) not in {None, b"done"} and time.monotonic() < deadline:
            time.sleep(CLAIM_POLL_SECONDS)
    except RedisError as exc:
        logger.debug("It is not known whether a chord is claimed (%s)", type(exc).__name__)
