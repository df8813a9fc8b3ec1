"""What is done to workflows in an arena, and the figures of it."""

import time
from collections import Counter
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass, field

from arena import Arena, Running
from outages import FAULTS, INTERRUPTED
from points import AT_A_MEMBER, AT_THE_FIRST_STEP, AT_THE_LAST_STEP, IN_FLIGHT, IN_MAIN, POINTS
from workload import Workflow

#: How often a point is tried.
ATTEMPTS = 3


@dataclass
class Figures:
    """What came of a campaign. `problems` is what must not be."""

    server: str
    kills: int = 0
    workers_killed: int = 0
    faults: int = 0
    workflows: int = 0
    right: int = 0
    errors: Counter[str] = field(default_factory=Counter)
    twice: int = 0
    sessions: int = 0
    sessions_left: int = 0
    #: Sessions of which no worker came to know: left to the idle timeout of the server.
    unknown: int = 0
    put_back: int = 0
    seconds: float = 0.0
    problems: list[str] = field(default_factory=list)


class Campaign:
    """Things that happen in an arena, one after the other, and the figures at the end."""

    def __init__(
        self,
        arena: Arena,
        *,
        at_once: int = 6,
        seconds: float | None = None,
        say: Callable[[str], object] = lambda _: None,
    ) -> None:
        self._arena = arena
        #: What a call takes at a point; anything where it is None.
        self._seconds = seconds
        self._at_once = at_once
        self._say = say
        self._begun = time.monotonic()
        self._problems: list[str] = []
        self._faults = 0
        self._gives_tokens = arena.server != "python, no events"

    # -- Points

    def kill_at(self, points: Iterable[str], victim: str = "child") -> None:
        """Run a workflow for each point, and have it kill the process, or the worker, that comes by there."""
        missed = self._kill_at(list(points), victim, self._at_once)
        for _ in range(ATTEMPTS - 1):
            # Who kills a worker may have ended a workflow that was on its way to another point.
            missed = self._kill_at(missed, victim, at_once=1)
        self._problems += [f"the point was not reached by a {victim}: {point}" for point in missed]
        self._say(f"killed a {victim} at each point")

    def _kill_at(self, points: list[str], victim: str, at_once: int) -> list[str]:
        """Return the points that were not reached."""
        arena, armed = self._arena, {}
        for point in points:
            arena.wait(lambda: len(arena.under_way()) < at_once, 300, "a workflow to end")
            flow = arena.author.write("chord" if point in AT_A_MEMBER else "chain", seconds=self._seconds)
            steps = self._steps_at(point, flow)
            armed[point] = [f"{point}@{step}" for step in steps]
            for step in steps:
                arena.arm(point, step, "worker" if point in IN_MAIN else victim)
            arena.launch(flow, f"{point}: a {victim} killed", may_raise=self._may_raise(point, victim))
        arena.finish()
        reached = self._arena.reached()
        return [point for point, places in armed.items() if not any(place in reached for place in places)]

    def _steps_at(self, point: str, flow: Workflow) -> list[str]:
        if point in AT_THE_FIRST_STEP:
            return flow.steps[:1]
        if point in AT_THE_LAST_STEP:
            return flow.steps[-1:]
        # Of a header, the last member to end.
        return flow.steps[:-1] if point in AT_A_MEMBER else flow.steps[1:2]

    def _may_raise(self, point: str, victim: str) -> Collection[str]:
        # Who kills a worker interrupts what else it does.
        is_in_flight = POINTS[point] == "interrupted" or (not self._gives_tokens and point in IN_FLIGHT)
        return INTERRUPTED if is_in_flight or victim == "worker" or point in IN_MAIN else ()

    # -- At random

    def kill_at_random(
        self, kills: int, *, every_seconds: float = 1.0, workers: float = 0.15, faults: Iterable[str] = ()
    ) -> None:
        """Run workflows of any shape, and kill *kills* processes meanwhile, a share of *workers* of them whole workers.

        With *faults*, these happen as well, one after every fifth kill.
        """
        arena, random, faults, done = self._arena, self._arena.random, list(faults), 0
        because = "kills and faults at random" if faults else "kills at random"
        may_raise = INTERRUPTED.union(*(FAULTS[fault].errors(gives_tokens=False) for fault in faults))
        next_kill = time.monotonic()
        while done < kills:
            if len(arena.under_way()) < self._at_once:
                arena.launch(arena.author.write(), because, may_raise=may_raise)
            arena.rest(0.05)
            if time.monotonic() >= next_kill:
                done += arena.kill_worker() if random.random() < workers else arena.kill_child()
                next_kill = time.monotonic() + random.uniform(0, 2 * every_seconds)
                if faults and done % 5 == 0:
                    self._commit(random.choice(faults))
        arena.finish()
        self._say(f"{because}: {kills} kills")

    # -- Faults

    def fail(self, faults: Iterable[str]) -> None:
        """Run some workflows for each fault, in the middle of which it happens."""
        for fault in faults:
            may_raise = FAULTS[fault].errors(gives_tokens=self._gives_tokens)
            for _ in range(self._at_once):
                self._arena.launch(self._arena.author.write(), fault, may_raise=may_raise)
            self._arena.rest(self._arena.random.uniform(0.3, 1.5))
            self._commit(fault)
            self._arena.finish()
            self._say(fault)

    def _commit(self, fault: str) -> None:
        FAULTS[fault].commit(self._arena)
        self._faults += 1

    # -- The end

    def close(self) -> Figures:
        """Wait for the end of all sessions, and return the figures."""
        arena = self._arena
        arena.finish()
        left, unknown = arena.sessions_left(), arena.unknown_sessions() | arena.unknown_and_gone
        killed = [*arena.reached().values()]
        figures = Figures(
            arena.server,
            kills=sum(arena.kills.values()) + len(killed),
            workers_killed=arena.kills["worker"] + killed.count("worker"),
            faults=self._faults,
            workflows=len(arena.flows),
            right=sum(running.outcome.is_right for running in arena.flows),
            errors=Counter(error for running in arena.flows for error in set(running.outcome.errors)),
            twice=len(arena.twice()),
            sessions=len(arena.opened()),
            sessions_left=len(left),
            unknown=len(unknown),
            put_back=arena.mail.put_back,
            seconds=time.monotonic() - self._begun,
            problems=self._problems,
        )
        figures.problems += [f"executed twice: {call}" for call in arena.twice()]
        figures.problems += [f"never executed: {call}" for call in arena.never()]
        figures.problems += [f"session left: {key}" for key in left]
        figures.problems += [problem for running in arena.flows for problem in self._problems_of(running)]
        return figures

    def _problems_of(self, running: Running) -> Iterable[str]:
        what, outcome = f"{running.flow.name} ({running.because})", running.outcome
        if not outcome.is_over:
            yield f"{what} hangs"
        for wrong in outcome.wrong:
            yield f"{what} has a wrong result: {wrong}"
        for error in set(outcome.errors) - running.may_raise:
            yield f"{what} has raised {error}"


COLUMNS: dict[str, Callable[[Figures], object]] = {
    "server": lambda f: f.server,
    "kills": lambda f: f.kills,
    "of whole workers": lambda f: f.workers_killed,
    "other faults": lambda f: f.faults,
    "workflows": lambda f: f.workflows,
    "right": lambda f: f.right,
    "named errors": lambda f: ", ".join(f"{count} {name}" for name, count in f.errors.items()) or "none",
    "executed twice": lambda f: f.twice,
    "sessions": lambda f: f.sessions,
    "left open": lambda f: f.sessions_left,
    "never known": lambda f: f.unknown,
    "put back": lambda f: f.put_back,
    "seconds": lambda f: round(f.seconds),
}


def table(all_figures: list[Figures]) -> str:
    """Return the figures for people, a column for each server."""
    rows = [[name, *(str(column(figures)) for figures in all_figures)] for name, column in COLUMNS.items()]
    widths = [max(map(len, cells)) for cells in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
    )
