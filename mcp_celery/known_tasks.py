"""Which tasks take MCP sessions, here and in other workers, and what they say of their servers and journals."""

import logging
import math
import time
from collections.abc import Mapping
from functools import cache
from typing import Any

from .exceptions import ConfigurationError, StoreError
from .handle import SessionHandle, server_name
from .redis_store import get_store
from .settings import JournalSettings, ServerSettings, journal_settings, server_settings
from .store import Store
from .workflow import Canvas, Carried, Given, read

logger = logging.getLogger(__name__)

#: For how long a process remembers which MCP tasks other workers have.
KNOWN_SECONDS = 30.0


def canvas_of(app: Any) -> Canvas:
    """Return what finds the MCP tasks of *app* in a canvas."""

    def is_mcp(name: str) -> bool:
        task = app.tasks.get(name)
        # Celery's own are in every worker.
        return is_mcp_task(task) if task is not None or name.startswith("celery.") else name in _announced(app)

    return Canvas(is_mcp)


def is_mcp_task(task: object) -> bool:
    """Whether *task* takes sessions; `MCPTask` is told by its options, since it stands above this module."""
    return hasattr(task, "mcp_servers")


#: By store: when it was asked last, and what was said.
_known: dict[Store, tuple[float, frozenset[str]]] = {}


def _announced(app: Any) -> frozenset[str]:
    """Return the names of the MCP tasks that other workers have, so far as a store knows them."""
    names: frozenset[str] = frozenset()
    try:
        store = get_store(app.conf)
        if store is None:
            return names
        asked, names = _known.get(store, (-math.inf, names))
        if time.monotonic() - asked > KNOWN_SECONDS:
            _known[store] = (time.monotonic(), names)  # also where it does not answer
            names = store.announced()
            _known[store] = (time.monotonic(), names)
    except (ConfigurationError, StoreError) as exc:
        logger.debug("%s", exc)
    return names


def brought_by(request: Any) -> Carried:
    """Return the sessions that came with the message of *request*.

    Raises:
        SessionHandleError: One of the handles cannot be read.
    """
    given = getattr(request, "mcp_session", None)
    return read(given.value) if isinstance(given, Given) else Carried()


def journal_id(request: Any) -> str:
    """Return what the journal of an execution goes by. What replaces a task has the same ID, and other calls."""
    nesting = request.get("replaced_task_nesting") or 0
    return f"{request.id}.{nesting}" if nesting else str(request.id)


def is_redelivered(request: Any) -> bool:
    """Whether the broker says that the message of *request* was delivered before."""
    return bool((request.delivery_info or {}).get("redelivered"))


def settings_of_journal(task: Any) -> JournalSettings | None:
    """Return how *task* keeps its journal; None where it is not durable.

    Raises:
        ConfigurationError: An option is wrong.
    """
    options = (getattr(task, name, None) for name in ("mcp_durable", "mcp_on_interrupted"))
    return journal_settings(task.app.conf, *options)


def settings_of(task: Any, handle: SessionHandle) -> ServerSettings:
    """Return the settings of the server of *handle*, as *task* writes it: a URL may have credentials there."""
    names = task.server_names() if is_mcp_task(task) else ()
    written = next((name for name in names if server_name(name) == handle.server), handle.server)
    return server_settings(task.app.conf, written)


def of_server(task: Any, handle: SessionHandle) -> dict[str, Any]:
    """Return what a `Change` says of the server of *handle*."""
    try:
        settings = settings_of(task, handle)
    except ConfigurationError:  # of a server that another worker knows
        return {}
    return {"keepalive_seconds": settings.keepalive_seconds, "place": settings.place}


def servers_of(app: Any) -> dict[str, ServerSettings | ConfigurationError]:
    """Return all servers that *app* names, by what handles call them; for a wrong one what is wrong.

    Those of `mcp_servers`, and those that tasks name by URL.

    Raises:
        ConfigurationError: `mcp_servers` is no mapping.
    """
    configured = app.conf.get("mcp_servers") or {}
    if not isinstance(configured, Mapping):
        server_settings(app.conf, "")  # raises
    tasks = [task for task in list(app.tasks.values()) if is_mcp_task(task)]
    known: dict[str, ServerSettings | ConfigurationError] = {}
    for server in [*configured, *(name for task in tasks for name in task.server_names())]:
        try:
            known.setdefault(server_name(server), server_settings(app.conf, server))
        except ConfigurationError as exc:
            known.setdefault(server_name(server), exc)
    return known


def usable_servers_of(app: Any) -> dict[str, ServerSettings]:
    """Return the servers that *app* names and that are configured right.

    Raises:
        ConfigurationError: As above.
    """
    return {name: settings for name, settings in servers_of(app).items() if isinstance(settings, ServerSettings)}


@cache
def warn_of_store(problem: str) -> None:
    """Once a process and problem, until the store has answered again."""
    logger.warning(
        "%s: tasks go on; sessions that cannot be counted are left to the reaper or to their servers", problem
    )
