"""An app whose workers do not have all of its tasks: `OPENS` and `READS` say which ones this process has."""

import os

from celery import Celery

from mcp_celery import MCPTask

app = Celery("apart", broker=os.environ["BROKER"], backend=os.environ["BROKER"])
app.conf.update(
    mcp_servers={"peer": {"url": os.environ["PEER"]}},
    mcp_history_seconds=0,
    broker_connection_retry_on_startup=True,
)


class PeerTask(MCPTask):
    mcp_server = "peer"


if os.environ["HAS"] == "opens":

    @app.task(base=PeerTask, bind=True, name="apart.opens", shared=False)
    def opens(self, value):
        self.mcp.call_tool("set_variable", {"name": "x", "value": value})


if os.environ["HAS"] == "reads":

    @app.task(base=PeerTask, bind=True, name="apart.reads", shared=False)
    def reads(self):
        return self.mcp.call_tool("get_variable", {"name": "x"}).content[0].text
