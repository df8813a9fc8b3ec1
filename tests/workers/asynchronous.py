"""An app of `async def` tasks. What differs comes from the environment."""

import asyncio
import os
from functools import partial

from celery import Celery, chain, current_task
from celery.exceptions import SoftTimeLimitExceeded

from mcp_celery import MCPTask, ToolError

app = Celery("asynchronous", broker=os.environ["BROKER"], backend=os.environ["BROKER"])
app.conf.update(
    mcp_servers={"peer": {"url": os.environ["PEER"]}},
    mcp_history_seconds=0,
    mcp_reaper_interval_seconds=0.5,
    worker_lost_wait=0.5,
    task_default_queue="common",
    task_track_started=True,
    worker_prefetch_multiplier=1,
    broker_connection_retry_on_startup=True,
    broker_transport_options={"socket_keepalive": True},
)

SLOW = {"steps": 200, "seconds": 0.1}


class PeerTask(MCPTask):
    mcp_server = "peer"
    default_retry_delay = 0


# Tests import this module more than once, and shared tasks would meet their namesakes.
task = partial(app.task, shared=False, base=PeerTask, bind=True)


@task()
async def remember(self, value):
    await self.amcp.call_tool("set_variable", {"name": "x", "value": str(value)})
    return self.amcp.resumed


@task()
async def recall(self, *_):
    result = await self.amcp.call_tool("get_variable", {"name": "x"})
    return result.content[0].text, self.amcp.resumed


@task()
def plainly(self, *_):
    return self.mcp.call_tool("get_variable", {"name": "x"}).content[0].text


@task()
async def add(self, a, b):
    result = await self.amcp.call_tool("add", {"a": a, "b": b})
    return result.structured_content["result"]


@task()
async def fan_out(self, count):
    results = await asyncio.gather(*[self.amcp.call_tool("add", {"a": n, "b": 1}) for n in range(count)])
    return [result.structured_content["result"] for result in results]


@task(max_retries=2)
async def retries(self):
    await self.amcp.call_tool("set_variable", {"name": f"attempt {self.request.retries}", "value": "x"})
    if self.request.retries < 2:
        raise self.retry(exc=RuntimeError("not yet"))
    await asyncio.gather(*[self.amcp.call_tool("get_variable", {"name": f"attempt {n}"}) for n in range(3)])
    return self.request.retries


@task(autoretry_for=(ToolError,), max_retries=1, retry_backoff=False)
async def retries_for(self):
    await self.amcp.call_tool("fail" if not self.request.retries else "echo", {"text": "x"})
    return self.request.retries


@task(max_retries=0)
async def gives_up(self):
    try:
        raise self.retry(exc=KeyError("none"))
    except KeyError:
        return "gave up"


@task()
async def replaced(self, value, *, by_plain):
    await self.amcp.call_tool("set_variable", {"name": "x", "value": str(value)})
    raise self.replace(plus_one.s(value) if by_plain else chain(recall.s(), recall.s()))


@task()
async def adds_to_chord(self, value):
    await self.amcp.call_tool("echo", {"text": "x"})
    self.add_to_chord(add.s(value, 10))
    return value


@app.task(shared=False)
def plus_one(value):
    return value + 1


@app.task(shared=False)
def total(values):
    return sum(values)


@app.task(shared=False)
def parents(_=None):
    return current_task.request.parent_id, current_task.request.root_id


@task()
async def publishes(self):
    """Publish a task from within, once others have run on the loop."""
    await asyncio.sleep(0.01)
    return parents.delay().id


@task(soft_time_limit=1)
async def limited(self):
    await self.amcp.call_tool("slow", SLOW)


@task(soft_time_limit=1)
async def partial_result(self):
    try:
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self.amcp.call_tool("slow", SLOW))
            tasks.create_task(self.amcp.call_tool("slow", SLOW))
    except SoftTimeLimitExceeded:
        result = await self.amcp.call_tool("echo", {"text": "partial"})
        return result.content[0].text


@task()
async def slow(self):
    await self.amcp.call_tool("slow", SLOW)


@task()
async def meets(self, count):
    """Wait until *count* of these run at once, on one loop."""
    _here.add(self.request.id)
    if len(_here) == count:
        _all_here.set()
    await _all_here.wait()
    result = await self.amcp.call_tool("echo", {"text": self.request.id})
    return result.content[0].text, os.getpid()


_here = set()
_all_here = asyncio.Event()
