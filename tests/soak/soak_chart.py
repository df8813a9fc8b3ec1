"""The picture of a soak, as SVG."""

import re
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from samples import Measured, ProcessSample
from verdict import WARM_UP

#: Colours that differ to most eyes, by whose process it is.
COLOURS = {
    "prefork": "#0072b2",
    "victim": "#d55e00",
    "threads": "#009e73",
    "gevent": "#cc79a7",
    "server": "#333333",
    "valkey": "#e69f00",
}
NAMES = {"victim": "worker “victim” (prefork), killed whole", "server": "MCP server", "valkey": "Valkey"}
#: What is drawn for each process.
PROCESS_PANELS: dict[str, Callable[[ProcessSample], float]] = {
    "memory (RSS), MB": lambda sample: round(sample.rss_mb * 2) / 2,
    "threads": lambda sample: sample.threads,
    "sockets": lambda sample: sample.sockets,
}
_NUMBER = re.compile(r"-?\d+\.\d{2,}")


def draw(measured: Measured, path: Path) -> None:
    """Write the picture. It says nothing of when it was drawn, and has its texts as text."""
    with mpl.rc_context(
        {
            "svg.fonttype": "none",
            "svg.hashsalt": "soak",
            "path.simplify_threshold": 0.5,
            "font.family": "sans-serif",
            "font.size": 9,
            "axes.spines.top": False,
            "axes.spines.right": False,
        }
    ):
        figure = Figure(figsize=(9, 11), facecolor="white", layout="constrained")
        panels = figure.subplots(5, 1, sharex=True, height_ratios=[3, 2, 3, 2, 2])
        lines = defaultdict(list)
        for sample in measured.processes:
            lines[sample.line].append(sample)
        for panel, (label, of) in zip(panels, PROCESS_PANELS.items(), strict=False):
            _draw_processes(panel, lines, of)
            panel.set_ylabel(label)
        minutes = [sample.seconds / 60 for sample in measured.totals]
        sessions, keys = panels[3:]
        sessions.plot(minutes, [sample.sessions for sample in measured.totals], color="#0072b2", linewidth=1)
        sessions.set_ylabel("open sessions")
        keys.plot(minutes, [sample.keys for sample in measured.totals], color="#0072b2", linewidth=1, label="keys")
        marks = [sample.marks for sample in measured.totals]
        keys.plot(minutes, marks, color="#888888", linewidth=1, linestyle="--", label="one for each ended durable task")
        keys.set_ylabel("keys in the store")
        keys.legend(loc="upper left", frameon=False)
        keys.set_xlabel("minutes")
        for panel in panels:
            _mark_times(panel, measured)
        figure.legend(handles=_legend(), loc="outside upper center", ncols=4, frameon=False)
        figure.savefig(path, format="svg", metadata={"Date": None, "Creator": None})
    path.write_text(_NUMBER.sub(lambda found: f"{float(found[0]):.1f}", path.read_text()))


def _draw_processes(panel: Axes, lines: dict[Any, list[ProcessSample]], of: Callable[[ProcessSample], float]) -> None:
    for (owner, role, _), samples in lines.items():
        panel.plot(
            *_corners([(sample.seconds / 60, of(sample)) for sample in samples]),
            color=COLOURS[owner],
            linewidth=1.3 if role == "main" else 0.7,
            linestyle=":" if role == "reaper" else "-",
        )


def _corners(points: list[tuple[float, float]]) -> tuple[list[float], list[float]]:
    """Return the points without those amid others of the same height, which would only make the file larger."""
    heights = [None, *(y for _, y in points), None]
    kept = [
        point
        for before, point, after in zip(heights, points, heights[2:], strict=False)
        if not before == point[1] == after
    ]
    return [x for x, _ in kept], [y for _, y in kept]


def _mark_times(panel: Axes, measured: Measured) -> None:
    end = measured.load_seconds / 60
    panel.axvspan(0, WARM_UP * end, color="#f3f3f3", linewidth=0)
    panel.axvspan(end, measured.totals[-1].seconds / 60, color="#f3f3f3", linewidth=0)
    for kill in measured.kills:
        is_worker = kill.what == "worker"
        panel.axvline(
            kill.seconds / 60,
            color="#d55e00" if is_worker else "#999999",
            linewidth=0.4,
            linestyle="-" if is_worker else ":",
        )
    panel.set_ylim(bottom=0)
    panel.set_xlim(0, measured.totals[-1].seconds / 60)


def _legend() -> list[Line2D]:
    owners = [
        Line2D([], [], color=colour, label=NAMES.get(owner, f"worker “{owner}”")) for owner, colour in COLOURS.items()
    ]
    return [
        *owners,
        Line2D([], [], color="#666666", linewidth=0.7, label="thin: a child of the pool"),
        Line2D([], [], color="#666666", linewidth=0.7, linestyle=":", label="dotted: a reaper; a child killed"),
    ]
