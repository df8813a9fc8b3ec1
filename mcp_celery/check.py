"""Whether an MCP server answers, and what it can do: `celery mcp servers --check`."""

import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass

import anyio
import mcp_types as types
from mcp import MCPError
from mcp_types.version import MODERN_PROTOCOL_VERSIONS

from .connections import Connections
from .exceptions import MCPCeleryError, TransportError
from .session import AsyncMCPSession
from .settings import ServerSettings
from .tool_checks import MAX_PAGES

#: How long the check of one server may take.
CHECK_SECONDS = 10.0
#: How long ending the session may take, which the check has opened.
CLOSE_SECONDS = 2.0
#: From this version on a server with an event store gives an event ID before it answers.
_FIRST_WITH_EARLY_IDS = "2025-11-25"


@dataclass(frozen=True, kw_only=True)
class Check:
    """What one server showed. Holds no secret; JSON types only."""

    server: str
    #: Why it cannot be used; None where it answered.
    error: str | None = None
    protocol_version: str | None = None
    #: "handshake" up to 2025-11-25, which has sessions, or "stateless".
    era: str | None = None
    #: Whether it gave a session ID.
    session: bool | None = None
    #: Whether it stores events, so that a response that breaks off is continued; None where that does not show.
    event_store: bool | None = None
    tools: int | None = None
    #: Of a ping, over a connection that is open.
    latency_seconds: float | None = None


async def check_all(servers: Sequence[ServerSettings]) -> list[Check]:
    """Connect to all of *servers* at once, and return what each showed, in their order."""
    checks: dict[int, Check] = {}
    connections = Connections()

    async def put(index: int, settings: ServerSettings) -> None:
        checks[index] = await check(settings, connections)

    try:
        async with anyio.create_task_group() as tasks:
            for index, settings in enumerate(servers):
                tasks.start_soon(put, index, settings)
    finally:
        await connections.aclose()
    return [checks[index] for index in range(len(servers))]


async def check(settings: ServerSettings, connections: Connections) -> Check:
    """Open a session, look, and end it, within `CHECK_SECONDS`. Raises nothing that a server can cause."""
    session = AsyncMCPSession(settings, connections)
    try:
        with anyio.fail_after(CHECK_SECONDS):
            return await _look(session)
    except TimeoutError:
        return Check(server=settings.name, error=f"did not answer within {CHECK_SECONDS:g} s")
    except (MCPCeleryError, MCPError) as exc:
        return Check(server=settings.name, error=str(exc))
    finally:
        with anyio.move_on_after(CLOSE_SECONDS, shield=True), suppress(TransportError):
            await session.close()


async def _look(session: AsyncMCPSession) -> Check:
    await session.open()
    version = session.protocol_version
    is_stateless = version in MODERN_PROTOCOL_VERSIONS
    latency_seconds, gives_event_ids = await _ping(session)
    # A server of an older version gives IDs too, but the first of them with the answer, where nobody looks.
    shows_event_store = gives_event_ids or is_stateless or (version or "") >= _FIRST_WITH_EARLY_IDS
    return Check(
        server=session.server,
        protocol_version=version,
        era="stateless" if is_stateless else "handshake",
        session=session.session_id is not None,
        event_store=gives_event_ids if shows_event_store else None,
        tools=await _count_tools(session),
        latency_seconds=latency_seconds,
    )


async def _ping(session: AsyncMCPSession) -> tuple[float, bool]:
    """Return the seconds until a ping was answered, and whether the response stream had event IDs."""
    event_ids: list[str] = []

    async def note(event_id: str) -> None:
        event_ids.append(event_id)

    began = time.perf_counter()
    try:
        await session.ping(on_event_id=note)
    except MCPError as exc:
        # The stateless era has no ping. The refusal takes as long.
        if exc.code != types.METHOD_NOT_FOUND:
            raise
    return time.perf_counter() - began, bool(event_ids)


async def _count_tools(session: AsyncMCPSession) -> int:
    """Count the tools on all pages; none where the server says that it has none."""
    capabilities = session.server_capabilities
    count, cursor = 0, None
    if capabilities is None or capabilities.tools is None:
        return count
    for _ in range(MAX_PAGES):
        page = await session.list_tools(cursor=cursor)
        count += len(page.tools)
        cursor = page.next_cursor
        if cursor is None:
            break
    return count
