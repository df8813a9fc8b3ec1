"""Whether a soak was flat: what its samples say, and by which criteria."""

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

from samples import Measured, ProcessSample

#: Before this share of the load's time, caches fill and pools grow.
WARM_UP = 1 / 3
#: A process that was there for so much of the time after it is long-lived, and judged by itself.
LONG_LIVED = 0.9
#: A line through its memory after the warm-up may rise by so much a minute. Above nothing, since the highest point of a
#: process is reached in steps: a worker that was killed comes back, and all that has waited for it runs at once.
RISE_MB_A_MINUTE = 0.5
#: The median of the last third may be above that of the second one by so much, or by such a share of it. Not the
#: maximum: how many threads and sockets are in use at once goes by the load, which has its moments.
SLACK, SLACK_SHARE = 2, 0.15
#: A run that is shorter is all warm-up: its growth is measured, and not judged.
SHORTEST_SECONDS = 300.0


@dataclass(frozen=True)
class Finding:
    """What was found of one thing of one process, or of everything together."""

    what: str
    measure: str
    figure: str
    is_flat: bool

    def __str__(self) -> str:
        return f"{'flat    ' if self.is_flat else 'NOT FLAT'}  {self.what:<24} {self.measure:<16} {self.figure}"


def judge(measured: Measured, expected: Sequence[str] = ()) -> list[Finding]:
    """Judge the memory, the threads, the sockets and the descriptors of long-lived processes, and what is in stores.

    Those whose names are *expected* have to be long-lived. Nothing of a run that is too short is judged.
    """
    if measured.load_seconds < SHORTEST_SECONDS:
        return []
    findings = []
    lines = defaultdict(list)
    for sample in measured.processes:
        if sample.seconds <= measured.load_seconds:
            lines[sample.line].append(sample)
    for samples in lines.values():
        if _is_long_lived(samples, measured.load_seconds):
            findings += _judge_process(samples, measured.load_seconds)
    judged = {finding.what for finding in findings}
    findings += [
        Finding(name, "life", "was not there all the time", is_flat=False)
        for name in expected
        if not any(what.startswith(f"{name} (") for what in judged)
    ]
    totals = [sample for sample in measured.totals if sample.seconds <= measured.load_seconds]
    measures: dict[str, Callable[[Any], int]] = {
        "open sessions": lambda total: total.sessions,
        "keys": lambda total: total.keys,
    }
    for measure, of in measures.items():
        findings.append(_judge_count("all together", measure, totals, of, measured.load_seconds))
    return findings


def _is_long_lived(samples: Sequence[ProcessSample], load_seconds: float) -> bool:
    judged = load_seconds * (1 - WARM_UP)
    begin = max(samples[0].seconds, load_seconds * WARM_UP)
    return samples[-1].seconds - begin >= judged * LONG_LIVED


def _judge_process(samples: Sequence[ProcessSample], load_seconds: float) -> list[Finding]:
    name = samples[0].name
    measures: dict[str, Callable[[Any], int]] = {
        "threads": lambda sample: sample.threads,
        "sockets": lambda sample: sample.sockets,
        "descriptors": lambda sample: sample.descriptors,
    }
    return [
        _judge_memory(name, samples, load_seconds),
        *(_judge_count(name, measure, samples, of, load_seconds) for measure, of in measures.items()),
    ]


def _judge_memory(name: str, samples: Sequence[ProcessSample], load_seconds: float) -> Finding:
    points = [(sample.seconds / 60, sample.rss_mb) for sample in samples if sample.seconds >= load_seconds * WARM_UP]
    rise = slope(points)
    last = samples[-1].rss_mb
    is_flat = rise <= RISE_MB_A_MINUTE
    return Finding(name, "memory", f"{rise:+.3f} MB a minute, {last:.0f} MB at the end", is_flat)


def _judge_count(
    name: str, measure: str, samples: Sequence[Any], of: Callable[[Any], int], load_seconds: float
) -> Finding:
    second, last = (
        median(of(sample) for sample in samples if begin <= sample.seconds / load_seconds < end)
        for begin, end in ((1 / 3, 2 / 3), (2 / 3, 1))
    )
    is_flat = last <= second + max(SLACK, SLACK_SHARE * second)
    return Finding(name, measure, f"{second:g} in the second third, {last:g} in the last (medians)", is_flat)


def slope(points: Sequence[tuple[float, float]]) -> float:
    """Return how steep the line is that fits the points best, by least squares."""
    count = len(points)
    mean_x, mean_y = sum(x for x, _ in points) / count, sum(y for _, y in points) / count
    spread = sum((x - mean_x) ** 2 for x, _ in points)
    return sum((x - mean_x) * (y - mean_y) for x, y in points) / spread if spread else 0.0
