"""An app whose sessions do not live long. Everything that differs comes from the environment."""

import atexit
import json
import os
import sys
import threading
import time
from functools import partial

from celery import Celery
from celery.signals import worker_init

from mcp_celery import MCPTask

app = Celery("reaped", broker=os.environ["BROKER"], backend=os.environ["BROKER"])
app.conf.update(
    mcp_servers={
        "peer": {
            "url": os.environ["PEER"],
            "headers": {"X-Key": "t0ken"},
            "keepalive_seconds": float(os.environ.get("KEEPALIVE", "0")),
        }
    },
    mcp_reaper_interval_seconds=0.2,
    worker_prefetch_multiplier=1,
    broker_connection_retry_on_startup=True,
    broker_transport_options={"socket_keepalive": True},
)
app.conf.update(json.loads(os.environ.get("CONF", "{}")))


@worker_init.connect
def show_threads_at_the_end(**_):
    """Have the worker's main process say which threads are left when it ends, after all of Celery's own endings."""

    def show():
        names = [thread.name for thread in threading.enumerate()]
        print("threads left:", *names, sep="\n\t", file=sys.__stdout__)

    atexit.register(show)


# Each test imports this module anew, and shared tasks would meet their namesakes.
task = partial(app.task, shared=False, bind=True, base=MCPTask, mcp_server="peer")


@task()
def remember(self, value):
    """Open a session, and set a variable of it."""
    self.mcp.call_tool("set_variable", {"name": "x", "value": value})


@task()
def recall(self, _):
    """Read the variable."""
    return self.mcp.call_tool("get_variable", {"name": "x"}).content[0].text


@task()
def works(self, seconds):
    """Set the variable, do without the server for some time, then read the variable."""
    self.mcp.call_tool("set_variable", {"name": "x", "value": "kept"})
    time.sleep(seconds)
    return self.mcp.call_tool("get_variable", {"name": "x"}).content[0].text


@task()
def echo(self, text):
    return self.mcp.call_tool("echo", {"text": text}).content[0].text


@app.task(shared=False)
def plain(value):
    return [value, os.getpid()]
