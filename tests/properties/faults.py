"""Faults to plant in the package, each of which the property has to find."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import canvases
import pytest
from hypothesis import strategies as st

from mcp_celery import redis_store
from mcp_celery.execution import Execution
from mcp_celery.redis_store import RedisStore
from mcp_celery.store import Change, Leaving, Standing
from mcp_celery.workflow import Ahead, Canvas, Carried

Plant = Callable[[pytest.MonkeyPatch], None]


def the_end_of_a_failed_task_forgets_what_will_never_run(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Canvas, "hopeless_after", lambda _, __: Ahead())


def the_end_of_a_failed_task_forgets_the_bodies_of_chords(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Canvas, "_give_up", lambda *_, **__: None)


def only_the_first_of_several_links_is_bound(patch: pytest.MonkeyPatch) -> None:
    whole = Canvas.ahead_of

    def ahead_of(self: Canvas, request: Any) -> Ahead:
        links = request.callbacks
        request.callbacks = (links or [])[:1]
        try:
            return whole(self, request)
        finally:
            request.callbacks = links

    patch.setattr(Canvas, "ahead_of", ahead_of)


def bodies_of_chords_are_not_bound(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Canvas, "_visit_body", lambda *_: False)


def a_plain_task_is_not_looked_past(patch: pytest.MonkeyPatch) -> None:
    whole = Canvas._visit

    def visit(self: Canvas, signature: Any, ahead: Ahead) -> bool:
        is_plain = not signature.get("subtask_type") and not self._is_mcp_task(signature["task"])
        return is_plain or whole(self, signature, ahead)

    patch.setattr(Canvas, "_visit", visit)


def branches_merge(patch: pytest.MonkeyPatch) -> None:
    whole = Canvas.ahead_of

    def ahead_of(self: Canvas, request: Any) -> Ahead:
        ahead = whole(self, request)
        if request.chord and not ahead.tasks:
            self._visit(request.chord, ahead)
        return ahead

    patch.setattr(Canvas, "ahead_of", ahead_of)


def a_holder_leaves_before_the_next_ones_join(patch: pytest.MonkeyPatch) -> None:
    change = RedisStore.change

    def change_in_two_steps(self: RedisStore, handle: Any, asked: Change) -> Standing:
        if not (asked.leaving and asked.joining):
            return change(self, handle, asked)
        standing = change(self, handle, replace(asked, joining={}))
        change(self, handle, replace(asked, leaving=(), events=()))
        return standing

    patch.setattr(RedisStore, "change", change_in_two_steps)


def a_holder_leaves_and_then_asks_whether_it_was_the_last(patch: pytest.MonkeyPatch) -> None:
    """Two that leave at once may both find that nobody is left."""
    change = RedisStore.change

    def change_and_ask(self: RedisStore, handle: Any, asked: Change) -> Standing:
        if asked.when_empty is not Leaving.CLOSE or not asked.leaving:
            return change(self, handle, asked)
        standing = change(self, handle, replace(asked, when_empty=Leaving.ABANDON))
        is_left = not self._client().hlen(self._key("holders", handle.key))
        return Standing.LAST if standing is Standing.HELD and is_left else standing

    patch.setattr(RedisStore, "change", change_and_ask)


def who_has_left_may_still_join(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(redis_store, "_CHANGE", redis_store._CHANGE.replace("redis.call('SISMEMBER', left, id) == 0", "true"))


def the_store_is_not_asked_who_else_holds_the_session(patch: pytest.MonkeyPatch) -> None:
    pass_on = Execution._pass_on

    def pass_on_or_close(self: Execution, handle: Any, change: Any) -> None:
        pass_on(self, handle, change)
        if not change.joining:
            self._close(handle)

    patch.setattr(Execution, "_pass_on", pass_on_or_close)


def a_retry_leaves(patch: pytest.MonkeyPatch) -> None:
    def retry(self: Execution) -> None:
        if not self.is_handed_on:
            self.is_handed_on = True
            for handle in self.handles():
                self._pass_on(handle, self._step(handle, "retried"))

    patch.setattr(Execution, "retry", retry)


def a_retry_gets_no_session(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Execution, "carried", lambda _: Carried())


def errbacks_are_not_counted(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Canvas, "errbacks_of", lambda _, __: [])


def only_one_session_goes_on(patch: pytest.MonkeyPatch) -> None:
    handles = Execution.handles
    patch.setattr(Execution, "handles", lambda self: handles(self)[:1])


#: Each with the shapes in which it shows soon.
FAULTS: dict[Plant, Callable[[], st.SearchStrategy[canvases.Canvas]]] = {
    the_end_of_a_failed_task_forgets_what_will_never_run: canvases.in_turn,
    the_end_of_a_failed_task_forgets_the_bodies_of_chords: canvases.with_a_chord,
    only_the_first_of_several_links_is_bound: canvases.with_links,
    bodies_of_chords_are_not_bound: canvases.with_a_chord,
    a_plain_task_is_not_looked_past: canvases.in_turn,
    branches_merge: canvases.with_a_chord,
    a_holder_leaves_before_the_next_ones_join: canvases.in_turn,
    a_holder_leaves_and_then_asks_whether_it_was_the_last: canvases.in_branches,
    who_has_left_may_still_join: canvases.past_a_failure,
    the_store_is_not_asked_who_else_holds_the_session: canvases.in_branches,
    a_retry_leaves: canvases.with_a_retry,
    a_retry_gets_no_session: canvases.in_turn,
    errbacks_are_not_counted: canvases.with_errbacks,
    only_one_session_goes_on: canvases.in_turn,
}
