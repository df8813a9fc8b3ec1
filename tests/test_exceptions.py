"""An error raised in a worker is the same error in the caller: after pickle, and out of Celery's result backends."""

import pickle

import pytest
from celery import Celery, states
from celery.utils import uuid

from mcp_celery import exceptions
from mcp_celery.exceptions import (
    CallInterruptedError,
    ConfigurationError,
    JournalError,
    JournalMismatchError,
    MCPCeleryError,
    SessionError,
    SessionHandleError,
    SessionLostError,
    StoreError,
    SupersededError,
    ToolError,
    TransportError,
)

TOOL = ToolError("no such file", "read_file", {"path": "/x", "tried": [1, 2]})
LOST = SessionLostError("gone", "browser", "0a1b2c3d", 404)
BROKEN = TransportError("could not be reached", "browser", 503, False)
INTERRUPTED = CallInterruptedError("it may have run", "send_mail")
MISMATCH = JournalMismatchError("another path", 2, "tool 'add'", "tool 'echo'")
TELLING = [TOOL, LOST, BROKEN, INTERRUPTED, MISMATCH]
PLAIN = [
    cls("it went wrong")
    for cls in (
        MCPCeleryError,
        ConfigurationError,
        SessionError,
        SessionHandleError,
        JournalError,
        SupersededError,
        StoreError,
    )
]
BARE = [type(error)() for error in (*PLAIN, *TELLING)]
ERRORS = [*PLAIN, *TELLING, *BARE]


@pytest.fixture(params=["json", "pickle"])
def backend(request):
    changes = {"result_serializer": request.param, "accept_content": ["json", "pickle"]}
    return Celery(broker="memory://", backend="cache+memory://", set_as_current=False, changes=changes).backend


def assert_same(read, error):
    assert type(read) is type(error)
    assert (str(read), read.args, vars(read)) == (str(error), error.args, vars(error))


def test_every_error_of_the_package_is_tried_here():
    errors = {value for value in vars(exceptions).values() if isinstance(value, type) and issubclass(value, Exception)}
    assert errors == {type(error) for error in ERRORS}


@pytest.mark.parametrize("error", ERRORS, ids=repr)
def test_an_error_survives_pickle(error):
    assert_same(pickle.loads(pickle.dumps(error)), error)  # noqa: S301 - made here


@pytest.mark.parametrize("error", ERRORS, ids=repr)
def test_an_error_survives_the_result_backend(backend, error):
    task_id = uuid()
    backend.store_result(task_id, error, states.FAILURE)
    assert_same(backend.get_result(task_id), error)


def test_what_was_learned_is_kept_as_attributes():
    assert (TOOL.message, TOOL.tool, TOOL.structured_content["tried"]) == ("no such file", "read_file", [1, 2])
    assert (LOST.server, LOST.session, LOST.status) == ("browser", "0a1b2c3d", 404)
    assert (BROKEN.server, BROKEN.status, BROKEN.sent) == ("browser", 503, False)
    assert TransportError("x").sent, "whether it ran is unknown unless said otherwise"
    assert INTERRUPTED.tool == "send_mail"
    assert (MISMATCH.number, MISMATCH.before, MISMATCH.now) == (2, "tool 'add'", "tool 'echo'")


def test_the_text_of_an_error_is_its_message_alone():
    texts = ["no such file", "gone", "could not be reached", "it may have run", "another path"]
    assert [str(error) for error in TELLING] == texts


def test_the_errors_are_one_tree():
    for error in ERRORS:
        assert isinstance(error, MCPCeleryError)
    for cls in (SessionLostError, SessionHandleError):
        assert issubclass(cls, SessionError)
    for cls in (JournalMismatchError, SupersededError):
        assert issubclass(cls, JournalError)
    for cls in (ToolError, TransportError, CallInterruptedError, JournalError, StoreError, ConfigurationError):
        assert cls.__bases__ == (MCPCeleryError,)
