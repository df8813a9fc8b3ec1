"""The app whose `celery` commands are tested. Everything that differs comes from the environment."""

import os

from celery import Celery

from mcp_celery import MCPTask

app = Celery("commanded", broker=os.environ["STORE"], backend=os.environ["STORE"])
app.conf.mcp_servers = {"peer": {"url": os.environ["PEER"]}}


@app.task(base=MCPTask, bind=True, mcp_server="peer")
def wait(self, steps):
    """Hold a session while a slow tool runs."""
    self.mcp.call_tool("slow", {"steps": steps, "seconds": 0.1})
