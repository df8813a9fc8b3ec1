"""Calls of tools, checked by the schemas that their server lists."""

import logging
from collections.abc import Mapping
from typing import Literal

import anyio
import mcp_types as types
from mcp import Client, MCPError
from pydantic import ValidationError

from .exceptions import ConfigurationError, ToolError
from .listings import ToolListings, problem_with_arguments

logger = logging.getLogger(__name__)

#: How long a listing may take that only serves to check a call.
LISTING_SECONDS = 10.0
#: Pages of a tool listing that are read in search of one tool.
MAX_PAGES = 100


class ToolChecks:
    """Checks calls of the tools of one server, by what the process knows of them.

    Nothing is said against a call by an old listing, and a result in hand is not lost by a listing that fails.
    """

    def __init__(self, server: str, listings: ToolListings) -> None:
        self._server = server
        self._listings = listings

    async def arguments(self, client: Client, tool: str, arguments: Mapping[str, object]) -> None:
        """Check the names of arguments by the tool's input schema.

        Where the tools cannot be listed, the server is left to judge.

        Raises:
            ConfigurationError: There is no such tool, or it takes other arguments.
        """
        if problem_with_arguments(self._listings.entries(), tool, arguments) is None:
            return
        listed = await self._list_anew(client, tool)
        if listed is None:
            return
        entries = [{"name": found.name, "inputSchema": found.input_schema} for found in listed]
        if (problem := problem_with_arguments(entries, tool, arguments)) is not None:
            raise ConfigurationError(f"MCP server {self._server!r}: {problem}")

    async def output(self, client: Client, tool: str, result: types.CallToolResult) -> None:
        """Check a result by the tool's output schema.

        Raises:
            ToolError: It does not fit.
        """
        is_fresh = self._listings.lacks(tool)
        if is_fresh:
            await self._list_anew(client, tool)
        problem = self._listings.problem_with(tool, result.structured_content)
        if problem is not None and not is_fresh:
            await self._list_anew(client, tool)
            problem = self._listings.problem_with(tool, result.structured_content)
        if problem is not None:
            raise ToolError(f"Tool {tool!r} has run, but {problem}", tool, result.structured_content)

    async def _list_anew(self, client: Client, tool: str) -> list[types.Tool] | None:
        """Return what `tools_until` does; None as well where the server does not list its tools, or not in time."""
        self._listings.forget_pages()
        listed = None
        try:
            with anyio.move_on_after(LISTING_SECONDS):
                listed = await tools_until(client, tool, cache_mode="refresh")
        except (MCPError, ValidationError) as exc:
            logger.debug("The tools of a server could not be listed (%s): a call goes unchecked", type(exc).__name__)
        self._listings.note_if_unlisted(tool)
        return listed


async def tools_until(
    client: Client, name: str, *, cache_mode: Literal["use", "refresh"] = "use"
) -> list[types.Tool] | None:
    """List the tools of a server, page by page, to the page that has the tool *name*, or to the end.

    None where neither came within `MAX_PAGES`.
    """
    listed: list[types.Tool] = []
    cursor: str | None = None
    for _ in range(MAX_PAGES):
        page = await client.list_tools(cursor=cursor, cache_mode=cache_mode)
        listed += page.tools
        cursor = page.next_cursor
        if cursor is None or any(tool.name == name for tool in page.tools):
            return listed
    return None
