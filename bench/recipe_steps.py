"""One process of the recipe: `python -m bench.recipe_steps leave|return CLIENT URL [WHAT WAS LEFT]`.

`leave` opens a session, uses it and prints what it leaves for the other process; `return` comes back with that and
prints what a tool of the session says.
"""

import asyncio
import sys
from typing import Any

import httpx2
from mcp import Client, ClientSession
from mcp.client.streamable_http import streamable_http_client

from mcp_celery.transport import resumable_http, resume

AGENTS, AGENTS_KEPT, SDK, OURS = "agents", "agents-kept", "sdk", "ours"
HEADER = "Mcp-Session-Id"


async def use(client: Any, step: str) -> None:
    """Use what the server keeps for a session, where it keeps something."""
    names = {tool.name for tool in await tools_of(client)}
    if "set_variable" not in names:
        tool, arguments = "echo", {"message": "red"}
    elif step == "leave":
        tool, arguments = "set_variable", {"name": "colour", "value": "red"}
    else:
        tool, arguments = "get_variable", {"name": "colour"}
    result = await client.call_tool(tool, arguments)
    if step == "return":
        print(result.content[0].text)


async def tools_of(client: Any) -> list[Any]:
    listed = await client.list_tools()
    return listed if isinstance(listed, list) else listed.tools


async def agents(step: str, url: str, left: str | None, **params: Any) -> None:
    """As the documentation of `MCPServerStreamableHttp.session_id` has it; *params* is what it does not say."""
    from agents.mcp import MCPServerStreamableHttp  # noqa: PLC0415 - it takes a second, which is not of the others

    headers = {} if left is None else {"headers": {HEADER: left}}
    async with MCPServerStreamableHttp({"url": url, **headers, **params}) as server:
        await use(server, step)
        if left is None:
            print(server.session_id)


async def sdk(step: str, url: str, left: str | None) -> None:
    """The same with the SDK's own transport, which has no session ID: it is read off the responses."""
    seen: list[str] = []

    async def note(response: httpx2.Response) -> None:
        seen.extend(response.headers.get_list(HEADER))

    headers = {} if left is None else {HEADER: left}
    async with (
        httpx2.AsyncClient(headers=headers, timeout=30, event_hooks={"response": [note]}) as http,
        streamable_http_client(url, http_client=http, terminate_on_close=False) as streams,
        ClientSession(*streams) as session,
    ):
        await session.initialize()
        await use(session, step)
    if left is None:
        print(seen[0] if seen else None)


async def ours(_step: str, url: str, left: str | None) -> None:
    transport = resumable_http(url) if left is None else resume(left)
    async with Client(transport) as client:
        await use(client, _step)
        if left is None:
            print(transport.detach().dumps())


def main() -> None:
    step, client, url, *left = sys.argv[1:]
    clients = {
        AGENTS: agents,
        AGENTS_KEPT: lambda *arguments: agents(*arguments, terminate_on_close=False),
        SDK: sdk,
        OURS: ours,
    }
    asyncio.run(clients[client](step, url, left[0] if left else None))


if __name__ == "__main__":
    main()
