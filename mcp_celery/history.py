"""What happened in a session, out of its history in the store, as values and as lines of text.

A reader of a history takes what it finds: a worker of another version may have written it.
"""

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, NamedTuple

_UNITS = (("d", 86400), ("h", 3600), ("m", 60), ("s", 1))


class Call(NamedTuple):
    """What a step asked the server."""

    what: str
    at: float
    seconds: float
    ok: bool

    @property
    def text(self) -> str:
        """Such as "tool 'add'" or "tool 'add': failed"."""
        return self.what if self.ok else f"{self.what}: failed"


class Step(NamedTuple):
    """One execution of a task that held the session."""

    task: str
    id: str
    worker: str
    at: float
    until: float
    outcome: str
    #: Names of the tasks that the session was handed to.
    to: Sequence[str]
    calls: Sequence[Call]

    @property
    def text(self) -> str:
        """Such as "load: done, handed to 2 fit, report"."""
        counts = Counter(self.to).items()
        to = ", ".join(task if count == 1 else f"{count} {task}" for task, count in counts)
        return f"{self.task}: {self.outcome}{to and f', handed to {to}'}"


class Mark(NamedTuple):
    """What happened at one moment: opened, closed, lost, detached, or what this version does not know."""

    what: str
    at: float
    #: The task in which it happened, its ID and its worker; empty where there was none.
    task: str = ""
    id: str = ""
    worker: str = ""
    by: str = ""
    why: str = ""

    @property
    def text(self) -> str:
        """Such as "opened by load" or "closed by reaper: expired"."""
        doer = self.by or self.task
        return f"{self.what}{doer and f' by {doer}'}{self.why and f': {self.why}'}"


class Row(NamedTuple):
    """One line of a history."""

    #: Seconds since the beginning of the history.
    at: float
    #: None for a mark, which takes no time.
    seconds: float | None
    worker: str
    text: str
    #: Whether it happened in the step above it.
    is_inner: bool
    is_bad: bool


@dataclass(frozen=True)
class History:
    """What is kept of what happened in one session, by the time of its beginning."""

    steps: Sequence[Step]
    marks: Sequence[Mark]

    @classmethod
    def read(cls, events: Iterable[Mapping[str, Any]]) -> "History":
        """Take the events of a store. One without a time has that of the event before it."""
        events = list(events)
        times = (_seconds(event.get("at"), math.nan) for event in events)
        at = next((time for time in times if not math.isnan(time)), 0.0)
        steps, marks = [], []
        for event in events:
            at = _seconds(event.get("at"), at)
            if event.get("what") == "step":
                steps.append(_step(event, at))
            else:
                marks.append(_mark(event, at))
        return cls(sorted(steps, key=lambda step: step.at), sorted(marks, key=lambda mark: mark.at))

    @property
    def spans(self) -> list[tuple[float, float]]:
        """When something was happening."""
        calls = [(call.at, call.at + call.seconds) for step in self.steps for call in step.calls]
        moments = [(mark.at, mark.at) for mark in self.marks]
        return sorted([*((step.at, step.until) for step in self.steps), *calls, *moments])

    @property
    def begins_at(self) -> float:
        """The first moment that is known of, in seconds since the epoch."""
        return min((start for start, _ in self.spans), default=0.0)

    def rows(self) -> list[Row]:
        """Return the history line by line, what a step did after the step."""
        origin = self.begins_at
        free = list(self.marks)
        blocks = []
        for step in self.steps:
            opened = [mark for mark in free if _has_opened(step, mark)]
            free = [mark for mark in free if mark not in opened]
            inner = [Row(mark.at - origin, None, "", mark.what, is_inner=True, is_bad=False) for mark in opened]
            inner += [Row(call.at - origin, call.seconds, "", call.text, True, not call.ok) for call in step.calls]
            is_bad = step.outcome == "failed"
            row = Row(step.at - origin, step.until - step.at, step.worker, step.text, is_inner=False, is_bad=is_bad)
            blocks.append([row, *sorted(inner, key=lambda row: row.at)])
        for mark in free:
            row = Row(mark.at - origin, None, mark.worker, mark.text, is_inner=False, is_bad=mark.what == "lost")
            blocks.append([row])
        return [row for block in sorted(blocks, key=lambda block: block[0].at) for row in block]


def duration(seconds: float) -> str:
    """Return a length of time for people, such as "12ms", "1.2s", "3m 12s" or "2d 5h"."""
    # Differences of times since the epoch are good to a microsecond: less is no reason to say 19ms for 20.
    milliseconds = round(max(seconds, 0) * 1000)
    whole = milliseconds // 1000
    for (unit, size), (lesser, lesser_size) in pairwise(_UNITS):
        if whole >= size:
            return f"{whole // size}{unit} {whole % size // lesser_size}{lesser}"
    if whole:
        return f"{milliseconds // 100 / 10:g}s"
    return f"{milliseconds}ms" if seconds > 0 else "0s"


def _has_opened(step: Step, mark: Mark) -> bool:
    """Whether *mark* is the opening of the session in *step*. A retry has the ID of the attempt before it."""
    return mark.what == "opened" and mark.id == step.id != "" and step.at <= mark.at <= step.until


def _step(event: Mapping[str, Any], at: float) -> Step:
    to, calls = event.get("to"), event.get("calls")
    return Step(
        task=_text(event.get("task")) or "?",
        id=_text(event.get("id")),
        worker=_text(event.get("worker")),
        at=at,
        until=max(at, _seconds(event.get("until"), at)),
        outcome=_text(event.get("outcome")) or "ended",
        to=[_text(task) for task in to] if isinstance(to, list) else [],
        calls=[_call(call, at) for call in calls if isinstance(call, Mapping)] if isinstance(calls, list) else [],
    )


def _call(call: Mapping[str, Any], at: float) -> Call:
    seconds = max(0.0, _seconds(call.get("seconds"), 0))
    return Call(_text(call.get("what")) or "?", _seconds(call.get("at"), at), seconds, call.get("ok") is not False)


def _mark(event: Mapping[str, Any], at: float) -> Mark:
    named = {name: _text(event.get(name)) for name in ("task", "id", "worker", "by", "why")}
    return Mark(_text(event.get("what")) or "?", at, **named)


def _text(value: object) -> str:
    return "" if value is None else str(value)


def _seconds(value: object, default: float) -> float:
    if not isinstance(value, int | float) or isinstance(value, bool) or not math.isfinite(value):
        return default
    return float(value)
