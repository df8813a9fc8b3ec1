"""What the tests ask the servers for, kind by kind, and how a coroutine waits for what a server has seen."""

import time

import anyio
import httpx2

#: Peers with sessions, as `recorded_peer` takes them.
PEERS = [
    ("python",),
    ("python", "--json"),
    ("python", "--event-store"),
    ("python", "--protocol-version", "2025-03-26"),
    ("python", "--protocol-version", "2025-06-18"),
    ("python1",),
    ("python1", "--event-store"),
    ("typescript",),
    ("typescript", "--event-store"),
    ("everything",),
]
#: The same, one of each implementation.
KINDS = [("python",), ("python1",), ("typescript",), ("everything",)]
#: Those that keep the events of a response, and give the rest of it while the tool still runs.
WITH_EVENT_STORE = [("python", "--event-store"), ("python1", "--event-store"), ("typescript", "--event-store")]


def version_of(peer):
    """The newest protocol version with sessions that *peer* speaks."""
    return peer[2] if "--protocol-version" in peer else "2025-11-25"


def echo(peer, text):
    """Name and arguments of a call that gives *text* back."""
    return "echo", {"message" if peer[0] == "everything" else "text": text}


def slow(peer, steps, seconds):
    """Name and arguments of a call that takes *steps* steps of *seconds* each, with progress after each."""
    if peer[0] == "everything":
        return "trigger-long-running-operation", {"duration": steps * seconds, "steps": steps}
    return "slow", {"steps": steps, "seconds": seconds}


def text_of(result):
    """The text of a result, without what server-everything puts before an echo."""
    return result.content[0].text.removeprefix("Echo: ")


def is_call(exchange):
    return exchange.rpc_method == "tools/call"


def is_cancellation(exchange):
    return exchange.rpc_method == "notifications/cancelled"


async def eventually(predicate, timeout_seconds=10, what="the condition"):
    """Wait until *predicate* gives something true, and return that.

    Raises:
        TimeoutError: It did not in time.
    """
    deadline = time.monotonic() + timeout_seconds
    while not (value := predicate()):
        if time.monotonic() > deadline:
            raise TimeoutError(f"waited {timeout_seconds} s for {what}")
        await anyio.sleep(0.01)
    return value


async def seen(recorder, predicate):
    """Wait until *recorder* has an exchange that satisfies *predicate*, and return the first."""
    return await eventually(
        lambda: next((exchange for exchange in recorder.exchanges if predicate(exchange)), None),
        what=f"an exchange; there were {recorder.methods()}",
    )


async def delete_behind_its_back(recorder, session_id):
    """End a session as somebody else would, and forget that this was asked."""
    async with httpx2.AsyncClient() as client:
        response = await client.delete(recorder.url, headers={"mcp-session-id": session_id})
    assert response.is_success
    await eventually(lambda: recorder.exchanges[-1].ended, what="the end of the DELETE")
    recorder.clear()
