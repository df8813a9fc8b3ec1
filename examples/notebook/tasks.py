"""Five steps of one workflow, and a task that outlives its worker.

The numbers that they work on stay in the notebook server, in one session.
"""

import os

from celery import Celery, Task

from mcp_celery import MCPTask

BROKER_URL = os.environ.get("CELERY_BROKER_URL", "redis://localhost:6379/0")
NOTEBOOK_URL = os.environ.get("NOTEBOOK_URL", "http://127.0.0.1:8000/mcp")

app = Celery("notebook", broker=BROKER_URL, backend=os.environ.get("CELERY_RESULT_BACKEND", BROKER_URL))
app.conf.mcp_servers = {"notebook": {"url": NOTEBOOK_URL}}
app.conf.broker_transport_options = {
    # A message that a killed worker has taken comes back after so long. Seconds, since this is for looking on.
    "visibility_timeout": 10,
    # How often workers look for such messages: each second, and each time.
    "unacked_restore_interval": 1,
    "unacked_restore_throttle": 1,
    # A worker that is killed while it looks keeps the others from it for so long.
    "unacked_mutex_expire": 5,
}


class NotebookTask(MCPTask):
    mcp_server = "notebook"


@app.task(base=NotebookTask, bind=True)
def load(self, principal, rate):
    self.mcp.call_tool("assign", {"name": "principal", "expression": str(principal)})
    self.mcp.call_tool("assign", {"name": "rate", "expression": str(rate)})
    return {"rows": [row(self)]}


@app.task(base=NotebookTask, bind=True)
def transform(self, state):
    self.mcp.call_tool("assign", {"name": "balance", "expression": "principal"})
    self.mcp.call_tool("assign", {"name": "factor", "expression": "1 + rate"})
    return state | {"rows": [*state["rows"], row(self)]}


@app.task(bind=True)
def plan(self, state, years):
    """Choose how long to simulate: a plain Celery task, which the session passes over."""
    return state | {"rows": [*state["rows"], row(self)], "years": years}


@app.task(base=NotebookTask, bind=True)
def simulate(self, state):
    years = {"name": "balance", "expression": "balance * factor", "steps": state["years"], "seconds": 1}
    self.mcp.call_tool("simulate", years)
    return state | {"rows": [*state["rows"], row(self)]}


@app.task(base=NotebookTask, bind=True)
def report(self, state):
    interest = self.mcp.call_tool("evaluate", {"expression": "balance - principal"})
    return state | {"rows": [*state["rows"], row(self)], "interest": interest.structured_content["result"]}


@app.task(base=NotebookTask, bind=True, mcp_durable=True, acks_late=True, reject_on_worker_lost=True)
def forecast(self, principal, rate, years, seconds):
    """Simulate all years in one call of *seconds*. Who takes the task over from a killed worker goes on with it."""
    heard = []

    def on_progress(year, _total, _message):
        heard.append(round(year))
        self.update_state(state="PROGRESS", meta=row(self) | {"heard": [heard[0], heard[-1]]})

    self.mcp.call_tool("assign", {"name": "balance", "expression": str(principal)})
    growth = {"name": "balance", "expression": f"balance * {1 + rate}", "steps": years, "seconds": seconds}
    balance = self.mcp.call_tool("simulate", growth, on_progress=on_progress)
    return row(self) | {"heard": [heard[0], heard[-1]], "balance": balance.structured_content["result"]}


def row(task: Task) -> dict:
    """Say where *task* runs and what it has done with the session so far."""
    where = {"task": task.name.rpartition(".")[2], "worker": task.request.hostname, "pid": os.getpid()}
    if not isinstance(task, MCPTask):
        return where
    how = "resumed" if task.mcp.resumed else "opened"
    return where | {"session": task.mcp.handle.short_id, "how": how, "requests": task.mcp.requests_sent}
