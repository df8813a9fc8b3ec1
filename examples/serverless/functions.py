"""One MCP session over two invocations of a serverless function, without Celery.

`begin` opens a session and returns its handle, which the caller keeps: in a database, a queue, a signed cookie.
`finish` continues the session wherever it runs, and ends it. Each command is an invocation, in a process of its own:

    python -m examples.notebook.server &
    python -m examples.serverless.functions begin http://127.0.0.1:8000/mcp > handle
    python -m examples.serverless.functions finish < handle

(The server takes a second to start.) Whoever has a handle can use the session, so it is in no command line.
"""

import asyncio
import sys

from mcp import Client

from mcp_celery.transport import resumable_http, resume


async def begin(url: str) -> str:
    transport = resumable_http(url)
    async with Client(transport) as client:
        await client.call_tool("assign", {"name": "principal", "expression": "1000"})
        return transport.detach().dumps()


async def finish(handle: str) -> str:
    transport = resume(handle)
    async with Client(transport) as client:
        result = await client.call_tool("evaluate", {"expression": "principal * 1.05"})
        await transport.terminate()
        return result.content[0].text


if __name__ == "__main__":
    match sys.argv[1:]:
        case ["begin", url]:
            print(asyncio.run(begin(url)))
        case ["finish"]:
            print(asyncio.run(finish(sys.stdin.read())))
        case _:
            sys.exit("begin URL, or finish < HANDLE")
