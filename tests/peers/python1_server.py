"""A test server on the Python SDK 1.x: `python1_server.py PORT [options]`, on 127.0.0.1, run by its own interpreter."""

import argparse

import uvicorn
from mcp.server.fastmcp import FastMCP
from offer import Replay, offer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("port", type=int)
    parser.add_argument("--json", action="store_true", help="answer with JSON bodies, not event streams")
    parser.add_argument("--event-store", action="store_true", help="give events IDs and replay them")
    arguments = parser.parse_args()
    server = FastMCP(
        "python1",
        log_level="WARNING",
        json_response=arguments.json,
        event_store=Replay() if arguments.event_store else None,
    )
    offer(server)
    uvicorn.run(server.streamable_http_app(), host="127.0.0.1", port=arguments.port, log_level="warning")


if __name__ == "__main__":
    main()
