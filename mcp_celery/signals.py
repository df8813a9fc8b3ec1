"""Signals, in the manner of `celery.signals`, of what happens in MCP sessions: for metrics, above all.

    from mcp_celery.signals import call_finished

    @call_finished.connect
    def count(sender, server, tool, seconds, error, **_):
        calls.labels(server, tool, error).observe(seconds)

They are sent in the process and the thread of the task, between its calls, so a receiver may do what a task may do.
What a receiver raises is logged, and harms no task. The sender is the task, and these are the keyword arguments of all:

- `task_id`: of the task; None where it was called as a function.
- `server`: the name in `mcp_servers`, or the URL without credentials.
- `session`: the first 8 hex digits of the SHA-256 of the session ID; None without a session.

Servers without sessions open, resume, close and lose none. What the reaper does at a deadline is told by no signal,
since no task does it.
"""

from typing import Any

from billiard.exceptions import SoftTimeLimitExceeded
from celery.utils.dispatch import Signal

from .events import Event

_ALL = {"task_id", "server", "session"}

#: A task has opened a session at the server.
session_opened = Signal(name="session_opened", providing_args=_ALL)

#: A task has begun to use the session that another task, or an earlier attempt, has left it.
session_resumed = Signal(name="session_resumed", providing_args=_ALL)

#: The session was ended at the server. `why`: "workflow" where the last task that held it has ended, "task" where a
#: task has called `close()`.
session_closed = Signal(name="session_closed", providing_args=_ALL | {"why"})

#: A task has found that the server no longer knows the session. Each task that finds it says so, once.
session_lost = Signal(name="session_lost", providing_args=_ALL)

#: A call has ended. `method`: "tools/call", "resources/read" and so on. `tool`: its name, for "tools/call". `seconds`:
#: how long it took, with the opening of the session where it was the first. `error`: the name of the exception's class
#: ("ToolError" also where the answer was returned because of `raise_on_error=False`, "CancelledError" where the task
#: was interrupted); None where all went well. A call that a durable task finds in its journal is none.
call_finished = Signal(name="call_finished", providing_args=_ALL | {"method", "tool", "seconds", "error"})

_BY_NAME = {
    signal.name: signal for signal in (session_opened, session_resumed, session_closed, session_lost, call_finished)
}


def send(task: Any, task_id: str | None, event: Event) -> None:
    """Send the signal of *event*, in the thread of the task.

    Raises:
        SoftTimeLimitExceeded: The task was interrupted within a receiver. Celery would keep that to itself.
    """
    for _, response in _BY_NAME[event.name].send(task, task_id=task_id, **event.arguments):
        if isinstance(response, SoftTimeLimitExceeded):
            raise response
