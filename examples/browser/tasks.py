"""Three steps in one browser: a page is opened, filled in and read, each on whatever worker."""

import json
import os
from urllib.parse import quote

from celery import Celery

from mcp_celery import MCPTask

BROKER_URL = os.environ.get("CELERY_BROKER_URL", "redis://localhost:6379/0")
BROWSER_URL = os.environ.get("BROWSER_URL", "http://localhost:8931/mcp")
#: A page with something to lose: what is typed into it is nowhere but in the browser.
PAGE = """
<title>Order</title>
<form onsubmit="event.preventDefault(); out.textContent = `${dish.value} for ${guest.value}`">
  <input id=dish> <input id=guest> <button>Order</button>
</form>
<p id=out></p>
"""

app = Celery("browser", broker=BROKER_URL, backend=os.environ.get("CELERY_RESULT_BACKEND", BROKER_URL))
app.conf.mcp_servers = {"browser": {"url": BROWSER_URL}}


class BrowserTask(MCPTask):
    mcp_server = "browser"


@app.task(base=BrowserTask, bind=True)
def open_page(self, dish):
    self.mcp.call_tool("browser_navigate", {"url": "data:text/html," + quote(PAGE)})
    self.mcp.call_tool("browser_type", {"target": "#dish", "text": dish})
    return [row(self)]


@app.task(base=BrowserTask, bind=True)
def fill_in(self, rows, guest):
    self.mcp.call_tool("browser_type", {"target": "#guest", "text": guest, "submit": True})
    return [*rows, row(self)]


@app.task(base=BrowserTask, bind=True)
def read_page(self, rows):
    result = self.mcp.call_tool("browser_evaluate", {"function": "() => out.textContent"})
    text = result.content[0].text.partition("### Result\n")[2].partition("\n")[0]
    return {"rows": [*rows, row(self)], "text": json.loads(text)}


def row(task):
    return {
        "task": task.name.rpartition(".")[2],
        "worker": task.request.hostname,
        "session": task.mcp.handle.short_id,
        "how": "resumed" if task.mcp.resumed else "opened",
        "requests": task.mcp.requests_sent,
    }
