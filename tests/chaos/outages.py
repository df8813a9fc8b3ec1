"""What fails beside processes that are killed, and the errors that a workflow may end with then."""

from collections.abc import Callable
from dataclasses import dataclass

from arena import Arena
from workload import VISIBILITY_SECONDS

INTERRUPTED = frozenset({"CallInterruptedError"})
CUT_OFF = frozenset({"TransportError"})
LOST = frozenset({"SessionLostError", "TransportError"})
#: Celery makes four attempts to publish, within 0.6 s; a Valkey that starts again may load its data for longer.
#: So may reading a result, which is on it as well.
UNPUBLISHED = frozenset({"OperationalError", "ConnectionError", "ChordError"})
NONE: frozenset[str] = frozenset()

#: Until a message is given to another worker, which waits for the lease to lapse, and then some.
FROZEN_SECONDS = VISIBILITY_SECONDS + 7
#: Shorter than a lease.
HELD_UP_SECONDS = 2


@dataclass(frozen=True)
class Fault:
    """Something that happens to an arena.

    Attributes:
        commit: Does it.
        may_raise: Where the server gives tokens.
        without_tokens: Where it gives none; None for the same.
    """

    commit: Callable[[Arena], object]
    may_raise: frozenset[str] = NONE
    without_tokens: frozenset[str] | None = None

    def errors(self, *, gives_tokens: bool) -> frozenset[str]:
        return self.may_raise if gives_tokens or self.without_tokens is None else self.without_tokens


def hold_up_store(arena: Arena) -> None:
    arena.store.hold()
    try:
        arena.rest(HELD_UP_SECONDS)
    finally:
        arena.store.let_go()


def cut_off_responses(arena: Arena) -> None:
    for after_events in (1, 2, 3):
        arena.recorder.cut(rpc_method="tools/call", after_events=after_events)


def kill_child_and_restart_server(arena: Arena) -> None:
    arena.kill_child()
    arena.restart_server()


FAULTS = {
    "broker connections cut": Fault(lambda arena: arena.broker.cut()),
    "store connections cut": Fault(lambda arena: arena.store.cut()),
    "store held up": Fault(hold_up_store),
    "valkey restarted": Fault(Arena.restart_valkey, UNPUBLISHED),
    "responses cut off": Fault(cut_off_responses, NONE, CUT_OFF),
    "responses cut off before a token": Fault(
        lambda arena: arena.recorder.cut(rpc_method="tools/call", after_events=0), CUT_OFF
    ),
    # Others take it for dead; when it goes on, it is to do nothing more.
    "a child frozen": Fault(lambda arena: arena.freeze_child(FROZEN_SECONDS), INTERRUPTED),
    "a worker frozen": Fault(lambda arena: arena.freeze_worker(FROZEN_SECONDS), INTERRUPTED),
    "server frozen": Fault(lambda arena: arena.freeze_server(3)),
    "server frozen, a child killed": Fault(lambda arena: arena.freeze_server(1, then=arena.kill_child), INTERRUPTED),
    "server restarted": Fault(Arena.restart_server, LOST),
    "server restarted, a child killed": Fault(kill_child_and_restart_server, LOST | INTERRUPTED),
}
#: Those that may happen in the midst of everything.
AT_ANY_TIME = ("broker connections cut", "store connections cut", "responses cut off", "server frozen")
