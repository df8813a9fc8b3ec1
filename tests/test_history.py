"""What readers of a history see, also of one that another version has written."""

import pytest

from mcp_celery.history import History, duration

STEP = {"what": "step", "at": 10, "until": 12, "task": "load", "id": "1", "worker": "a@host", "outcome": "done"}


def texts(*events):
    return [(round(row.at, 3), row.worker, "  " * row.is_inner + row.text) for row in History.read(events).rows()]


def test_a_session_that_a_step_has_opened_is_told_with_the_step():
    opened = {"what": "opened", "at": 10.1, "task": "load", "id": "1", "worker": "a@host"}
    call = {"what": "tool 'add'", "at": 11, "seconds": 0.5, "ok": True}
    assert texts(opened, {**STEP, "to": ["plan", "report", "plan"], "calls": [call]}) == [
        (0, "a@host", "load: done, handed to 2 plan, report"),
        (0.1, "", "  opened"),
        (1, "", "  tool 'add'"),
    ]


def test_a_session_whose_first_step_still_runs_was_opened_by_a_task():
    opened = {"what": "opened", "at": 10.1, "task": "load", "id": "1", "worker": "a@host"}
    assert texts(opened) == [(0, "a@host", "opened by load")]
    retried = {**STEP, "at": 20, "until": 21}
    assert texts(opened, retried) == [(0, "a@host", "opened by load"), (9.9, "a@host", "load: done")]


def test_events_are_in_the_order_in_which_they_began():
    later = {**STEP, "at": 11, "until": 11.5, "task": "branch", "outcome": "failed"}
    closed = {"what": "closed", "at": 12.5, "by": "a@host", "why": "done"}
    assert [text for _, _, text in texts(later, STEP, closed)] == [
        "load: done",
        "branch: failed",
        "closed by a@host: done",
    ]


def test_what_has_gone_wrong_is_marked():
    call = {"what": "tool 'add'", "at": 10, "seconds": 1, "ok": False}
    rows = History.read([{**STEP, "outcome": "failed", "calls": [call]}, {"what": "lost", "at": 13}]).rows()
    assert [row.text for row in rows if row.is_bad] == ["load: failed", "tool 'add': failed", "lost"]


def test_a_history_of_another_version_is_read_as_far_as_it_goes():
    strange = [
        {},
        {"what": "pinged"},
        {"what": "step"},
        {"what": "step", "at": "soon", "until": 3, "to": "x", "calls": [None, {}], "task": 7},
        {"what": "closed", "at": 5, "why": None},
    ]
    assert texts(*strange) == [
        (0, "", "?: ended"),
        (0, "", "7: ended"),
        (0, "", "  ?"),
        (0, "", "?"),
        (0, "", "pinged"),
        (0, "", "closed"),
    ]
    assert texts() == []


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (-1, "0s"),
        (0, "0s"),
        (0.0001, "0ms"),
        (0.0199999, "20ms"),
        (0.9996, "1s"),
        (1.25, "1.2s"),
        (59.94, "59.9s"),
        (60, "1m 0s"),
        (192.5, "3m 12s"),
        (7500, "2h 5m"),
        (190_000, "2d 4h"),
    ],
)
def test_durations_are_for_people(seconds, text):
    assert duration(seconds) == text
