"""The app that the workers of these tests run; its broker and backend come from `CELERY_*`, as Celery reads them."""

import os
from functools import partial

from broker_settings import CONTROL_QUEUE_STAYS_FREE, LOOKS_SOON
from celery import Celery

# Once in a worker, not in each of its processes.
import mcp_celery.session  # noqa: F401
from mcp_celery import MCPTask, journal

IS_AMQP = os.environ["CELERY_BROKER_URL"].startswith("amqp")
REDIS = {
    "socket_timeout": 5,
    "socket_connect_timeout": 5,
    "health_check_interval": 2,
    **LOOKS_SOON,
}

app = Celery("hosted_steps")
app.conf.update(
    mcp_servers={"server": {"url": os.environ["SERVER"], "read_timeout_seconds": 20}},
    mcp_store_url=os.environ.get("STORE"),
    mcp_durable="DURABLE" in os.environ,
    mcp_reaper_interval_seconds=0.5,
    task_acks_late=True,
    task_reject_on_worker_lost=True,
    worker_prefetch_multiplier=1,
    broker_connection_retry_on_startup=True,
    # How soon a lost connection is seen.
    broker_heartbeat=2,
    broker_connection_timeout=5,
    **(CONTROL_QUEUE_STAYS_FREE if IS_AMQP else {}),
    broker_transport_options={} if IS_AMQP else {**REDIS, "visibility_timeout": float(os.environ["VISIBILITY"])},
    redis_socket_timeout=5,
)
journal.LEASE_SECONDS = float(os.environ["LEASE"])


class Step(MCPTask):
    mcp_server = "server"


step = partial(app.task, base=Step, bind=True)


def row(task, value=None):
    """What a step tells of itself."""
    return {"worker": task.request.hostname, "session": task.mcp.handle.short_id, "value": value}


@step()
def remember(self, value):
    """Set the variable of the session."""
    self.mcp.call_tool("set_variable", {"name": "x", "value": value})
    return [row(self, value)]


@step()
def recall(self, rows):
    """Read it."""
    return [*rows, row(self, self.mcp.call_tool("get_variable", {"name": "x"}).content[0].text)]


@step()
def hold(self, rows, marker):
    """Call a tool that ends when the test says so, and must not be executed twice."""
    self.mcp.call_tool("mark", {"marker": f"before {marker}"})
    held = self.mcp.call_tool("hold", {"marker": marker}).content[0].text
    return [*rows, row(self, held)]


@step()
def mark(self, rows, marker):
    """Call a tool that must not be executed twice."""
    return [*rows, row(self, self.mcp.call_tool("mark", {"marker": marker}).content[0].text)]
