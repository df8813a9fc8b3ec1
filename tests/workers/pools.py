"""The app of test_pools.py: some tasks of `project`, and some that look at the process that they run in."""

import _socket
import asyncio
import atexit
import os
import sys
import threading
import traceback
from contextlib import suppress
from functools import partial
from urllib.parse import urlsplit

from celery.signals import worker_init
from processes import wait_until
from project import PeerTask, app, gather, recall, remember, row, slow, task  # noqa: F401 - those of the tests, too

from mcp_celery.portal import get_portal, is_running

app.conf.update(
    worker_pool_start_method=os.environ.get("START_METHOD", "fork"),
    # As many as tasks run at the same time: redis-py has 100 for results, kombu 10 for acknowledging messages.
    redis_max_connections=1000,
    broker_transport_options={**app.conf.broker_transport_options, "max_connections": 1000},
)

#: How many of `meets` wait for each other in a process.
MEETING = int(os.environ.get("MEETING", "1"))
meeting = threading.Barrier(MEETING)


@task(base=PeerTask, bind=True)
def meets(self, number):
    """Open a session, wait until all others have done so, then call a tool along with them."""
    self.mcp.open()
    meeting.wait(60)
    return row(self, number=self.mcp.call_tool("add", {"a": number, "b": 1}).structured_content["result"])


@task(base=PeerTask, bind=True)
def sees_loop(self):
    """Return whether an event loop seems to run in this thread, before a call, meanwhile, and after it."""

    def is_seen():
        try:
            asyncio.get_running_loop()
        except RuntimeError:
            return False
        return True

    seen = [is_seen()]
    self.mcp.call_tool("slow", {"steps": 2, "seconds": 0.01}, on_progress=lambda *_: seen.append(is_seen()))
    return [*seen, is_seen()]


@task(base=PeerTask, bind=True)
async def remembers(self, value):
    await self.amcp.call_tool("set_variable", {"name": "x", "value": value})
    return [self.amcp.handle.short_id, await returns(value)]


@task(base=PeerTask, bind=True)
async def returns(self, value):
    await asyncio.sleep(0)
    return [self.request.called_directly, value]


@task(base=PeerTask, bind=True)
async def recalls(self, before):
    call = partial(self.amcp.call_tool, "get_variable", {"name": "x"})
    found = [result.content[0].text for result in await asyncio.gather(call(), call(), call())]
    return [*before, found, self.amcp.handle.short_id == before[0], await asyncio.to_thread(lambda: self.request.id)]


@task(base=PeerTask, bind=True, mcp_durable=True, acks_late=True, reject_on_worker_lost=True)
def adds_durably(self, number):
    once = self.mcp.call_tool("add", {"a": number, "b": 1}).structured_content["result"]
    return self.mcp.call_tool("add", {"a": once, "b": 1}).structured_content["result"]


@task()
def left_over():
    """Return what runs on the event loop of a process that has nothing to do."""

    async def ask():
        return [each.get_coro().__qualname__ for each in asyncio.all_tasks() if each is not asyncio.current_task()]

    return get_portal().call(ask) if is_running() else []


def connections_left():
    """Return how many connections to the MCP server this process has open."""
    port, count = urlsplit(os.environ["PEER"]).port, 0
    for number in range(3, 2048):
        with suppress(OSError):  # not open, or no connection
            each = _socket.socket(fileno=os.dup(number))  # gevent has its own in the place of socket.socket
            count += each.getpeername()[1] == port
            each.close()
    return count


@worker_init.connect
def show_what_is_left_at_the_end(**_):
    """Have the worker's main process say what is left when it ends, after all of Celery's own endings."""

    def names():
        # Not those that gevent looks names up in, and has no other word for.
        return [each.name for each in threading.enumerate() if not isinstance(each, threading._DummyThread)]

    def show():
        with suppress(TimeoutError):  # workers of the event loop end with it, a moment later
            wait_until(lambda: names() == ["MainThread"], 2)
        stacks = [traceback.extract_stack(frame) for frame in sys._current_frames().values()]
        out = sys.__stdout__
        loops = sum(any(frame.name == "run_forever" for frame in stack) for stack in stacks)
        print("threads left:", *names(), "event loops left:", loops, "connections left:", connections_left(), file=out)

    atexit.register(show)
