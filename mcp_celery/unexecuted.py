"""What becomes of the sessions of tasks that are not executed here: those on their way to a worker, and the dead.

For publishers, and for the main process of a worker: the store is told, and no server is spoken to.
"""

import logging
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

from celery.app.task import Context
from kombu.exceptions import EncodeError

from .exceptions import ConfigurationError, StoreError
from .handle import SessionHandle
from .known_tasks import brought_by, canvas_of, journal_id, of_server, warn_of_store
from .redis_store import get_store
from .store import Change, Leaving, Store, process_name
from .workflow import Carried, bind, carried

logger = logging.getLogger(__name__)

#: A message that cannot be made: wrong arguments, or a value that no serializer takes.
REFUSED = (TypeError, EncodeError)

#: Members of a group that are given the same session are published within this time of each other.
GROUP_SECONDS = 5.0


@contextmanager
def hold_given(task: Any, brought: Carried, task_id: str, *, in_group: bool) -> Iterator[Carried]:
    """Count a task that is being published among the holders of the sessions that a user has given it.

    The same handle may be on its way to other tasks. Where the message cannot be sent, nothing was counted.
    """
    conf, counted = task.app.conf, [replace(handle, shared=True) for handle in brought.given]
    store = None if conf.task_always_eager else get_store(conf)
    if not counted or store is None:
        yield brought
        return

    def change(handle: SessionHandle, change: Change) -> None:
        try:
            if handle.session_id is not None:
                store.change(handle, change)
        except StoreError as exc:
            warn_of_store(str(exc))

    joining = Change(
        joining={task_id: task.name},
        create=True,
        # The other members of a group are published one by one, and this one may have ended before.
        settling_seconds=GROUP_SECONDS if in_group else 0,
    )
    for handle in counted:
        change(handle, replace(joining, **of_server(task, handle)))
    try:
        yield Carried(handles=[*brought.handles, *counted], holder=task_id, at=time.time())
    except BaseException:
        for handle in counted:
            change(handle, Change(leaving=[task_id], may_return=True, when_empty=Leaving.DETACH))
        raise


def bind_errbacks(task: Any, request: Any) -> None:
    """Bind the sessions of a task that has died into its errbacks, before Celery calls them."""
    errbacks = canvas_of(task.app).errbacks_of(request)
    if not errbacks:
        return
    held = {handle.key: handle for handle in brought_by(request).handles}
    try:
        store = get_store(task.app.conf)
        if store is not None:
            held |= {handle.key: handle for handle in store.held_by(request.id)}
    except (ConfigurationError, StoreError) as exc:
        logger.debug("%s", exc)
    for handle in held.values():
        bind(handle, errbacks, f"{journal_id(request)}/failed")


def release_journal(task: Any, request: Any, pid: int) -> None:
    """Give the journal of a task whose process is gone to its next execution at once."""
    _tell_store(task, lambda store: store.release_journal(journal_id(request), process_name(pid)))


def never_runs(task: Any, request: Any, *, are_errbacks_called: bool = True) -> None:
    """Have a task, and what would have followed it, hold no sessions. For a worker's main process: no MCP I/O."""
    canvas = canvas_of(task.app)
    hopeless = canvas.hopeless_after(request)
    lost = {holder for _, holders in carried([*hopeless.tasks, *hopeless.untold]) for holder in holders}
    own = canvas.errbacks_of(request) if are_errbacks_called else []
    errbacks = carried([*own, *hopeless.errbacks])

    def let_go(store: Store) -> None:
        for handle, holders in errbacks:
            store.change(handle, Change(joining=holders))
        store.abandon([request.id, *lost])
        store.drop_journal(journal_id(request))

    _tell_store(task, let_go)


def never_published(task: Any, holder: str, options: Mapping[str, Any]) -> None:
    """Have a task whose message was refused, and the bodies of the chords that wait for it, hold no sessions."""
    waiting = canvas_of(task.app).hopeless_after(Context(chord=options.get("chord"), chain=options.get("chain")))
    never = [never for _, holders in carried(waiting.tasks) for never in holders]
    _tell_store(task, lambda store: store.abandon([holder, *never]))


def _tell_store(task: Any, tell: Callable[[Store], object]) -> None:
    """Tell the store something, where there is one; what is not told ends with a deadline."""
    try:
        store = get_store(task.app.conf)
        if store is not None:
            tell(store)
    except (ConfigurationError, StoreError) as exc:
        logger.debug("%s", exc)
        warn_of_store(str(exc))
