"""An app of durable tasks, which die where their arguments say, once. What else differs comes from the environment."""

import json
import os
import signal
import time
from collections.abc import Callable
from functools import partial

import calls
from broker_settings import LOOKS_SOON
from celery import Celery, chain, chord, group
from celery.exceptions import Reject
from celery.signals import after_task_publish, before_task_publish
from redis import Redis

# Many processes are killed here, and those that come after them need not load the SDK anew.
import mcp_celery.session  # noqa: F401
from mcp_celery import MCPTask, TransportError, journal, redis_store
from mcp_celery.known_tasks import journal_id

#: By name: the URL of a server, and its kind, as `calls` takes it.
SERVERS = json.loads(os.environ["SERVERS"])

app = Celery("durable", broker=os.environ["BROKER"], backend=os.environ["BROKER"])
app.conf.update(
    mcp_servers={name: {"url": url} for name, (url, _) in SERVERS.items()},
    mcp_store_url=os.environ.get("STORE"),
    mcp_history_seconds=0,
    mcp_reaper_interval_seconds=0.5,
    mcp_durable=True,
    task_acks_late=True,
    task_reject_on_worker_lost=True,
    worker_prefetch_multiplier=1,
    broker_connection_retry_on_startup=True,
    broker_transport_options={
        "socket_keepalive": True,
        "visibility_timeout": float(os.environ.get("VISIBILITY", "3600")),
        **LOOKS_SOON,
        "unacked_restore_interval": 0.3,
    },
)
journal.LEASE_SECONDS = float(os.environ.get("LEASE", journal.LEASE_SECONDS))
#: As short as a test can wait, and longer than a killed process takes to be replaced.
redis_store.ABANDONED_SECONDS = 2.0

redis = Redis.from_url(os.environ["BROKER"], decode_responses=True)


class DurableTask(MCPTask):
    mcp_servers = tuple(SERVERS)
    default_retry_delay = 0


# Tests import this module more than once, and shared tasks would meet their namesakes.
task = partial(app.task, shared=False, base=DurableTask, bind=True)


#: Called before or after a message is published.
_at_publishing: dict[str, Callable[[], None]] = {}


# What tasks do beside their work


def runs_of(task_id):
    """The process of each run of a task, in order: the worker's name and the ID of the process."""
    return [(worker, int(pid)) for worker, pid in map(json.loads, redis.lrange(f"runs:{task_id}", 0, -1))]


def begins(self):
    """Note that a task runs."""
    _at_publishing.clear()
    redis.rpush(f"runs:{self.request.id}", json.dumps([self.request.hostname, os.getpid()]))


def dies(name):
    """End the process as the kernel does when memory is short; once for each *name*."""
    if redis.set(f"died:{name}", 1, nx=True):
        os.kill(os.getpid(), signal.SIGKILL)


def has_token(journal):
    """Whether a call that has not ended has its token in a journal."""
    fields = set(redis.hkeys(f"{{mcp_celery}}:journal:{journal}"))
    return any(f"end:{name[6:]}" not in fields for name in fields if name.startswith("token:"))


def dies_on_a_call(self):
    """Die once the token of the call under way is in the journal, where there are tokens."""
    name, deadline = f"died:{self.request.id}", time.monotonic() + 5
    while not (redis.exists(name) or has_token(journal_id(self.request))):
        if time.monotonic() > deadline:
            raise TimeoutError("no token")
        time.sleep(0.01)
    dies(self.request.id)


def dies_at_publishing(self, when, nth):
    """Die "before" or "after" the *nth* message that this process publishes from now on."""
    name, count = self.request.id, iter(range(1, nth + 1))
    _at_publishing[when] = lambda: dies(name) if next(count, None) == nth else None


@before_task_publish.connect
def _before(**_):
    _at_publishing.get("before", lambda: None)()


@after_task_publish.connect
def _after(headers, **_):
    if headers["retries"]:
        redis.rpush("retries", headers["id"])
    _at_publishing.get("after", lambda: None)()


def echo(self, server, text):
    return calls.text_of(self.mcp[server].call_tool(*calls.echo(SERVERS[server][1], f"{self.request.id} {text}")))


# Tasks


def work(self, server, where=None, tool="slow", seconds=0.2):
    """Make three calls, the second one slow, and die *where* it is said."""
    begins(self)
    texts = [echo(self, server, "first")]
    if where == "between":
        dies(self.request.id)
    name, arguments = calls.slow(SERVERS[server][1], 3, seconds)
    reports = []

    def report(progress, *_):
        reports.append(progress)
        if where == "within":
            dies_on_a_call(self)
        if where == "without a token":
            dies(self.request.id)

    texts.append(
        calls.text_of(self.mcp[server].call_tool(tool if name == "slow" else name, arguments, on_progress=report))
    )
    texts.append(echo(self, server, "last"))
    return {"texts": [text.removeprefix(f"{self.request.id} ") for text in texts], "reports": reports}


class AnsweringTask(DurableTask):
    """Dies once while it is asked."""

    def on_elicitation(self, params):
        dies_on_a_call(self)
        return {"answer": f"to {params.message}"}


@task(base=AnsweringTask)
def is_asked(self):
    begins(self)
    return calls.text_of(self.mcp["store"].call_tool("ask_user", {"question": "why"}))


works = task(name="works")(work)
calls_again = task(name="calls_again", mcp_on_interrupted="call-again")(work)
is_retried = task(name="is_retried", retry_on_worker_lost=True)(work)
is_retried_anew = task(name="is_retried_anew", mcp_durable="redelivery", retry_on_worker_lost=True)(work)
is_acked_early = task(name="is_acked_early", acks_late=False)(work)


@task()
def strays(self):
    """Take another path when it runs again."""
    begins(self)
    echo(self, "store", "1 of 2")
    if len(runs_of(self.request.id)) == 1:
        echo(self, "store", "2 of 2")
        dies(self.request.id)
    self.mcp["store"].call_tool("add", {"a": 1, "b": 2})


def retry(self, failures, where=None):
    """Use a tool, then ask for a retry until *failures* of them were made. Die *where* it is said."""
    begins(self)
    echo(self, "store", "once")
    if where == "between":
        dies(self.request.id)
    self.mcp["store"].call_tool("fail", raise_on_error=False)
    if self.request.retries < failures:
        raise self.retry(exc=RuntimeError("not yet"))
    return self.request.retries


retries = task(name="retries")(retry)
retries_anew = task(name="retries_anew", mcp_durable="redelivery", retry_on_worker_lost=True)(retry)


@task(autoretry_for=(TransportError,), retry_backoff=False)
def retries_by_itself(self, text):
    begins(self)
    echo(self, "store", "once")
    return echo(self, "store", text)


@task()
def retries_beside(self):
    """Have a retry published, and go on."""
    begins(self)
    echo(self, "store", "once")
    if not self.request.retries:
        self.retry(throw=False)
    echo(self, "store", "beside")


@task(default_retry_delay=1)
def retries_later(self):
    begins(self)
    echo(self, "store", "once")
    raise self.retry()


@task()
def rejects(self, requeue):
    """Put the message back in the first run, or drop it."""
    begins(self)
    echo(self, "store", "first")
    if len(runs_of(self.request.id)) == 1:
        raise Reject("not now", requeue=requeue)
    echo(self, "store", "second")
    return "right"


@app.task(shared=False)
def told(name):
    """The errback of tasks that do not fail."""
    redis.rpush("told", name)


@task()
def freezes(self, how):
    """Be frozen in the first run, until somebody wakes it; then it has an end of its own."""
    begins(self)
    echo(self, "store", "first")
    if len(runs_of(self.request.id)) == 1:
        os.kill(os.getpid(), signal.SIGSTOP)
        return wakes(self, how)
    self.mcp["store"].call_tool(*calls.slow(SERVERS["store"][1], 3, 0.3))
    return "right"


def wakes(self, how):
    if how == "raises":
        raise RuntimeError("too late")
    if how == "retries":
        raise self.retry()
    if how == "rejects":
        raise Reject("too late", requeue=False)
    if how == "calls":
        echo(self, "store", "too late")
    return "wrong"


@task()
def closes(self, where):
    """Work in two sessions, one after the other, and die *where* it is said."""
    begins(self)
    session = self.mcp["store"]
    session.open()
    if where == "opened":
        dies(self.request.id)
    echo(self, "store", "first")
    session.close()
    if where == "closed":
        dies(self.request.id)
    session.open()
    if where == "opened again":
        dies(self.request.id)
    arguments = calls.slow(SERVERS["store"][1], 3, 0.2)
    session.call_tool(*arguments, on_progress=lambda *_: dies_on_a_call(self) if where == "within" else None)
    echo(self, "store", "last")
    return "right"


@task()
def detaches(self):
    """Detach a session and die; then work in another one."""
    begins(self)
    echo(self, "store", "first")
    handle = self.mcp["store"].detach()
    redis.rpush(f"detached:{self.request.id}", handle.dumps())
    dies(self.request.id)
    self.mcp["store"].open()
    echo(self, "store", "second")


def keep(self):
    """Set a variable of the session and die; the next run reads it."""
    begins(self)
    if len(runs_of(self.request.id)) == 1:
        self.mcp["store"].call_tool("set_variable", {"name": "x", "value": "kept"})
        dies(self.request.id)
    return self.mcp["store"].call_tool("get_variable", {"name": "x"}).content[0].text


keeps = task(name="keeps", mcp_durable=False)(keep)
keeps_over_retries = task(name="keeps_over_retries", mcp_durable=False, retry_on_worker_lost=True)(keep)


@task()
def notes(self, *_, where=None):
    """Call one tool, and die before or after that."""
    begins(self)
    if where == "before":
        dies(self.request.id)
    echo(self, "store", "note")
    if where == "after":
        dies(self.request.id)
    return 1


@task()
def totals(self, values):
    begins(self)
    echo(self, "store", "total")
    return sum(values)


@task()
def doubles(self, value, where=None):
    begins(self)
    echo(self, "store", "double")
    if where == "after":
        dies(self.request.id)
    return 2 * value


@task()
def begets(self, when, nth=1):
    """Call one tool; die while what follows is published."""
    begins(self)
    echo(self, "store", "begets")
    dies_at_publishing(self, when, nth)


@task()
def replaces(self, kind, where=None, when=None):
    """Be replaced by what makes calls, and dies *where* it is said."""
    begins(self)
    echo(self, "store", "replaced")
    if when is not None:
        dies_at_publishing(self, when, 1)
    raise self.replace(replacement(kind, where))


def replacement(kind, where):
    members, end = [notes.si(where=where), notes.si()], doubles.s(where=where)
    kinds = {
        "task": lambda: works.si("store", where),
        "chain": lambda: chain(notes.si(where=where), works.si("store")),
        "chord": lambda: chord(members, chain(totals.s(), end)),
        "chain with a chord": lambda: chain(notes.si(), chord(members, chain(totals.s(), end))),
        "chain with a group": lambda: chain(notes.si(), group(members), totals.s(), end),
    }
    return kinds[kind]()


@task()
def takes_items(self, number):
    echo(self, "store", f"item {number}")
    if number == 1:
        dies(self.request.id)
    return number
