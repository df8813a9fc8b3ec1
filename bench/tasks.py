"""The steps of the measured chains; the workers find broker and results in the variables that Celery knows."""

import os
from functools import cache

from celery import Celery

from bench.raw import ARGUMENTS, RawSession
from mcp_celery import MCPTask

MCP_URL = os.environ["BENCH_MCP_URL"]

app = Celery("bench")
app.conf.mcp_servers = {"bench": {"url": MCP_URL}}


@app.task(name="bench.plain")
def plain():
    return 3


@app.task(name="bench.mcp", base=MCPTask, bind=True, mcp_server="bench")
def mcp(self):
    return self.mcp.call_tool("add", ARGUMENTS).structured_content["result"]


@app.task(name="bench.durable", base=MCPTask, bind=True, mcp_server="bench", mcp_durable=True, acks_late=True)
def durable(self):
    return self.mcp.call_tool("add", ARGUMENTS).structured_content["result"]


@app.task(name="bench.raw")
def raw(session_id):
    return raw_session(session_id).call()["structuredContent"]["result"]


@cache
def raw_session(session_id):
    return RawSession(MCP_URL, session_id)
