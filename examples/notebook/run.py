"""Sends the workflow, its steps to two workers in turn, and shows that they shared one session."""

import sys
import time
from itertools import pairwise
from math import isclose

import httpx2
from celery import chain

from examples.notebook.tasks import NOTEBOOK_URL, load, plan, report, simulate, transform

PRINCIPAL, RATE, YEARS = 1000, 0.05, 10
WAIT_SECONDS = 180
COLUMNS = ("task", "worker", "pid", "session", "how", "requests")


def main() -> int:
    """Run the workflow once.

    Returns:
        The exit status: 0 when one session served every step on alternating workers, and is closed now.
    """
    workflow = chain(
        load.s(PRINCIPAL, RATE).set(queue="a"),
        transform.s().set(queue="b"),
        plan.s(YEARS).set(queue="a"),
        simulate.s().set(queue="b"),
        report.s().set(queue="a"),
    )
    state = workflow().get(timeout=WAIT_SECONDS)
    rows, interest = state["rows"], state["interest"]
    print_table(rows)

    used = {row["session"] for row in rows if "session" in row}
    opened = [row for row in rows if row.get("how") == "opened"]
    closed = {session: wait_until_closed(session) for session in used}
    for session in used:
        print(f"\nSession {session} is {'closed: one DELETE' if closed[session] else 'NOT closed, or not just once'}.")
    print(f"Interest on {PRINCIPAL} at {RATE:.0%} after {YEARS} years: {interest:.2f}")

    checks = {
        "every step used the session that the first one opened": len(used) == len(opened) == 1,
        "the steps ran on two workers in turn": all(one["worker"] != two["worker"] for one, two in pairwise(rows)),
        "the session was closed once": all(closed.values()),
        "the result is right": isclose(interest, PRINCIPAL * ((1 + RATE) ** YEARS - 1)),
    }
    for claim in (claim for claim, holds in checks.items() if not holds):
        print(f"This should have been so: {claim}.", file=sys.stderr)
    return 0 if all(checks.values()) else 1


def print_table(rows: list[dict]) -> None:
    lines = [COLUMNS, *([str(row.get(column, "-")) for column in COLUMNS] for row in rows)]
    widths = [max(map(len, cells)) for cells in zip(*lines, strict=True)]
    for line in lines:
        print("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip())


def wait_until_closed(session: str, seconds: float = 10) -> bool:
    """Ask the server until it has *session* no more, and has seen exactly one DELETE for it."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        seen = httpx2.get(httpx2.URL(NOTEBOOK_URL).join("/sessions")).json()
        if session not in seen["open"]:
            return seen["deletes"].count(session) == 1
        time.sleep(0.05)
    return False


if __name__ == "__main__":
    sys.exit(main())
