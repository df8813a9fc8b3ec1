"""Frameworks that take a session or a transport of the MCP SDK open a session, leave it, and continue it.

They are imported inside the tests, since that takes seconds. langchain-mcp-adapters is not among them: up to 0.3.1 it
cannot be imported beside mcp 2, and 0.3.2 requires mcp 1.
"""

import pytest

from mcp_celery.transport import resumable_http, resume

pytestmark = pytest.mark.anyio

RED = {"name": "colour", "value": "red"}
NAME = {"name": "colour"}


async def test_a_client_of_fastmcp_continues_a_session(recorded_peer):
    import fastmcp

    from examples.frameworks import Resumable

    recorder = recorded_peer("typescript")
    transport = resumable_http(recorder.url)
    async with fastmcp.Client(Resumable(transport)) as client:
        await client.call_tool("set_variable", RED)
        handle = transport.detach()
    recorder.clear()
    async with fastmcp.Client(Resumable(resume(handle))) as client:
        result = await client.call_tool("get_variable", NAME)
        assert result.content[0].text == "red"
    assert recorder.methods() == ["POST tools/call", "POST tools/list"]


def agent_that_calls(tool, arguments, transport):
    """An agent whose model calls *tool*, then says what that returned."""
    from pydantic_ai import Agent
    from pydantic_ai.mcp import MCPToolset
    from pydantic_ai.messages import ModelResponse, TextPart, ToolCallPart, ToolReturnPart
    from pydantic_ai.models.function import FunctionModel

    from examples.frameworks import Resumable

    def respond(messages, _info):
        returned = [part.content for part in messages[-1].parts if isinstance(part, ToolReturnPart)]
        return ModelResponse([TextPart(str(returned[0])) if returned else ToolCallPart(tool, arguments)])

    return Agent(FunctionModel(respond), toolsets=[MCPToolset(Resumable(transport))])


async def test_an_agent_of_pydantic_ai_continues_a_session(recorded_peer):
    recorder = recorded_peer("typescript")
    transport = resumable_http(recorder.url)
    async with agent_that_calls("set_variable", RED, transport) as agent:
        await agent.run("Remember a colour")
        handle = transport.detach()
    recorder.clear()
    async with agent_that_calls("get_variable", NAME, resume(handle)) as agent:
        result = await agent.run("Which colour?")
    assert result.output == "red"
    assert recorder.methods().count("POST tools/call") == 1
    assert "POST initialize" not in recorder.methods()
    assert "DELETE" not in recorder.methods()
    assert {exchange.session_id for exchange in recorder.exchanges} == {handle.session_id}
