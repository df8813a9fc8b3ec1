"""The app that the workers of these tests run. Everything that differs comes from the environment."""

import json
import os
import signal
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import partial

from celery import Celery, chain
from celery.exceptions import Ignore, Reject
from celery.utils.log import get_task_logger
from processes import wait_until
from pydantic import BaseModel
from redis import Redis

from mcp_celery import MCPTask, SessionLostError, TransportError
from mcp_celery.signals import call_finished, session_closed, session_lost, session_opened, session_resumed

logger = get_task_logger(__name__)

app = Celery("project", broker=os.environ["BROKER"], backend=os.environ["BROKER"])
app.conf.update(
    mcp_servers={
        "peer": {"url": os.environ["PEER"]},
        "second": {"url": os.environ["PEER"]},
        "listening": {"url": os.environ["PEER"], "listen": True},
        "nowhere": {"url": "http://127.0.0.1:9/mcp", "connect_timeout_seconds": 2},
        "local": {"command": "npx", "args": ["some-server"]},
    },
    peer_kind=os.environ.get("PEER_KIND", ""),
    mcp_store_url=os.environ.get("STORE"),
    mcp_history_seconds=float(os.environ.get("HISTORY", "0")),
    mcp_session_ttl_seconds=float(os.environ.get("TTL", "86400")),
    mcp_reaper_interval_seconds=0.5,
    worker_lost_wait=0.5,
    worker_soft_shutdown_timeout=float(os.environ.get("SOFT_SHUTDOWN", "0")),
    result_extended=True,
    task_track_started=True,
    worker_send_task_events=True,
    task_send_sent_event=True,
    task_default_queue="common",
    worker_prefetch_multiplier=1,
    task_serializer=os.environ.get("SERIALIZER", "json"),
    accept_content=["json", os.environ.get("SERIALIZER", "json")],
    broker_connection_retry_on_startup=True,
    broker_transport_options={"socket_keepalive": True},
)


def log_signal(signal, sender, **arguments):
    """Have the worker log what it is told."""
    if sender.request.hostname:
        told = {"signal": signal.name, "task": sender.name, "worker": sender.request.hostname, **arguments}
        logger.info("signal %s", json.dumps(told))


for signal_of_mcp in (session_opened, session_resumed, session_closed, session_lost, call_finished):
    signal_of_mcp.connect(log_signal)


# Tests import this module once for each pair of workers, and shared tasks would meet their namesakes.
task = partial(app.task, shared=False)


class PeerTask(MCPTask):
    mcp_server = "peer"


def row(task, **more):
    """What a step of a workflow tells of itself."""
    return {
        "worker": task.request.hostname,
        "pid": os.getpid(),
        "session": task.mcp.handle.short_id if task.mcp.handle else None,
        "resumed": task.mcp.resumed,
        "requests": task.mcp.requests_sent,
        **more,
    }


@task(base=PeerTask, bind=True)
def remember(self, rows, name, value):
    """Set a variable of the session."""
    self.mcp.call_tool("set_variable", {"name": name, "value": value})
    return [*rows, row(self)]


@task(base=PeerTask, bind=True)
def recall(self, rows, name):
    """Read a variable of the session."""
    text = self.mcp.call_tool("get_variable", {"name": name}).content[0].text
    return [*rows, row(self, value=text)]


@task(base=PeerTask, bind=True)
def echoes(self, rows):
    """Call the one tool that every server has."""
    name, argument = ("echo", "message" if "everything" in self.app.conf.peer_kind else "text")
    text = self.mcp.call_tool(name, {argument: str(len(rows))}).content[0].text
    return [*rows, row(self, text=text, session_id=self.mcp.session_id and "set")]


@task(base=PeerTask, bind=True)
def add(self, a, b):
    return int(self.mcp.call_tool("add", {"a": a, "b": b}).content[0].text)


@task(base=PeerTask, bind=True)
def idle(self, value):
    """An MCP task that makes no call."""
    return value


@task()
def plus_one(value):
    return value + 1


@task()
def breaks(value):
    raise ValueError(f"plain {value}")


@task()
def tag(rows):
    return [*rows, "plain"]


@task()
def nothing():
    return None


class Point(BaseModel):
    x: int
    y: int


@task(base=PeerTask, bind=True, pydantic=True)
def shift(self, point: Point, by: int) -> Point:
    x = self.mcp.call_tool("add", {"a": point.x, "b": by}).structured_content["result"]
    return Point(x=x, y=point.y)


@task(base=PeerTask, bind=True, max_retries=3, default_retry_delay=0)
def flaky(self, value, failures):
    """Use the session, then ask for a retry until *failures* of them were made."""
    self.mcp.call_tool("echo", {"text": f"attempt {self.request.retries}"})
    if self.request.retries < failures:
        raise self.retry(exc=RuntimeError("not yet"))
    return value


@task(
    base=PeerTask, bind=True, autoretry_for=(RuntimeError,), retry_backoff=False, default_retry_delay=0, max_retries=2
)
def auto_flaky(self, value, failures):
    self.mcp.call_tool("echo", {"text": "x"})
    if self.request.retries < failures:
        raise RuntimeError("not yet")
    return value


@task(base=PeerTask, bind=True)
def replaced_by_task(self, value):
    self.mcp.call_tool("set_variable", {"name": "replaced", "value": "yes"})
    return self.replace(add.s(value, 10))


@task(base=PeerTask, bind=True)
def replaced_by_chain(self, value):
    self.mcp.call_tool("set_variable", {"name": "replaced", "value": "yes"})
    return self.replace(chain(add.s(value, 10), plus_one.s(), add.s(100)))


@task(base=PeerTask, bind=True)
def replaced_by_plain(self, value):
    self.mcp.call_tool("echo", {"text": "x"})
    return self.replace(plus_one.s(value))


@task(base=PeerTask, bind=True)
def gather(self, parts):
    """The body of a chord: read a variable that was set before its header."""
    return [self.mcp.call_tool("get_variable", {"name": "x"}).content[0].text, parts]


@task(base=PeerTask, bind=True)
def waits_for(self, value, name):
    """Poll a variable of the session until it is set."""
    for _ in range(500):
        if not self.mcp.call_tool("get_variable", {"name": name}, raise_on_error=False).is_error:
            return value
    raise RuntimeError(f"{name} was not set")


@task(base=PeerTask, bind=True)
def fails(self, value):
    self.mcp.call_tool("echo", {"text": "x"})
    raise ValueError(value)


@task(base=PeerTask, bind=True)
def returns_no_json(self):
    return self.mcp.call_tool("echo", {"text": "x"})


@task(base=PeerTask, bind=True, soft_time_limit=1.5)
def takes_long_to_close(self):
    self.mcp.call_tool("echo", {"text": "x"})
    return "done"


@task(base=PeerTask, bind=True)
def fails_in_tool(self):
    self.mcp.call_tool("fail")


@task(base=PeerTask, bind=True)
def ignores(self):
    self.mcp.call_tool("echo", {"text": "x"})
    raise Ignore


@task(base=PeerTask, bind=True, acks_late=True)
def rejects_once(self, rows):
    """Give the message back the first time."""
    self.mcp.call_tool("echo", {"text": "x"})
    if not self.request.delivery_info["redelivered"]:
        raise Reject("again", requeue=True)
    return [*rows, row(self)]


@task(base=PeerTask, bind=True)
def keeps(self):
    """Open a session, leave it alive, and return its handle, as one who stores it would."""
    self.mcp.call_tool("set_variable", {"name": "kept", "value": "yes"})
    return self.mcp.detach().dumps()


@task(base=PeerTask, bind=True)
def keeps_after_close(self):
    self.mcp.call_tool("echo", {"text": "x"})
    first = self.mcp.session_id is not None
    self.mcp.close()
    return [first, self.mcp.session_id, self.mcp.handle]


@task(base=PeerTask, bind=True)
def sees_request(self):
    """Print the request, as Celery's own example task does, and keep the session."""
    print(f"Request: {self.request!r}")
    self.mcp.detach()
    return repr(self.request)


@task(base=PeerTask, bind=True)
def calls_itself(self, rows, depth):
    """Call this task as a function from within, which opens a session of its own."""
    self.mcp.call_tool("echo", {"text": "x"})
    if depth:
        rows = self(rows, depth - 1)
    return [*rows, row(self)]


@task(base=PeerTask, bind=True)
def sees_handle(self, mcp_session=None):
    return None if mcp_session is None else mcp_session.short_id


@task(base=PeerTask, bind=True)
def loses(self, rows):
    """Go on after the session was lost, without a new one."""
    try:
        self.mcp.call_tool("echo", {"text": "x"})
    except SessionLostError as exc:
        return [*rows, str(exc)]
    return rows


@task(base=MCPTask, bind=True, mcp_server="nowhere")
def unreachable(self):
    self.mcp.call_tool("echo", {"text": "x"})


@task(
    base=MCPTask,
    bind=True,
    mcp_server="nowhere",
    autoretry_for=(TransportError,),
    max_retries=2,
    default_retry_delay=0,
    retry_backoff=False,
)
def reaches_in_the_end(self):
    """The server moves to where it is, at the second attempt."""
    if self.request.retries:
        self.app.conf.mcp_servers["nowhere"] = {"url": os.environ["PEER"]}
    return [self.mcp.call_tool("echo", {"text": "here"}).content[0].text, self.request.retries]


@task(base=MCPTask, bind=True, mcp_server="local")
def uses_stdio(self):
    self.mcp.call_tool("echo", {"text": "x"})


@task(base=MCPTask, bind=True, mcp_server="unknown")
def uses_unknown(self):
    self.mcp.call_tool("echo", {"text": "x"})


@task(base=MCPTask, bind=True, mcp_server=os.environ["PEER"])
def by_url(self, value):
    return self.mcp.call_tool("echo", {"text": value}).content[0].text


class Recall(MCPTask):
    """A class-based task."""

    name = "project.Recall"
    mcp_server = "peer"

    def run(self, rows, name):
        return [*rows, self.mcp.call_tool("get_variable", {"name": name}).content[0].text]


Recall = app.register_task(Recall())


@task(base=PeerTask, bind=True)
def slow(self, steps, seconds):
    """Return what the progress callback saw, and where it ran."""
    seen = []
    self.mcp.call_tool(
        "slow",
        {"steps": steps, "seconds": seconds},
        on_progress=lambda progress, total, message: seen.append([progress, total, message, self.request.id]),
    )
    return seen


@task(base=PeerTask, bind=True)
def reports(self, steps, seconds):
    """Leave it to the package what becomes of the progress."""
    return self.mcp.call_tool("slow", {"steps": steps, "seconds": seconds}).content[0].text


@task(base=PeerTask, bind=True, send_events=False)
def reports_unmonitored(self, steps, seconds):
    return self.mcp.call_tool("slow", {"steps": steps, "seconds": seconds}).content[0].text


class AnsweringTask(PeerTask):
    def on_elicitation(self, params):
        return {"answer": f"{self.request.id} to {params.message}"}


@task(base=AnsweringTask, bind=True)
def is_asked(self, texts):
    return [*texts, self.mcp.call_tool("ask_user", {"question": "why"}).content[0].text]


@task(base=PeerTask, bind=True)
def says(self, texts, text):
    """Have the server log *text*, and ask this task, which has no answer."""
    self.mcp.call_tool("say", {"level": "warning", "text": text})
    return [*texts, self.mcp.call_tool("ask_user", {"question": "why"}).content[0].text]


@task(base=AnsweringTask, bind=True)
def is_to_confirm(self, item):
    """Begin a call that needs input, which another task gives."""
    asking = self.mcp.call_tool("delete", {"item": item}, allow_input_required=True)
    return row(self, item=item, state=asking.request_state, keys=list(asking.input_requests))


@task(base=AnsweringTask, bind=True)
def confirms(self, asked, answer):
    """Give the input, and make the call to its end."""
    answers = {key: {"action": "accept", "content": {"answer": answer}} for key in asked["keys"]}
    result = self.mcp.call_tool(
        "delete", {"item": asked["item"]}, input_responses=answers, request_state=asked["state"]
    )
    return [asked, row(self, text=result.content[0].text)]


@task(base=MCPTask, bind=True, mcp_server="listening")
def listens(self, rows, steps, seconds):
    """Hold a session whose standalone stream is wanted."""
    text = self.mcp.call_tool("slow", {"steps": steps, "seconds": seconds}).content[0].text
    return [*rows, text]


@task(base=PeerTask, bind=True)
def overlapping(self, prefix, count):
    """Make *count* calls at once over one session that others use too; return the pairs of question and answer."""
    mcp = self.mcp

    def call(number):
        text = f"{prefix}-{number}"
        return text, mcp.call_tool("echo", {"text": text}).content[0].text

    with ThreadPoolExecutor(50) as threads:
        pairs = list(threads.map(call, range(count)))
    mcp.detach()
    return pairs


@task(base=MCPTask, bind=True, mcp_servers=("peer", "second"))
def copies(self, name):
    """Read a variable on one server and set it on another."""
    value = self.mcp.call_tool("get_variable", {"name": name}).content[0].text
    self.mcp["second"].call_tool("set_variable", {"name": name, "value": value + value})
    return self.mcp.session_id != self.mcp["second"].session_id


@task(base=PeerTask, bind=True)
def uses_unnamed(self):
    self.mcp["second"].call_tool("echo", {"text": "x"})


@task(base=MCPTask, bind=True, mcp_server="second")
def recalls_second(self, is_other, name):
    return [is_other, self.mcp.call_tool("get_variable", {"name": name}).content[0].text]


# The steps of test_shapes.py and test_ends.py


@task(base=PeerTask, bind=True)
def total(self, values):
    """The body of a chord: add up what the header returned, however deep it lies."""
    self.mcp.call_tool("echo", {"text": "total"})
    return sum_of(values)


@task()
def plain_total(values):
    return sum_of(values)


def sum_of(values):
    return sum(map(sum_of, values)) if isinstance(values, list) else values


@task(base=PeerTask, bind=True)
def names(self, value, name):
    """Set a variable of this name, by which a test tells the session in the recorder."""
    self.mcp.call_tool("set_variable", {"name": name, "value": "yes"})
    return value


@task(base=MCPTask, bind=True, mcp_server="second")
def add_second(self, a, b):
    return int(self.mcp.call_tool("add", {"a": a, "b": b}).content[0].text)


@task(base=MCPTask, bind=True, mcp_servers=("peer", "second"))
def add_both(self, a, b):
    once = int(self.mcp.call_tool("add", {"a": a, "b": b}).content[0].text)
    return int(self.mcp["second"].call_tool("add", {"a": once, "b": b}).content[0].text)


@task(base=PeerTask, bind=True)
def replaced_by(self, value, signature):
    """Replace this task by any signature, which is not seen before."""
    self.mcp.call_tool("echo", {"text": "replaced"})
    return self.replace(self.app.signature(signature))


@task(base=PeerTask, bind=True)
def adds_to_chord(self, value, signature):
    """Add one more member to the header that this task is in."""
    self.mcp.call_tool("echo", {"text": "added"})
    self.add_to_chord(self.app.signature(signature))
    return value


@task(base=PeerTask, bind=True)
def calls_another(self, value):
    """Call another task as a function."""
    self.mcp.call_tool("echo", {"text": "outer"})
    return add(value, 1)


@task()
def calls_plainly(value):
    return add(value, 1)


@task(base=PeerTask, bind=True)
def detaches(self, value):
    self.mcp.call_tool("echo", {"text": "detached"})
    self.mcp.detach()
    return value


@task(base=PeerTask, bind=True)
def fails_detached(self, value):
    self.mcp.call_tool("echo", {"text": "detached"})
    self.mcp.detach()
    raise ValueError(value)


@task(base=PeerTask, bind=True)
def catches_itself(self, is_inner=False):
    """Call this task as a function, which fails."""
    self.mcp.call_tool("echo", {"text": "catches"})
    if is_inner:
        raise ValueError
    with suppress(ValueError):
        self(is_inner=True)
    return 1


@task(base=PeerTask, bind=True)
def fails_at(self, value, last):
    self.mcp.call_tool("echo", {"text": str(value)})
    if value == last:
        raise ValueError(value)
    return value


@task(base=PeerTask, bind=True)
def on_error(self, request, exc, traceback):
    """An errback that Celery calls in place."""
    self.mcp.call_tool("echo", {"text": f"in place {type(exc).__name__}"})


@task(base=PeerTask, bind=True)
def on_error_of(self, failed_id):
    """An errback that Celery publishes."""
    self.mcp.call_tool("echo", {"text": "published"})


@task(base=PeerTask, bind=True)
def fails_on_error(self, request, exc, traceback):
    self.mcp.call_tool("echo", {"text": "fails itself"})
    raise RuntimeError("the errback failed")


@task(base=PeerTask, bind=True, max_retries=1, default_retry_delay=0)
def ends(self, value, how):
    """End in one of the ways in which a task can, once the session was used."""
    self.mcp.call_tool("echo", {"text": how})
    end(self, how)


@task(base=PeerTask, bind=True, acks_late=True, reject_on_worker_lost=True)
def ends_once(self, value, how):
    """The same at the first delivery; the second one succeeds."""
    self.mcp.call_tool("echo", {"text": how})
    if not self.request.delivery_info["redelivered"]:
        end(self, how)
    return value


@task(base=PeerTask, bind=True, retry_on_worker_lost=True, max_retries=1, default_retry_delay=0)
def dies_once(self, value):
    """Kill the process, and succeed when Celery retries."""
    self.mcp.call_tool("echo", {"text": "kill"})
    if not self.request.retries:
        end(self, "kill")
    return value


@task(bind=True, max_retries=1, default_retry_delay=0)
def ends_plainly(self, value, how):
    end(self, how)


def wait_until_accepted(task):
    """Wait until the main process has seen that this task runs, by which it is acknowledged.

    The pool gives the task of a process to another one if that process has died before.
    """
    broker = task.app.conf.broker_url
    if broker.startswith("redis") and not task.acks_late:
        tag = task.request.properties["delivery_tag"]
        with Redis.from_url(broker) as client:
            wait_until(lambda: not client.hexists("unacked", tag), what="the acknowledgement")


def end(task, how):
    match how:
        case "failure":
            raise ValueError(how)
        case "retries":
            raise task.retry(exc=ValueError(how))
        case "ignore":
            raise Ignore
        case "reject":
            raise Reject(how, requeue=False)
        case "kill":
            wait_until_accepted(task)
            os.kill(os.getpid(), signal.SIGKILL)
        case "hang":
            threading.Event().wait(60)
        case "stick":
            # As where a signal reaches no handler, since no Python code runs.
            signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])
            threading.Event().wait(60)


@task(base=PeerTask, bind=True)
def converse(self, conversation, question, turns):
    """Run an agent over the session; the conversation goes on in the return value."""
    from agent_runs import run_sync  # not before it is needed: agents take two seconds to load

    return run_sync(self, conversation, question, turns)


@task(base=PeerTask, bind=True)
async def converse_async(self, conversation, question, turns):
    """Do the same on the event loop of the process."""
    from agent_runs import run  # as above

    return await run(self, conversation, question, turns)
