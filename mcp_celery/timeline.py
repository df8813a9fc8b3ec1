"""The history of one session as a picture: one HTML page that needs nothing else, no script and no network."""

import math
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Mapping, Sequence
from html import escape
from itertools import pairwise
from typing import Any, NamedTuple

from .history import Call, History, Mark, Row, Step, duration
from .store import SessionRecord

#: The width of a quiet time that is drawn short, as a share of all busy time; of all of them, no more than the second.
GAP_WIDTH, ALL_GAPS_WIDTH = 0.08, 0.5
#: Labels of the time axis, and those of marks, stand so far apart at least, as shares of the width.
TICK_ROOM, MARK_ROOM = 0.11, 0.2
#: Labels of marks that are close together go to so many lines at most.
MARK_LINES = 4
#: Pixels: the height of a line of steps, the least width of the picture, and the room for each step of many.
LANE_HEIGHT, MIN_WIDTH, STEP_ROOM = 44, 640, 12
#: Pixels: less is too little for the name of a step.
LABEL_ROOM = 30

_OUTCOMES = {"done": "done", "failed": "failed", "retried": "retried"}
_STYLE = """
:root { color-scheme: light dark; --ground: #fff; --text: #1c2127; --faint: #667; --line: #d5d9df; --band: #f0f2f5;
  --done: #bfe3c8; --done-edge: #2e8b57; --failed: #f7c6c2; --failed-edge: #c0392b; --retried: #fbe2ac;
  --retried-edge: #b9770e; --other: #dcdfe4; --other-edge: #6b7280; --call: #3b6fd4; --bad: #c0392b; }
@media (prefers-color-scheme: dark) { :root { --ground: #15181c; --text: #e6e8eb; --faint: #98a0aa; --line: #363c44;
  --band: #1f242a; --done: #1d4a31; --done-edge: #57c785; --failed: #5e2421; --failed-edge: #f0776c; --retried: #594414;
  --retried-edge: #e5b04a; --other: #3a3f47; --other-edge: #9aa3af; --call: #7aa2f7; --bad: #f0776c; } }
body { margin: 1.5rem auto; max-width: 90rem; padding: 0 1rem; background: var(--ground); color: var(--text);
  font: 14px/1.4 system-ui, sans-serif; }
h1 { font-size: 1.3rem; margin: 0 0 .5rem; }
code { font-family: ui-monospace, monospace; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .1rem 1rem; margin: 0 0 1.5rem; }
dt { color: var(--faint); }
dd { margin: 0; overflow-wrap: anywhere; }
figure { margin: 0 0 .5rem; overflow-x: auto; border: 1px solid var(--line); border-radius: 6px; }
.plot { display: grid; grid-template-columns: minmax(6rem, max-content) 1fr; }
.name { grid-column: 1; position: sticky; left: 0; z-index: 3; max-width: 16rem; padding: .4rem .8rem;
  background: var(--ground); border-right: 1px solid var(--line); overflow-wrap: anywhere; }
.worker { border-top: 1px solid var(--line); }
.track { grid-column: 2; position: relative; margin: 0 14px; }
.track > *, .track::before { position: absolute; box-sizing: border-box; }
.worker + .track::before { content: ""; left: -14px; right: -14px; border-top: 1px solid var(--line); }
.over { grid-column: 2; pointer-events: none; }
.over > * { top: 0; bottom: 0; }
.gap { min-width: 3px; pointer-events: auto;
  background: repeating-linear-gradient(135deg, var(--band) 0 5px, var(--ground) 5px 10px); }
.grid { border-left: 1px dotted var(--line); }
.mark { border-left: 2px solid var(--other-edge); }
.mark.bad { border-color: var(--bad); }
.flag { padding: 0 4px; font-size: 12px; line-height: 18px; white-space: nowrap; }
.flag.bad { color: var(--bad); }
.tick { top: 2px; font-size: 11px; color: var(--faint); white-space: nowrap; transform: translateX(-50%); }
.tick.first { transform: none; }
.tick.last { transform: translateX(-100%); }
.tick.quiet { top: 18px; font-style: italic; }
.step { height: 32px; min-width: 4px; border-radius: 3px; border: 1px solid var(--other-edge);
  background: var(--other); }
.step.done { background: var(--done); border-color: var(--done-edge); }
.step.failed { background: var(--failed); border-color: var(--failed-edge); }
.step.retried { background: var(--retried); border-color: var(--retried-edge); }
.label { z-index: 1; height: 20px; padding: 0 5px; font-size: 12px; line-height: 20px; white-space: nowrap;
  overflow: hidden; text-overflow: ellipsis; pointer-events: none; }
.call { z-index: 2; height: 7px; min-width: 3px; border-radius: 2px; background: var(--call); opacity: .85; }
.call.bad { background: var(--bad); }
.legend { display: flex; flex-wrap: wrap; gap: .3rem 1.2rem; margin: 0 0 1.5rem; padding: 0; list-style: none;
  font-size: 12px; color: var(--faint); }
.legend i { display: inline-block; position: static; width: 22px; height: 10px; margin-right: .4rem; }
.legend i.call { height: 7px; }
.legend i.gap { border: 1px solid var(--line); }
table { border-collapse: collapse; }
caption { text-align: left; font-weight: 600; padding-bottom: .3rem; }
th, td { padding: .15rem 1.2rem .15rem 0; text-align: left; vertical-align: top; border-bottom: 1px solid var(--line);
  font-variant-numeric: tabular-nums; }
td:last-child { padding-right: 0; overflow-wrap: anywhere; }
tr.inner td:last-child { padding-left: 1.5rem; }
tr.bad td:last-child { color: var(--bad); }
"""


def render(record: SessionRecord, facts: Iterable[tuple[str, str]], events: Iterable[Mapping[str, Any]]) -> str:
    """Return the page for one session: *facts* on it, a picture of its history, and the same as a table."""
    history = History.read(events)
    title = f"MCP session {record.short_id}"
    described = "".join(f"<dt>{escape(name)}</dt><dd>{escape(value)}</dd>" for name, value in facts)
    return "\n".join(
        [
            '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">',
            # Nothing of this page may load or run anything, whatever a task is called.
            "<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; style-src 'unsafe-inline'\">",
            '<meta name="viewport" content="width=device-width">',
            f"<title>{escape(f'{title} of {record.server}')}</title>\n<style>{_STYLE}</style>\n</head>\n<body>",
            f"<h1>{escape(title)}</h1>\n<dl>{described}</dl>",
            *(_picture(history) if history.spans else ["<p>Nothing is kept of what happened in it.</p>"]),
            *(_table(history.rows()) if history.spans else []),
            "</body>\n</html>\n",
        ]
    )


# -- The time axis


class Gap(NamedTuple):
    """A quiet time that is drawn shorter than it was. Its place is given as shares of the width."""

    left: float
    right: float
    seconds: float


class Scale:
    """Where a moment is drawn, as a share of the width. Long quiet times are drawn short, all else to one scale."""

    def __init__(self, spans: Sequence[tuple[float, float]]) -> None:
        busy = _merged(spans)
        total = sum(end - start for start, end in busy)
        longest = _longest_to_scale([later[0] - earlier[1] for earlier, later in pairwise(busy)], total)
        is_long = [later[0] - earlier[1] > longest for earlier, later in pairwise(busy)]
        gap_width = min(GAP_WIDTH, ALL_GAPS_WIDTH / max(sum(is_long), 1)) * total
        #: Moments, and how many seconds at scale lie to the left of each.
        self._moments, self._places = [busy[0][0]], [0.0]
        self._gaps: list[int] = []
        for (start, end), follows_long in zip(busy, [False, *is_long], strict=True):
            if follows_long:
                self._gaps.append(len(self._moments) - 1)
            self._add(start, gap_width if follows_long else start - self._moments[-1])
            self._add(end, end - start)

    def _add(self, moment: float, width: float) -> None:
        self._moments.append(moment)
        self._places.append(self._places[-1] + width)

    @property
    def width_seconds(self) -> float:
        """How many seconds the whole width would be without gaps."""
        return self._places[-1]

    def __call__(self, moment: float) -> float:
        """Return where *moment* is drawn, between 0 and 1."""
        if self.width_seconds <= 0:
            return 0.0
        after = bisect_right(self._moments, moment)
        if after in {0, len(self._moments)}:
            return 0.0 if after == 0 else 1.0
        before = after - 1
        share = (moment - self._moments[before]) / (self._moments[after] - self._moments[before])
        place = self._places[before] + share * (self._places[after] - self._places[before])
        return place / self.width_seconds

    @property
    def gaps(self) -> list[Gap]:
        """The quiet times that are drawn short."""
        moments, places, whole = self._moments, self._places, self.width_seconds
        return [Gap(places[i] / whole, places[i + 1] / whole, moments[i + 1] - moments[i]) for i in self._gaps]

    def ticks(self) -> list[tuple[float, str]]:
        """Return places and labels for a time axis, which counts from its beginning, far enough from each other."""
        origin, whole = self._moments[0], self.width_seconds
        unit = _round_unit(whole * TICK_ROOM)
        starts = [0, *(index + 1 for index in self._gaps)]
        ends = [*self._gaps, len(self._moments) - 1]
        bounds = [
            (self._moments[start] - origin, self._moments[end] - origin)
            for start, end in zip(starts, ends, strict=True)
        ]
        # The moments after gaps first: they are what the axis could not be read without.
        wanted = [start for start, _ in bounds]
        for start, end in bounds if unit > 0 else ():
            wanted += [count * unit for count in range(math.ceil(start / unit), math.floor(end / unit) + 1)]
        placed: dict[float, str] = {}
        for seconds in wanted:
            place, label = self(origin + seconds), duration(seconds)
            if all(abs(place - other) >= TICK_ROOM and label != text for other, text in placed.items()):
                placed[place] = label
        return sorted(placed.items())


def _merged(spans: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """Return *spans*, which are sorted, without overlaps."""
    merged = [spans[0]]
    for start, end in spans[1:]:
        first, last = merged[-1]
        if start <= last:
            merged[-1] = (first, max(last, end))
        else:
            merged.append((start, end))
    return merged


def _longest_to_scale(gaps: Sequence[float], busy: float) -> float:
    """Return up to which length gaps are drawn to scale: all of those together shall be no longer than *busy*."""
    if busy <= 0:
        return math.inf
    return max((gap for gap in gaps if sum(other for other in gaps if other <= gap) <= busy), default=0.0)


def _round_unit(seconds: float) -> float:
    """Return a round length of time that is no shorter than *seconds*."""
    if seconds <= 0:
        return 0.0
    for unit in (60, 120, 300, 600, 1800, 3600, 7200, 21600, 43200, 86400):
        if seconds > 30 and seconds <= unit:  # noqa: PLR2004
            return unit
    power: float = 10 ** math.floor(math.log10(seconds))
    return next(power * factor for factor in (1, 2, 5, 10) if power * factor >= seconds)


# -- The picture


def _picture(history: History) -> Iterator[str]:
    scale = Scale(history.spans)
    steps: dict[str, list[Step]] = {}
    for step in history.steps:
        steps.setdefault(step.worker, []).append(step)
    width = max(MIN_WIDTH, STEP_ROOM * len(history.steps))
    count = f"{len(history.steps)} {'step' if len(history.steps) == 1 else 'steps'}"
    yield f'<figure role="img" aria-label="{count} on {len(steps)} workers over time; the table below says the same">'
    yield f'<div class="plot" style="min-width:{width}px">'
    yield f'<div class="over track" style="grid-row:1/{len(steps) + 2}">'
    for gap in scale.gaps:
        yield _box("gap", gap.left, gap.right, f"{duration(gap.seconds)} quiet")
    for place, _ in scale.ticks():
        yield f'<div class="grid" style="left:{_percent(place)}"></div>'
    for mark in history.marks:
        yield f'<div class="mark {_badness(mark)}" style="left:{_percent(scale(mark.at))}"></div>'
    yield "</div>"
    yield from _flags(history, scale)
    for row, (worker, its_steps) in enumerate(steps.items(), 2):
        yield f'<div class="name worker" style="grid-row:{row}">{escape(worker or "?")}</div>'
        lanes = _lanes(its_steps)
        yield f'<div class="track" style="grid-row:{row};height:{len(lanes) * LANE_HEIGHT + 4}px">'
        for index, lane in enumerate(lanes):
            yield from _lane(lane, scale, index * LANE_HEIGHT + 6, history.begins_at, LABEL_ROOM / width)
        yield "</div>"
    yield from _axis(scale, len(steps) + 2)
    yield "</div></figure>"
    yield _LEGEND


def _axis(scale: Scale, row: int) -> Iterator[str]:
    """The labels of the ticks, and under them how long the quiet times were, where there is room for that."""
    yield f'<div class="name" style="grid-row:{row}"></div>'
    yield f'<div class="track" style="grid-row:{row};height:{40 if scale.gaps else 22}px">'
    for place, label in scale.ticks():
        edge = "first" if place == 0 else "last" if place > 1 - TICK_ROOM / 4 else ""
        yield f'<div class="tick {edge}" style="left:{_percent(place)}">{label}</div>'
    free_from = 0.0
    for gap in scale.gaps:
        middle = (gap.left + gap.right) / 2
        if middle >= free_from:
            yield f'<div class="tick quiet" style="left:{_percent(middle)}">{duration(gap.seconds)} quiet</div>'
            free_from = middle + TICK_ROOM
    yield "</div>"


def _flags(history: History, scale: Scale) -> Iterator[str]:
    """The labels of marks, on as many lines as keep them apart."""
    free_from = [-1.0] * MARK_LINES
    flags = []
    for mark in history.marks:
        place = scale(mark.at)
        line = next((line for line, free in enumerate(free_from) if free <= place), None)
        if line is None:
            continue
        free_from[line] = place + MARK_ROOM
        is_right = place > 1 - MARK_ROOM
        side = f"right:{_percent(1 - place)};text-align:right" if is_right else f"left:{_percent(place)}"
        flags.append(
            f'<div class="flag {_badness(mark)}" style="{side};top:{line * 18 + 2}px" '
            f'title="{_moment(mark.at - history.begins_at)}: {escape(mark.text)}">{escape(mark.text)}</div>'
        )
    lines = max((line + 1 for line, free in enumerate(free_from) if free >= 0), default=0)
    yield f'<div class="name" style="grid-row:1"></div><div class="track" style="grid-row:1;height:{lines * 18 + 4}px">'
    yield from flags
    yield "</div>"


def _lanes(steps: Sequence[Step]) -> list[list[Step]]:
    """Return the steps of one worker in lines in which none overlap: its pool runs several at once."""
    lanes: list[list[Step]] = []
    for step in steps:
        lane = next((lane for lane in lanes if lane[-1].until <= step.at), None)
        if lane is None:
            lanes.append([step])
        else:
            lane.append(step)
    return lanes


def _lane(steps: Sequence[Step], scale: Scale, top: int, origin: float, label_room: float) -> Iterator[str]:
    nexts = [scale(step.at) for step in steps[1:]] + [1.0]
    for step, following in zip(steps, nexts, strict=True):
        left, right = scale(step.at), scale(step.until)
        about = f"{_moment(step.at - origin)}: {step.text}, {duration(step.until - step.at)}"
        yield _box(f"step {_OUTCOMES.get(step.outcome, '')}", left, right, about, top)
        # The label may go beyond a short bar, as far as the next one.
        end = max(right, following)
        if end - left >= label_room:
            label = step.task.rpartition(".")[2] + ("" if step.outcome == "done" else f" · {step.outcome}")
            yield _box("label", left, end, "", top, text=label)
        for call in step.calls:
            yield _call_box(call, scale, top + 22, origin)


def _call_box(call: Call, scale: Scale, top: int, origin: float) -> str:
    about = f"{_moment(call.at - origin)}: {call.text}, {duration(call.seconds)}"
    return _box("call" if call.ok else "call bad", scale(call.at), scale(call.at + call.seconds), about, top)


def _box(kind: str, left: float, right: float, about: str, top: int | None = None, *, text: str = "") -> str:
    place = f"left:{_percent(left)};width:{_percent(right - left)}" + (f";top:{top}px" if top is not None else "")
    title = f' title="{escape(about)}"' if about else ""
    return f'<div class="{kind}" style="{place}"{title}>{escape(text)}</div>'


def _percent(share: float) -> str:
    return f"{share * 100:.3f}%"


def _moment(seconds: float) -> str:
    return f"+{duration(seconds)}"


def _badness(mark: Mark) -> str:
    return "bad" if mark.what == "lost" else ""


_LEGEND = (
    '<ul class="legend" aria-hidden="true">'
    + "".join(
        f'<li><i class="{kind}"></i>{text}</li>'
        for kind, text in (
            ("step done", "step, done"),
            ("step failed", "failed"),
            ("step retried", "retried"),
            ("step", "ignored, rejected or replaced"),
            ("call", "call to the server"),
            ("call bad", "failed call"),
            ("gap", "quiet time, drawn short"),
        )
    )
    + "</ul>"
)


# -- The table


def _table(rows: Iterable[Row]) -> Iterator[str]:
    yield "<table><caption>What happened</caption>"
    yield "<thead><tr><th>at</th><th>took</th><th>worker</th><th>what</th></tr></thead><tbody>"
    for row in rows:
        kinds = " ".join(kind for kind, applies in (("inner", row.is_inner), ("bad", row.is_bad)) if applies)
        took = "" if row.seconds is None else duration(row.seconds)
        cells = "".join(f"<td>{escape(text)}</td>" for text in (_moment(row.at), took, row.worker, row.text))
        yield f'<tr class="{kinds}">{cells}</tr>'
    yield "</tbody></table>"
