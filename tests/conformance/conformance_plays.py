"""What a client on our transport does in each scenario of the conformance suite, in two halves.

Fresh, one client plays both. Resumed, one process opens the session and plays the first half, and another continues
the session for the second.
"""

import os
from collections.abc import Awaitable, Callable
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import anyio
from mcp import Client
from mcp.shared.message import ClientMessageMetadata
from mcp_types import CallToolRequest, CallToolRequestParams, CallToolResult, ElicitResult
from pydantic import ValidationError

from mcp_celery.transport import ResumableHTTPTransport, resumable_http, resume

STATELESS = "2026-07-28"
PLAY_SECONDS = 40
#: How long the server of `sse-retry` tells clients to wait; a resumption token does not carry that.
RETRY_SECONDS = 0.5


@dataclass(frozen=True)
class Assignment:
    """One run of one scenario, as the suite and the test have set it."""

    scenario: str
    version: str
    url: str
    context: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Scene:
    """What a half of a play has."""

    client: Client
    context: dict[str, Any]
    #: What the first half left for the second.
    token: str | None
    hand_over: Callable[[str | None], None]


Half = Callable[[Scene], Awaitable[object]]


async def connect_only(_):
    """Leave the rest to the second half."""


async def list_tools(scene):
    return (await scene.client.list_tools()).tools


async def list_all(scene):
    await scene.client.list_tools()
    await scene.client.list_resources()
    await scene.client.list_prompts()


async def use_one_of_each(scene):
    tools = await list_tools(scene)
    resources = (await scene.client.list_resources()).resources
    prompts = (await scene.client.list_prompts()).prompts
    await scene.client.call_tool(tools[0].name)
    await scene.client.read_resource(resources[0].uri)
    await scene.client.get_prompt(prompts[0].name)


def call(*names, **arguments):
    async def half(scene):
        await list_tools(scene)
        for name in names:
            await scene.client.call_tool(name, arguments)

    return half


async def call_without_result_type(scene):
    await call("test_mrtr_no_state", "test_mrtr_unrelated")(scene)
    # The SDK's session takes no result without a type, on any transport. The scenario asks whether it calls again.
    with suppress(ValidationError):
        await scene.client.call_tool("test_mrtr_no_result_type")


async def call_all(scene):
    for tool in await list_tools(scene):
        await scene.client.call_tool(tool.name, {})


async def call_as_told(scene):
    await list_tools(scene)
    for told in scene.context["toolCalls"]:
        await scene.client.call_tool(told["name"], told["arguments"])


async def give_a_schema_back(scene):
    schemas = {tool.name: tool.input_schema for tool in await list_tools(scene)}
    await scene.client.call_tool("json_schema_echo", {"schema": schemas["json_schema_2020_12_tool"]})


async def reconnect(scene, metadata=None):
    request = CallToolRequest(params=CallToolRequestParams(name="test_reconnection", arguments={}))
    result = await scene.client.session.send_request(request, CallToolResult, metadata=metadata)
    assert result.content[0].text == "Reconnection test completed successfully"


async def begin_a_call_and_die(scene):
    async def die(token):
        scene.hand_over(token)
        os._exit(0)

    await reconnect(scene, ClientMessageMetadata(on_resumption_token_update=die))


async def finish_the_call(scene):
    await anyio.sleep(RETRY_SECONDS + 0.1)
    await reconnect(scene, ClientMessageMetadata(resumption_token=scene.token))


#: The halves of each play.
FRESH: dict[str, tuple[Half, Half]] = {
    "initialize": (connect_only, list_tools),
    "tools_call": (list_tools, call("add_numbers", a=5, b=3)),
    "elicitation-sep1034-client-defaults": (list_tools, call("test_client_elicitation_defaults")),
    "sse-retry": (list_tools, reconnect),
    "request-metadata": (connect_only, list_tools),
    "sep-2322-client-request-state": (
        call("test_mrtr_echo_state", "test_mrtr_unrelated"),
        call_without_result_type,
    ),
    "http-standard-headers": (list_all, use_one_of_each),
    "http-custom-headers": (list_tools, call_as_told),
    "http-invalid-tool-headers": (list_tools, call_all),
    "json-schema-ref-no-deref": (connect_only, list_tools),
    "json-schema-2020-12-preservation": (list_tools, give_a_schema_back),
}
RESUMED = FRESH | {"sse-retry": (begin_a_call_and_die, finish_the_call)}
#: Where the server asks outside of a response. (The one of `sse-retry` gives its answer to whatever GET comes first.)
LISTENING = {"elicitation-sep1034-client-defaults"}


async def accept_defaults(_, params):
    """Fill the form of a server with its defaults, and say yes where it has none."""
    fields = params.requested_schema["properties"]
    return ElicitResult(action="accept", content={name: spec.get("default", True) for name, spec in fields.items()})


async def play(
    assignment: Assignment,
    transport: ResumableHTTPTransport,
    halves: tuple[Half, ...],
    *,
    token: str | None = None,
    hand_over: Callable[[str, str | None], None] = lambda *_: None,
) -> None:
    """Play *halves* with one client on *transport*, then say what another process needs."""
    with anyio.fail_after(PLAY_SECONDS):
        async with Client(transport, elicitation_callback=accept_defaults) as client:
            leave = lambda token: hand_over(transport.detach().dumps(), token)  # noqa: E731
            scene = Scene(client, assignment.context, token, leave)
            for half in halves:
                await half(scene)
            leave(None)


def open_session(assignment: Assignment) -> ResumableHTTPTransport:
    return resumable_http(
        assignment.url,
        listen=assignment.scenario in LISTENING,
        prefer_stateless=assignment.version == STATELESS,
    )


def play_fresh(assignment: Assignment) -> None:
    anyio.run(partial(play, assignment, open_session(assignment), FRESH[assignment.scenario]))


def play_after_a_handshake(assignment: Assignment) -> None:
    """Begin as for a session, also where the server has none."""
    transport = resumable_http(assignment.url)
    anyio.run(partial(play, assignment, transport, FRESH[assignment.scenario]))
    assert assignment.version != STATELESS or transport.session_id is None


def play_first_half(assignment: Assignment, hand_over: Callable[[str, str | None], None]) -> None:
    """Open the session and leave it; *hand_over* gets the handle and a resumption token, if there is one."""
    halves = RESUMED[assignment.scenario][:1]
    anyio.run(partial(play, assignment, open_session(assignment), halves, hand_over=hand_over))


def play_second_half(assignment: Assignment, handle: str, token: str | None) -> None:
    transport = resume(handle, listen=assignment.scenario in LISTENING)
    anyio.run(partial(play, assignment, transport, RESUMED[assignment.scenario][1:], token=token))
