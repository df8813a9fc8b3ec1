"""The resumable transport for FastMCP's client, and with it for pydantic-ai, whose toolsets take such a transport.

    async with fastmcp.Client(Resumable(resumable_http(url))) as client: ...
    agent = pydantic_ai.Agent(..., toolsets=[MCPToolset(Resumable(resume(handle)))])

`resumable_http` and `resume` give transports of the MCP SDK, which are entered once.
"""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Unpack

from fastmcp.client.transports import ClientTransport
from fastmcp.client.transports.base import SessionKwargs, TransportOptions
from mcp import ClientSession

from mcp_celery.transport import ResumableHTTPTransport


class Resumable(ClientTransport):
    def __init__(self, transport: ResumableHTTPTransport) -> None:
        self.transport = transport

    @asynccontextmanager
    async def connect_session(
        self, *, transport_options: TransportOptions | None = None, **session_kwargs: Unpack[SessionKwargs]
    ) -> AsyncIterator[ClientSession]:
        session_class = (transport_options or TransportOptions()).session_class
        async with self.transport as streams, session_class(*streams, **session_kwargs) as session:
            yield session

    def get_session_id(self) -> str | None:
        return self.transport.session_id
