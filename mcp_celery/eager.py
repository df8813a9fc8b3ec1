"""What eager tasks share, which know nothing of each other: within a block, one session a server."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache
from typing import Any, NamedTuple

from .exceptions import MCPCeleryError
from .handle import SessionHandle
from .known_tasks import settings_of
from .sync_session import new_session

logger = logging.getLogger(__name__)


class Shared(NamedTuple):
    """What eager tasks of an app share."""

    app: Any
    #: By server: a task that has used the session, and its handle.
    sessions: dict[str, tuple[Any, SessionHandle]]


shared_now: ContextVar[Shared | None] = ContextVar("mcp_celery_shared_now", default=None)


@contextmanager
def shared_by_eager(app: Any) -> Iterator[None]:
    """Have eager tasks, and tasks called as functions, share one session a server; end them at the end."""
    shared = Shared(app, {})
    token = shared_now.set(shared)
    try:
        yield
    finally:
        shared_now.reset(token)
        for task, handle in shared.sessions.values():
            session = new_session(settings_of(task, handle), handle)
            try:
                session.end()
            except MCPCeleryError as exc:
                logger.warning("A session is left to the idle timeout of its server: %s", exc)
            finally:
                session.release()


@cache
def warn_of_eager() -> None:
    """Say that eager tasks share nothing, once a process."""
    logger.warning(
        "An eager task opens and closes an MCP session of its own, also in a chain; within "
        "mcp_celery.testing.eager_sessions(app) eager tasks share one"
    )
