"""What a soak has measured, and how it is kept in files."""

import csv
from collections.abc import Iterable, Sequence
from dataclasses import astuple, dataclass, field, fields
from pathlib import Path
from typing import Any, TypeVar, get_type_hints

_T = TypeVar("_T")


@dataclass(frozen=True)
class ProcessSample:
    """A process at a time. A process that was replaced has a line of its own, by its `pid`."""

    #: Since the load began.
    seconds: float
    #: What it belongs to: a worker, the server, Valkey.
    owner: str
    #: What it is there: "main", "child", "reaper".
    role: str
    pid: int
    rss_mb: float
    threads: int
    sockets: int
    #: Sockets among them.
    descriptors: int

    @property
    def line(self) -> tuple[str, str, int]:
        return self.owner, self.role, self.pid

    @property
    def name(self) -> str:
        return f"{self.owner} {self.role} ({self.pid})"


@dataclass(frozen=True)
class TotalSample:
    """Everything together at a time."""

    seconds: float
    #: Open at the server.
    sessions: int
    #: Of all kinds, in the store.
    keys: int
    #: Marks of durable tasks that have ended, among them: each stays for a day.
    marks: int
    under_way: int
    ended: int


@dataclass(frozen=True)
class Kill:
    """A process that was killed; of a worker, its main process stands for all of them."""

    seconds: float
    what: str
    pid: int


@dataclass
class Measured:
    """All of it."""

    #: For how long there was load.
    load_seconds: float = 0.0
    processes: list[ProcessSample] = field(default_factory=list)
    totals: list[TotalSample] = field(default_factory=list)
    kills: list[Kill] = field(default_factory=list)

    def write(self, folder: Path) -> None:
        """Write a file of comma-separated values for each kind."""
        folder.mkdir(parents=True, exist_ok=True)
        _write(folder / "processes.csv", ProcessSample, self.processes)
        _write(folder / "totals.csv", TotalSample, self.totals)
        _write(folder / "kills.csv", Kill, self.kills)

    @classmethod
    def read(cls, folder: Path, load_seconds: float) -> "Measured":
        """Return what was written to the folder."""
        return cls(
            load_seconds,
            _read(folder / "processes.csv", ProcessSample),
            _read(folder / "totals.csv", TotalSample),
            _read(folder / "kills.csv", Kill),
        )


def _write(path: Path, kind: Any, rows: Iterable[Any]) -> None:
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(field.name for field in fields(kind))
        writer.writerows(astuple(row) for row in rows)


def _read(path: Path, kind: type[_T]) -> list[_T]:
    types: Sequence[Any] = [get_type_hints(kind)[field.name] for field in fields(kind)]  # type: ignore[arg-type]
    with path.open(newline="") as file:
        _, *rows = csv.reader(file)
    return [kind(*(of(text) for of, text in zip(types, row, strict=True))) for row in rows]
