"""Asks two questions, each on another worker, and shows that the second agent went on where the first had ended."""

import json
import sys
import time

import httpx2
from celery import chain

from examples.agent.tasks import DEPOSIT, GROWTH, HAS_REAL_MODEL, NOTEBOOK_URL, ask
from examples.notebook.run import wait_until_closed

WAIT_SECONDS = 110
INTEREST = "628.89"


def main() -> int:
    """Run the workflow once.

    Returns:
        The exit status: 0 when one session served both agents and is closed now.
    """
    begun = time.time()
    print("The agent is", "a real model." if HAS_REAL_MODEL else "scripted: set OPENAI_API_KEY for a real one.")
    second = chain(ask.s([], DEPOSIT).set(queue="a"), ask.s(GROWTH).set(queue="b"))()
    conversation = second.get(timeout=WAIT_SECONDS)
    workers = [second.parent.worker, second.worker]
    where = iter(workers)
    for item in conversation:
        if item.get("role") == "user":
            print(f"\non {next(where)}")
        print_item(item)

    log = httpx2.get(httpx2.URL(NOTEBOOK_URL).join("/log")).json()
    used = {entry["session"] for entry in log if entry["at"] >= begun and entry["what"].startswith("POST tools/call")}
    closed = {session: wait_until_closed(session) for session in used}
    for session in used:
        print(f"\nSession {session} is {'closed: one DELETE' if closed[session] else 'NOT closed, or not just once'}.")
    checks = {
        "both agents used one session": len(used) == 1,
        "they ran on two workers": len(set(workers)) == len(workers),
        "the session was closed once": all(closed.values()),
        "the result is right": HAS_REAL_MODEL or INTEREST in json.dumps(conversation[-1]),
    }
    for claim in (claim for claim, holds in checks.items() if not holds):
        print(f"This should have been so: {claim}.", file=sys.stderr)
    return 0 if all(checks.values()) else 1


def print_item(item: dict) -> None:
    """Print one thing that was said in a conversation, as the SDK has them."""
    match item:
        case {"role": "user", "content": question}:
            print(f"user   {question}")
        case {"type": "function_call", "name": name, "arguments": arguments}:
            print(f"agent  {name} {arguments}")
        case {"role": "assistant", "content": [{"text": text}, *_]}:
            print(f"agent  {text}")


if __name__ == "__main__":
    sys.exit(main())
