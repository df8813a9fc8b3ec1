"""Kills a worker with SIGKILL in the middle of a tool, and shows that another one finishes that very call.

Takes two workers on this machine that listen to the queue "any". Whichever gets the task is the one to die. With
`--by-hand` they may be on other machines: it says whom to kill, and leaves that to you.
"""

import os
import signal
import sys
import time
from collections.abc import Callable
from math import isclose

import httpx2
from celery.result import AsyncResult

from examples.notebook.run import wait_until_closed
from examples.notebook.tasks import NOTEBOOK_URL, app, forecast
from mcp_celery.journal import LEASE_SECONDS

PRINCIPAL, RATE, YEARS = 1000, 0.05, 40
#: How long the tool takes: it should still run when the lease of the killed worker has lapsed.
SECONDS = round(LEASE_SECONDS) + 5
#: With time for you to type a command.
BY_HAND_SECONDS = 40
KILL_YEAR = 4
#: Of what the server says while nobody listens.
TELL_YEARS = 10
WAIT_SECONDS, ANSWER_SECONDS, POLL_SECONDS = 90, 10, 0.1
REQUESTS = {"GET - 200": "a GET asks for the rest of that call", "DELETE - 200": "a DELETE ends the session"}


class SurvivalError(Exception):
    """Raised when something took too long, or the task failed."""


class Story:
    """Prints what becomes of a task when it happens: from the state of the task, and from the server's own log."""

    def __init__(self, task: AsyncResult) -> None:
        self.task = task
        self.begun = time.time()
        self.killed_at = 0.0
        #: What each worker that has run the task said last.
        self.workers: dict[str, dict] = {}
        self._client = httpx2.Client()
        self._read = 0

    def tell(self, where: str, what: str, at: float | None = None) -> None:
        print(f"{(at or time.time()) - self.begun:5.1f} s  {where:<8}  {what}", flush=True)

    def look(self) -> dict | None:
        """Print what is new, and return what the task has said last.

        Raises:
            SurvivalError: The task has failed.
        """
        row = self.task.info
        if isinstance(row, Exception):
            raise SurvivalError(f"the task failed with {row!r}")
        is_news = row is not None and row["worker"] not in self.workers
        if row is not None:
            self.workers[row["worker"]] = row
        log = self.log()
        for entry in log[self._read :]:
            if self._is_told(entry["what"]):
                self.tell("server", REQUESTS.get(entry["what"], entry["what"]), entry["at"])
        self._read = len(log)
        if is_news:
            first, last = row["heard"]
            years = f"year {last}" if first == last else f"years {first} to {last}"
            self.tell(short(row), f"the tool reports {years} of {YEARS}")
        return row

    def look_until(self, what: str, holds: Callable[[dict | None], bool]) -> dict:
        """Look until *holds* of what the task has said last, and return that.

        Raises:
            SurvivalError: The task has failed, or it took too long.
        """
        deadline = time.monotonic() + WAIT_SECONDS
        while not holds(row := self.look()):
            if time.monotonic() > deadline:
                raise SurvivalError(f"{what} took more than {WAIT_SECONDS} seconds")
            time.sleep(POLL_SECONDS)
        return row

    def log(self) -> list[dict]:
        """Return what the server has logged of the session of the task, as far as that is known here."""
        sessions = {row["session"] for row in self.workers.values()}
        entries = self._client.get(httpx2.URL(NOTEBOOK_URL).join("/log")).json()
        return [entry for entry in entries if entry["session"] in sessions]

    def times(self, what: str) -> list[float]:
        """Return when the server has logged *what*."""
        return [entry["at"] for entry in self.log() if entry["what"] == what]

    def _is_told(self, what: str) -> bool:
        """Leave out handshake and calls, and years that a worker reports or that are not round."""
        if what.startswith("simulate: step"):
            is_alone = bool(self.killed_at) and len(self.workers) == 1
            return is_alone and int(what.split()[2]) % TELL_YEARS == 0
        return not what.startswith("POST")


def main() -> int:
    """Run the task once.

    Returns:
        The exit status: 0 when its worker was killed, another one has finished it, and the tool was executed once.
    """
    by_hand = sys.argv[1:] == ["--by-hand"]
    seconds, kill = (BY_HAND_SECONDS, ask_to_kill) if by_hand else (SECONDS, kill_processes)
    try:
        return survive(Story(forecast.apply_async((PRINCIPAL, RATE, YEARS, seconds), queue="any")), kill)
    except SurvivalError as exc:
        print(f"This should not have been: {exc}.", file=sys.stderr)
        return 1


def survive(story: Story, kill: Callable[[str], str]) -> int:
    first = story.look_until("reaching the tool", lambda row: row is not None and row["heard"][-1] >= KILL_YEAR)
    killed = kill(first["worker"])
    story.killed_at = time.time()
    story.tell(short(first), f"{killed} (its lease on the task lapses in {LEASE_SECONDS:.0f} s)")

    story.look_until("finishing the task", lambda _: story.task.ready())
    last = story.task.get(timeout=ANSWER_SECONDS)
    is_closed = wait_until_closed(last["session"])
    story.look()

    runs = len(story.times("simulate runs"))
    times = "once" if runs == 1 else f"{runs} TIMES"
    print(f"\nThe call that {short(first)} began, {short(last)} finished.")
    print(f"The server's log says: simulate was executed {times}.")
    print(f"{PRINCIPAL} at {RATE:.0%} after {YEARS} years: {last['balance']:.2f}")
    checks = {
        "another worker finished what the killed one had begun": first["worker"] != last["worker"],
        "it resumed the session": last["how"] == "resumed" and last["session"] == first["session"],
        "the worker was killed while the tool ran": all(at > story.killed_at for at in story.times("simulate has run")),
        "the server executed the tool once": runs == 1,
        "... and the call before it as well": len(story.times("assign runs")) == 1,
        "the session was closed once": is_closed,
        "the result is right": isclose(last["balance"], PRINCIPAL * (1 + RATE) ** YEARS),
    }
    for claim in (claim for claim, holds in checks.items() if not holds):
        print(f"This should have been so: {claim}.", file=sys.stderr)
    return 0 if all(checks.values()) else 1


def kill_processes(worker: str) -> str:
    processes = processes_of(worker)
    for process in processes:
        os.kill(process, signal.SIGKILL)
    return f"KILLED: kill -9 {' '.join(map(str, processes))}"


def ask_to_kill(worker: str) -> str:
    return f"KILL IT NOW, in another terminal: docker compose kill {worker.partition('@')[2]}"


def processes_of(worker: str) -> list[int]:
    """Return the IDs of the processes of *worker*, the main one first: killed first, it sees nothing of the rest.

    Raises:
        SurvivalError: The worker does not answer.
    """
    answers = app.control.inspect([worker], timeout=ANSWER_SECONDS).stats()
    if not answers:
        raise SurvivalError(f"{worker} did not answer")
    stats = answers[worker]
    return [stats["pid"], *stats["pool"]["processes"]]


def short(row: dict) -> str:
    return f"worker {row['worker'].partition('@')[0]}"


if __name__ == "__main__":
    sys.exit(main())
