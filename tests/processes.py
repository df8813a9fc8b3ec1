"""Child processes of the tests, and how to wait for them: bounded, polled, and gone at the end."""

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TypeVar

_T = TypeVar("_T")


def exit_at_signals() -> None:
    """Leave the program as by an exception at the first SIGINT or SIGTERM, so that all that it has started ends."""
    numbers = (signal.SIGINT, signal.SIGTERM)

    def leave(number: int, _: object) -> None:
        for each in numbers:
            signal.signal(each, signal.SIG_IGN)
        sys.exit(128 + number)

    for number in numbers:
        signal.signal(number, leave)


def wait_until(
    predicate: Callable[[], _T], timeout: float = 30, what: str = "the condition", pause: float = 0.02
) -> _T:
    """Poll *predicate* until it returns something true, and return that.

    Raises:
        TimeoutError: It did not in *timeout* seconds; the text names *what* was awaited.
    """
    deadline = time.monotonic() + timeout
    while not (value := predicate()):
        if time.monotonic() > deadline:
            raise TimeoutError(f"waited {timeout} s for {what}")
        time.sleep(pause)
    return value


def free_port() -> int:
    """A TCP port of 127.0.0.1 that nobody listened on a moment ago."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def accepts(port: int) -> bool:
    """Whether something listens on *port* of 127.0.0.1."""
    try:
        socket.create_connection(("127.0.0.1", port), timeout=1).close()
    except OSError:
        return False
    return True


class ChildProcess:
    """A program in a process group of its own, with its output in *log_path*."""

    def __init__(
        self, command: Sequence[str | Path], log_path: Path, *, env: dict[str, str] | None = None, cwd: Path
    ) -> None:
        self._log_path = log_path
        with log_path.open("ab") as log:
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env={**os.environ, "PYTHONUNBUFFERED": "1", **(env or {})},
                cwd=cwd,
                start_new_session=True,
            )

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def returncode(self) -> int | None:
        return self._process.poll()

    @property
    def running(self) -> bool:
        return self._process.poll() is None

    def log(self) -> str:
        """All it has printed so far."""
        return self._log_path.read_text(errors="replace")

    def wait_until_ready(self, ready: Callable[[], bool], timeout: float) -> None:
        """Poll *ready*; a program that ends or takes too long instead is killed.

        Raises:
            RuntimeError: The program ended; the text holds its log.
            TimeoutError: It was not ready in *timeout* seconds.
        """
        try:
            wait_until(lambda: ready() or not self.running, timeout, f"process {self.pid} to be ready")
        except TimeoutError as exc:
            exc.add_note(self.log())
            self.kill()
            raise
        if not self.running:
            self.kill()
            raise RuntimeError(f"the program ended with {self._process.returncode}:\n{self.log()}")

    def stop(self, timeout: float = 15) -> None:
        """Ask it to end (SIGTERM to the first process), and kill what is left of the group."""
        self._process.terminate()
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(timeout)
        self.kill()

    def kill(self) -> None:
        """End the whole group at once (SIGKILL). Harmless on a group that has ended."""
        with suppress(ProcessLookupError):
            os.killpg(self.pid, signal.SIGKILL)
        self._process.wait(10)
