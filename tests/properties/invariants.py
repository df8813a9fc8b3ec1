"""What has to hold of every run of a canvas, however it went."""

import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from canvases import Canvas, Flow

#: A line of the journal: see `QuickServer` and `Run`.
Event = Mapping[str, Any]

_IDS = re.compile(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}")


class ViolationError(AssertionError):
    """Raised when an invariant does not hold."""


def check_ends(journal: Sequence[Event]) -> None:
    """Each session has one DELETE; nothing is asked of it after that, and no task that has it runs."""
    ended: dict[str, int] = {}
    opened = [event["session"] for event in journal if event["what"] == "opened"]
    for number, event in enumerate(journal):
        match event["what"]:
            case "deleted":
                ended[event["session"]] = number
            case "refused":
                raise ViolationError(f"{event['session']} was used after its end, or ended twice")
            case "starts" | "ends":
                for session in set(event["sessions"].values()) & ended.keys():
                    raise ViolationError(f"{event['label']} has {session}, which has ended before it {event['what']}")
    for session in set(opened) - ended.keys():
        raise ViolationError(f"{session} was not ended")


def check_flow(canvas: Canvas, journal: Sequence[Event]) -> None:
    """Each step begins with the sessions of the nearest steps before it that have some, and with no others."""
    flow = Flow()
    flow.through(canvas)
    runs = _Runs(flow, journal)
    for number, event in enumerate(journal):
        if event["what"] == "starts" and event["label"][0] == "m":
            least, most = runs.wanted(number, event)
            if not set(least.items()) <= event["sessions"].items() <= most:
                raise ViolationError(f"{event['label']} began with {event['sessions']}, not with {sorted(most)}")


class _Runs:
    """What the runs of steps had at their ends."""

    def __init__(self, flow: Flow, journal: Sequence[Event]) -> None:
        self._flow = flow
        self._journal = journal
        #: Label to the ends of its runs.
        self._ends: dict[str, list[Event]] = defaultdict(list)
        #: Task ID to its last start, and to all its parents: retries and replacements have the ID of what was before.
        self._last: dict[str, Event] = {}
        self._parents: dict[str, set[str | None]] = defaultdict(set)
        for event in journal:
            if event["what"] == "ends":
                self._ends[event["label"]].append(event)
            if event["what"] == "starts" and event["id"] is not None:
                self._last[event["id"]] = event
                self._parents[event["id"]].add(event["parent"])

    def wanted(self, number: int, event: Event) -> tuple[dict[str, str], set[tuple[str, str]]]:
        """Return the least and the most that the run that begins with *event*, the *number*th, may have been given."""
        if event["redelivered"] or event["attempt"]:
            wanted = self._before_again(number, event)
        elif event["label"] in self._flow.errbacks:
            return self._wanted_by_errback(event)
        else:
            wanted = self._merged(self._flow.before[event["label"]], event)
        return wanted, set(wanted.items())

    def _before_again(self, number: int, event: Event) -> dict[str, str]:
        """A retry has what the attempt before had at its end; what is redelivered has what it had at its start."""
        earlier = [other for other in self._journal[:number] if other.get("id") == event["id"]]
        ends = [other for other in earlier if other["what"] == "ends"]
        if ends and ends[-1]["how"] == "retries":
            return dict(ends[-1]["sessions"])
        return dict(next(other for other in reversed(earlier) if other["what"] == "starts")["sessions"])

    def _merged(self, state: Iterable[str], event: Event) -> dict[str, str]:
        merged: dict[str, str] = {}
        for label in state:
            merged = {**self._out(label, event), **merged}
        return merged

    def _out(self, label: str, event: Event) -> dict[str, str]:
        """What the step of this label has passed on to the run of *event*."""
        ends = self._ends[label]
        if len({end["id"] for end in ends}) > 1:
            # An errback may run for several tasks, with all that comes of it.
            line = {event["id"], *self._ancestors(event)}
            ends = [end for end in ends if end["id"] in line]
        if not ends:
            return {}
        return dict(ends[-1]["sessions"]) if self._flow.is_mcp[label] else self._wanted_by_errback(ends[-1])[0]

    def _ancestors(self, event: Event) -> set[str]:
        ancestors: set[str] = set()
        parents = {event["parent"]}
        while parents := parents - ancestors - {None}:
            ancestors |= parents
            parents = set().union(*(self._parents[parent] for parent in parents))
        return ancestors

    def _wanted_by_errback(self, event: Event) -> tuple[dict[str, str], set[tuple[str, str]]]:
        """What the failed task had. Where that never ran, what it would have got."""
        flow, label = self._flow, event["label"]
        parent = self._last.get(event["parent"])
        # The body of a chord has the ID of the task that the chord replaces, and its errbacks.
        if parent is None or parent["label"] in self._replaced(label) or self._is_replaced(parent["label"]):
            return self._wanted_instead(event)
        failed = parent["label"]
        least = self._out(failed, event) if flow.is_mcp[failed] else self._merged(flow.before[failed], event)
        most = set(least.items())
        # What was bound past a plain task stays with its errbacks when it is replaced.
        for host in self._replaced(failed) - self._replaced(label):
            if not flow.is_mcp[host]:
                least, most = {}, most | self._merged(flow.before[host], event).items()
        if not flow.is_mcp[failed] or self._ends[failed][-1]["how"] == "rejects":
            # Nobody counts the errbacks of a plain task before it has failed; and those of a task that has rejected
            # its message are called by the main process, when all of it is over.
            least = {}
        return least, most

    def _wanted_instead(self, event: Event) -> tuple[dict[str, str], set[tuple[str, str]]]:
        """What the task would have got that never ran: what the errback was linked to, or a part of a replacement."""
        flow, label = self._flow, event["label"]
        wanted = self._merged(flow.errbacks[label], event)
        parts = [part for part in flow.before if self._replaced(part) & flow.linked[label]]
        instead = [self._merged(flow.before[part], event).items() for part in parts]
        return wanted if label in flow.counted and not parts else {}, set(wanted.items()).union(*instead)

    def _is_replaced(self, label: str) -> bool:
        return bool(self._ends[label]) and self._ends[label][-1]["how"] == "is replaced"

    def _replaced(self, label: str) -> set[str]:
        """The steps in whose replacement this step is."""
        hosts = set()
        while (label := self._flow.replaces.get(label, "")) and label not in hosts:
            hosts.add(label)
        return hosts


def check_same(plain: tuple[Sequence[Event], Any], journal: Sequence[Event], result: Any) -> None:
    """What ran, with what and to which end, is the same as of plain tasks (in any order), and so is the result."""
    more, less = executions(journal), executions(plain[0])
    if more != less:
        raise ViolationError(f"also ran {dict(more - less)}, did not run {dict(less - more)}")
    if not _is_same(plain[1], result):
        raise ViolationError(f"the result is {result}, of plain tasks it is {plain[1]}")


def _is_same(plain: Any, result: Any) -> bool:
    if isinstance(plain, list) and isinstance(result, list):
        return len(plain) == len(result) and all(map(_is_same, plain, result))
    # Celery publishes a retry before it says so in the result: the next attempt may have ended by then.
    return plain == result or result[0] == "RETRY"


def executions(journal: Iterable[Event]) -> Counter[tuple[Any, ...]]:
    """What ran, with what and with which end, in no order."""
    names = ("label", "attempt", "redelivered", "inputs", "how")
    return Counter(tuple(event[name] for name in names) for event in journal if event["what"] == "ends")


def outcome(result: Any) -> Any:
    """What is stored as the result of a canvas, without what is different each time."""
    if (children := getattr(result, "results", None)) is not None:
        return [outcome(child) for child in children]
    value = result.result
    return result.state, _IDS.sub("<id>", repr(value) if isinstance(value, BaseException) else str(value))
