"""What is held against what: the server's log of executions, the results of workflows, and the sessions left."""

import json
import re
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from celery.result import AsyncResult, GroupResult
from workload import Workflow, marker_of

#: Errors that say what has happened, by name.
_NAME = re.compile(r"\b(\w+(?:Error|LostError|Exception))\(")


def executions(path: Path) -> tuple[Counter[str], Counter[str]]:
    """How often each marker was started, and ended."""
    started: Counter[str] = Counter()
    ended: Counter[str] = Counter()
    for line in path.read_text().splitlines() if path.exists() else ():
        entry = json.loads(line)
        (started if entry["what"] == "start" else ended)[entry["marker"]] += 1
    return started, ended


@dataclass
class Outcome:
    """How a workflow ended. At most one of the three is not as it was made; none where it is right."""

    #: Class names of its errors.
    errors: list[str] = field(default_factory=list)
    #: What is wrong with its results, for people.
    wrong: list[str] = field(default_factory=list)
    is_over: bool = True

    @property
    def is_right(self) -> bool:
        return self.is_over and not self.errors and not self.wrong


def outcome_of(flow: Workflow, result: Any) -> Outcome:
    """Return how a workflow stands."""
    leaves = result.results if isinstance(result, GroupResult) else [result]
    outcome = Outcome()
    for leaf, (said, seen) in zip(leaves, flow.right, strict=True):
        failed = _failure(leaf)
        if failed is not None:
            outcome.errors.append(name_of(failed))
        elif leaf.state != "SUCCESS":
            outcome.is_over = False
        else:
            value = leaf.result
            if sorted(value["said"]) != sorted(said):
                outcome.wrong.append(f"said {value['said']}, not {said}")
            if sorted(value["seen"]) != sorted(seen):
                outcome.wrong.append(f"its session saw {value['seen']}, not {seen}")
    return outcome


def _failure(result: AsyncResult | GroupResult | None) -> BaseException | None:
    """Return the error of a result, or of what had to come before it."""
    while result is not None:
        for part in result.results if isinstance(result, GroupResult) else [result]:
            if part.state == "FAILURE":
                return part.result
        result = result.parent
    return None


def name_of(exc: BaseException) -> str:
    """Return the class name of an error, of a failed chord the name of the error within."""
    if type(exc).__name__ == "ChordError" and (found := _NAME.search(str(exc))):
        return found[1]
    return type(exc).__name__


def repeated(flows: list[Workflow], kind: str, started: Counter[str]) -> list[str]:
    """Return the calls that were executed more than once."""
    markers = {marker_of(kind, number): flow.name for flow in flows for number in flow.numbers}
    return [f"{name}: {marker} {started[marker]} times" for marker, name in markers.items() if started[marker] > 1]


def missed(flows: list[Workflow], kind: str, ended: Counter[str]) -> list[str]:
    """Return the calls of these workflows that were not executed to their end."""
    markers = {marker_of(kind, number): flow.name for flow in flows for number in flow.numbers}
    return [f"{name}: {marker}" for marker, name in markers.items() if not ended[marker]]
