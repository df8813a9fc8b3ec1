"""Workers of one process that run what was published in any order: Celery's own code, one thread at a time.

Messages are taken off an in-memory broker, become Celery's requests and are traced as in a pool. Each worker is a
thread that stops at gates: within its task, before each message that it publishes, and around each change of the
store. There the next to go on is chosen. So whatever may overlap on real workers can overlap here, and the same choices
give the same run.
"""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from celery import _state
from celery.signals import before_task_publish
from celery.utils.imports import symbol_by_name
from celery.worker.request import create_request_cls

#: Tasks that run at once.
WORKERS = 3
#: How long a thread may take to its next gate.
TURN_SECONDS = 30.0

#: Returns one of 0 to below the given number. With 0 whoever runs goes on, else the oldest.
Choose = Callable[[int], int]

_here = threading.local()


def gate() -> None:
    """Let another one go on, where this thread is one that an executor runs."""
    turn: Turn | None = getattr(_here, "turn", None)
    if turn is not None:
        turn.wait()


class Turn:
    """A thread that runs *work* while it has the turn, and hands it back at its gates."""

    def __init__(self, app: Any, work: Callable[[], Any], then: Callable[[Any], object] = lambda _: None) -> None:
        self._app = app
        self._work = work
        self._then = then
        self._may_go_on = threading.Semaphore(0)
        self._is_back = threading.Semaphore(0)
        self._is_free = False
        self._result: Any = None
        self._failure: BaseException | None = None
        self.is_over = False
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def go_on(self) -> None:
        """Run up to the next gate, or to the end; then do in this thread what comes after that.

        Raises:
            TimeoutError: It did not come there.
        """
        self._may_go_on.release()
        if not self._is_back.acquire(timeout=TURN_SECONDS):
            raise TimeoutError(f"a task has come to no gate in {TURN_SECONDS:g} s")
        if self.is_over:
            self._thread.join(TURN_SECONDS)
            if self._failure is not None:
                raise self._failure
            self._then(self._result)

    def set_free(self) -> None:
        """Run to the end, past all gates."""
        self._is_free = True
        self._may_go_on.release()
        self._thread.join(TURN_SECONDS)

    def wait(self) -> None:
        """Hand the turn back, and wait for the next one. Called in the thread."""
        if not self._is_free:
            self._is_back.release()
            self._may_go_on.acquire()

    def _run(self) -> None:
        self._may_go_on.acquire()
        _here.turn = self
        self._app.set_current()
        try:
            self._result = self._work()
        except BaseException as exc:  # noqa: BLE001 - handed to the thread that waits
            self._failure = exc
        finally:
            self.is_over = True
            self._is_back.release()


class Executor:
    """Publishes canvases of one app and runs them, with what comes of them, to the end."""

    def __init__(self, app: Any) -> None:
        self.app = app
        self._connection = app.connection_for_read()
        self._channel = self._connection.default_channel
        self._queue = app.amqp.queues[app.conf.task_default_queue](self._channel)
        self._queue.declare()

    def close(self) -> None:
        """Close what the executor and the app have open."""
        self._connection.release()
        self.forget_results()
        self.app.backend.result_consumer.stop()
        self.app.close()

    def forget_results(self) -> None:
        """Have the backend wait for no result any more. It keeps each one that nobody has got."""
        backend = self.app.backend
        for pending in backend._pending_results:
            pending.clear()
        consumer = backend.result_consumer
        for task_id in list(consumer.subscribed_to):
            consumer._pubsub.unsubscribe(task_id)
        # Or results unsubscribe when they are collected, which may be after the server has gone.
        consumer.subscribed_to.clear()

    def run(self, publish: Callable[[], Any], choose: Choose) -> Any:
        """Return what *publish* returns, once it has ended and nothing is left to run."""
        self._queue.purge()
        turns = [Turn(self.app, publish)]
        publisher, waiting = turns[0], []
        with self._as_worker():
            try:
                while turns or waiting:
                    is_free = len([turn for turn in turns if turn is not publisher]) < WORKERS
                    chosen = choose(len(turns) + (len(waiting) if is_free else 0))
                    if chosen < len(turns):
                        turn = turns.pop(chosen)
                    else:
                        turn = self._begin(waiting.pop(chosen - len(turns)), waiting)
                    turn.go_on()
                    # Whoever ran last is the first to be asked.
                    turns[:0] = [] if turn.is_over else [turn]
                    while message := self._channel.basic_get(self._queue.name, no_ack=True):
                        waiting.append(message)
            finally:
                for turn in turns:
                    turn.set_free()
        return publisher._result

    def _begin(self, message: Any, waiting: list[Any]) -> Turn:
        """Return the turn that runs *message* as a worker's pool does; after it, what the main process does."""
        task = self.app.tasks[message.headers["task"]]

        def reject(_logger: object, _errors: object, requeue: bool) -> None:
            if requeue:
                message.delivery_info["redelivered"] = True
                waiting.append(message)

        turns = []

        class Pool:
            @staticmethod
            def apply_async(target: Any, args: Any, accept_callback: Any, callback: Any, **_: Any) -> None:
                accept_callback(0, 0.0)
                turns.append(Turn(task.app, lambda: target(*args), callback))

        base = symbol_by_name(task.Request)
        request = create_request_cls(base, task, Pool, "worker@here", None, app=self.app)(
            message, on_ack=lambda *_: None, on_reject=reject, app=self.app, hostname="worker@here", task=task
        )
        request.execute_using_pool(Pool)
        return turns[0]

    @contextmanager
    def _as_worker(self) -> Iterator[None]:
        """Set in this process what a worker sets in its own."""

        def before_publish(**_: object) -> None:
            gate()

        app, blocks = _state.default_app, _state.task_join_will_block()
        _state.set_default_app(self.app)
        self.app.set_current()
        _state._set_task_join_will_block(True)
        before_task_publish.connect(before_publish)
        try:
            yield
        finally:
            before_task_publish.disconnect(before_publish)
            _state._set_task_join_will_block(blocks)
            _state.set_default_app(app)
