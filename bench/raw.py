"""The floor: a tool call as a plain POST, on a connection and in a session that exist already."""

import json
from itertools import count
from typing import Any

import httpx2

PROTOCOL_VERSION = "2025-11-25"
ARGUMENTS = {"a": 1, "b": 2}


class RawSession:
    """Calls the tool `add` of the server at *url* with nothing but an HTTP client."""

    def __init__(self, url: str, session_id: str) -> None:
        headers = {
            "accept": "application/json, text/event-stream",
            "mcp-session-id": session_id,
            "mcp-protocol-version": PROTOCOL_VERSION,
        }
        self._client = httpx2.Client(headers=headers)
        self._async_client = httpx2.AsyncClient(headers=headers)
        self._url = url
        self._ids = count(1)

    def call(self) -> dict[str, Any]:
        request = self._new_request()
        return result_of(request, self._client.post(self._url, json=request))

    async def acall(self) -> dict[str, Any]:
        request = self._new_request()
        return result_of(request, await self._async_client.post(self._url, json=request))

    def _new_request(self) -> dict[str, Any]:
        params = {"name": "add", "arguments": ARGUMENTS}
        return {"jsonrpc": "2.0", "id": f"raw-{next(self._ids)}", "method": "tools/call", "params": params}


def result_of(request: dict[str, Any], response: httpx2.Response) -> dict[str, Any]:
    """Find the answer to *request* in the event stream, which was read to its end."""
    events = (line.removeprefix("data: ") for line in response.text.splitlines() if line.startswith("data: {"))
    return next(message["result"] for message in map(json.loads, events) if message.get("id") == request["id"])
