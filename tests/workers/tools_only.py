"""An app with no task of its own. What it imports for its workflows brings the task that they are made of."""

import os

from celery import Celery, chain

from mcp_celery import tool

app = Celery("tools_only", broker=os.environ["BROKER"], backend=os.environ["BROKER"])
app.conf.update(
    mcp_servers={"peer": {"url": os.environ["PEER"]}} if "PEER" in os.environ else {},
    mcp_history_seconds=0,
    broker_connection_retry_on_startup=True,
)


def workflow():
    return chain(tool("peer", "set_variable", name="x", value="1"), tool("peer", "get_variable", name="x"))


if __name__ == "__main__":
    print(workflow()().get(timeout=60))
