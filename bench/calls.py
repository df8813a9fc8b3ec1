"""One tool call, in each of the ways to make one: time, HTTP requests and TCP connections."""

import asyncio
import random
from collections.abc import Callable
from dataclasses import dataclass, field
from statistics import median
from time import perf_counter

import httpx2
from agents.mcp import MCPServerStreamableHttp
from mcp import Client

from bench.raw import ARGUMENTS, PROTOCOL_VERSION, RawSession
from mcp_celery import SessionHandle
from mcp_celery.settings import server_settings
from mcp_celery.sync_session import new_session

#: Measured calls in a block; one more before them warms up what other contenders have cooled down. Short, so that no
#: connection is idle for the 4 s after which clients drop it.
BLOCK = 5
WARM_UP_BLOCKS = 2
RAW, RAW_ASYNC, STEADY, STEP, SDK, AGENTS, SDK_STATELESS, AGENTS_STATELESS = (
    "raw POST in a session, httpx2.Client",
    "raw POST in a session, httpx2.AsyncClient",
    "mcp_celery, resumed: a further call",
    "mcp_celery, resumed: a whole step of one call",
    "mcp SDK, a fresh session",
    "openai-agents, a fresh session",
    "mcp SDK, afresh without session",
    "openai-agents, afresh without session",
)


@dataclass
class Contender:
    """A way to make one tool call."""

    name: str
    call: Callable[[], object]
    calls: int = 0
    seconds: list[float] = field(default_factory=list)
    requests: int = 0
    connections: int = 0


class Counts:
    """What the server has counted so far."""

    def __init__(self, url: str) -> None:
        self._url = httpx2.URL(url).join("/counts")
        self._client = httpx2.Client()

    def read(self) -> dict[str, int]:
        return self._client.get(self._url).json()


def open_session(url: str) -> SessionHandle:
    session = new_session(server_settings({}, url))
    session.call_tool("add", ARGUMENTS)
    return session.detach()


def contenders(url: str, handle: SessionHandle, run: Callable[..., object]) -> list[Contender]:
    """Return the ways to call. *run* is the `run` of an `asyncio.Runner`, so that none pays for an event loop."""
    settings = server_settings({}, url)
    steady = new_session(settings, handle)
    raw = RawSession(url, handle.session_id)
    message = handle.to_json()

    def step() -> None:
        session = new_session(settings, SessionHandle.load(message))
        session.call_tool("add", ARGUMENTS)
        session.release()

    # Both prefer the stateless protocol where the server has it, which keeps nothing from one step to the next.
    with_sessions = str(httpx2.URL(url).join("/sessions"))

    async def sdk(url: str, **options: str) -> None:
        async with Client(url, **options) as client:
            await client.call_tool("add", ARGUMENTS)

    async def agents(url: str) -> None:
        async with MCPServerStreamableHttp({"url": url}) as server:
            await server.call_tool("add", ARGUMENTS)

    assert handle.protocol_version == PROTOCOL_VERSION
    return [
        Contender(RAW, raw.call),
        Contender(RAW_ASYNC, lambda: run(raw.acall())),
        Contender(STEADY, lambda: steady.call_tool("add", ARGUMENTS)),
        Contender(STEP, step),
        Contender(SDK, lambda: run(sdk(with_sessions, mode="legacy"))),
        Contender(AGENTS, lambda: run(agents(with_sessions))),
        Contender(SDK_STATELESS, lambda: run(sdk(url))),
        Contender(AGENTS_STATELESS, lambda: run(agents(url))),
    ]


def measure(url: str, handle: SessionHandle, calls: int) -> list[dict[str, object]]:
    """Measure at least *calls* of each, in blocks and in turn, so that noise of the machine hits all alike."""
    counts, order = Counts(url), random.Random(0)  # noqa: S311 - an order, no secret
    with asyncio.Runner() as runner:
        all_of_them = contenders(url, handle, runner.run)
        for contender in all_of_them * WARM_UP_BLOCKS:
            measure_block(contender, counts)
        for contender in all_of_them:
            contender.calls = contender.requests = contender.connections = 0
            contender.seconds.clear()
        for _ in range(-(-calls // BLOCK)):
            for contender in order.sample(all_of_them, len(all_of_them)):
                measure_block(contender, counts)
    floor = median(all_of_them[0].seconds)
    return [
        {
            "name": contender.name,
            "calls": len(contender.seconds),
            "median_ms": median(contender.seconds) * 1000,
            "times_raw": median(contender.seconds) / floor,
            "requests": contender.requests / contender.calls,
            "connections": contender.connections / contender.calls,
        }
        for contender in all_of_them
    ]


def measure_block(contender: Contender, counts: Counts) -> None:
    before = counts.read()
    contender.call()
    for _ in range(BLOCK):
        begun = perf_counter()
        contender.call()
        contender.seconds.append(perf_counter() - begun)
    after = counts.read()
    contender.calls += 1 + BLOCK
    contender.requests += after["requests"] - before["requests"]
    contender.connections += after["connections"] - before["connections"]
