"""Which tasks run in a worker, as its requests tell."""

import pytest
from celery import Celery
from celery.worker import state
from celery.worker.request import Request
from kombu.message import Message

from mcp_celery.bootstep import running_tasks


@pytest.fixture
def receive():
    """`receive(task_id)` returns the request of a message that has come."""
    app = Celery(set_as_current=False)

    @app.task(name="waits", shared=False)
    def waits():
        return None

    received = []

    def receive(task_id):
        message = app.amqp.as_task_v2(task_id, "waits")
        received.append(Request(Message(headers=message.headers, body=message.body), app=app, decoded=True))
        state.task_reserved(received[-1])
        return received[-1]

    yield receive
    for request in received:
        state.task_ready(request)
    state.total_count.clear()
    state.all_total_count[:] = [0]


def running():
    """What of it are tasks of this test: others may have left requests in this process."""
    return {task_id: name for task_id, name in running_tasks().items() if name == "waits"}


def test_a_task_whose_message_comes_again_runs_until_its_last_run_has_ended(receive):
    first = receive("id")
    assert running() == {}
    state.task_accepted(first)
    assert running() == {"id": "waits"}
    again = receive("id")
    assert running() == {"id": "waits"}
    state.task_accepted(again)
    state.task_ready(first)
    assert running() == {"id": "waits"}
    state.task_ready(again)
    assert running() == {}
