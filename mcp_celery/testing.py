"""For tests of your own: sessions of tasks that run in the test's process.

Celery runs eager tasks (`task_always_eager`, `.apply()`) one by one, and none of them knows what comes next. So each
opens a session of its own and closes it, as a task that is called as a function does. Within `eager_sessions` they
share one.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from .eager import shared_by_eager


@contextmanager
def eager_sessions(app: Any) -> Iterator[None]:
    """Have eager tasks of *app*, and tasks called as functions, share one session for each server within the block.

    It is opened at the first use and ended with the block. A step then finds what the step before it has left in the
    session, as it does on workers; but all of the block is one workflow, also what would be parallel branches.

        @pytest.fixture(autouse=True)
        def one_session():
            app.conf.task_always_eager = True
            with eager_sessions(app):
                yield

    Holds for the thread that enters it. `self.mcp.close()` and `detach()` act as ever; a later task opens another.
    """
    with shared_by_eager(app):
        yield
