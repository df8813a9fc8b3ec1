"""Five steps of one workflow; the numbers that they work on stay in the notebook server, in one session."""

import os

from celery import Celery, Task

from mcp_celery import MCPTask

BROKER_URL = os.environ.get("CELERY_BROKER_URL", "redis://localhost:6379/0")
NOTEBOOK_URL = os.environ.get("NOTEBOOK_URL", "http://127.0.0.1:8000/mcp")

app = Celery("notebook", broker=BROKER_URL, backend=os.environ.get("CELERY_RESULT_BACKEND", BROKER_URL))
app.conf.mcp_servers = {"notebook": {"url": NOTEBOOK_URL}}


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


def row(task: Task) -> dict:
    """Say where *task* runs and what it has done with the session so far."""
    where = {"task": task.name.rpartition(".")[2], "worker": task.request.hostname, "pid": os.getpid()}
    if not isinstance(task, MCPTask):
        return where
    how = "resumed" if task.mcp.resumed else "opened"
    return where | {"session": task.mcp.handle.short_id, "how": how, "requests": task.mcp.requests_sent}
