"""What importing the package costs a process that only publishes."""

import subprocess
import sys

PUBLISH = """
import sys
from celery import Celery, chain
from mcp_celery import MCPTask, SessionHandle, signals, tool

app = Celery("publisher", broker="memory://")

@app.task(base=MCPTask, bind=True, mcp_server="somewhere")
def step(self, x):
    pass

handle = SessionHandle.load(SessionHandle("somewhere", "id", {"protocolVersion": "2025-11-25"}).dumps())
signals.call_finished.connect(lambda **_: None, weak=False)
chain(step.s(1, mcp_session=handle), step.s(), tool("somewhere", "x", y=1)).apply_async()
heavy = {"mcp", "mcp_types", "httpx2", "anyio", "pydantic", "agents"} & set(sys.modules)
threads = __import__("threading").active_count()
print(sorted(heavy), threads)
"""


def test_publishing_tasks_loads_no_mcp_no_http_client_and_starts_no_thread():
    run = subprocess.run([sys.executable, "-W", "error", "-c", PUBLISH], capture_output=True, text=True, check=False)
    assert (run.stdout.strip(), run.stderr) == ("[] 1", "")
