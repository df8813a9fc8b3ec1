"""Each way in which a task can end, in each place of a workflow: its session ends once, and under nobody's hands."""

import pytest
from billiard.exceptions import SoftTimeLimitExceeded
from celery import chain, chord, group
from celery_versions import parameters
from processes import wait_until
from recorded import CALL, assert_sessions, texts_of
from signatures import failed_by, linked, still


def said_by_errbacks(project):
    """What errbacks have given to the tool that they call, in order."""
    texts = texts_of(project.recorder.exchanges)
    return [text for text in texts if text in {"published", "fails itself"} or text.startswith("in place")]


IN_PLACE = "in place ValueError"

#: Name: the workflow, what its errbacks say, and the number of calls.
ERRBACKS = {
    "called in place": (lambda s: failed_by(s.ends(0, "failure"), s.on_error()), [IN_PLACE], 2),
    "published": (lambda s: failed_by(s.ends(0, "failure"), s.on_error_of()), ["published"], 2),
    "of both kinds": (
        lambda s: failed_by(s.ends(0, "failure"), s.on_error_of(), s.on_error(), still(s.add(1, 1))),
        [IN_PLACE, "published"],
        4,
    ),
    "of a step in the middle": (
        lambda s: chain(s.add(1, 1), failed_by(s.ends("failure"), s.on_error()), s.add(1)),
        [IN_PLACE],
        3,
    ),
    "of a step whose retries are exhausted": (
        lambda s: chain(s.add(1, 1), failed_by(s.ends("retries"), s.on_error()), s.add(1)),
        [IN_PLACE],
        4,
    ),
    "of a plain step in the middle, called in place": (
        lambda s: chain(s.add(1, 1), failed_by(s.ends_plainly("failure"), s.on_error()), s.add(1)),
        [IN_PLACE],
        2,
    ),
    "of a plain step in the middle, published": (
        lambda s: chain(s.add(1, 1), failed_by(s.ends_plainly("failure"), s.on_error_of()), s.add(1)),
        ["published"],
        2,
    ),
    "of a plain step that the session does not go past": (
        lambda s: chain(s.add(1, 1), s.plus_one(), failed_by(s.ends_plainly("failure"), s.on_error())),
        [IN_PLACE],
        [1, 1],
    ),
    "of a workflow": (
        lambda s: failed_by(chain(s.add(1, 1), s.plus_one(), s.ends("failure"), s.add(1)), s.on_error()),
        [IN_PLACE],
        3,
    ),
    "of a member": (
        lambda s: chain(s.add(1, 1), group(failed_by(s.ends("failure"), s.on_error()), s.add(1)), s.total()),
        [IN_PLACE],
        4,
    ),
    "of a body whose header fails, called in place": (
        lambda s: chain(s.add(1, 1), chord([s.ends("failure"), s.add(1)], failed_by(s.total(), s.on_error()))),
        ["in place ChordError"],
        4,
    ),
    "of a body whose header fails, published": (
        lambda s: chain(s.add(1, 1), chord([s.ends("failure"), s.add(1)], failed_by(s.total(), s.on_error_of()))),
        ["published"],
        4,
    ),
    "of a body whose header fails in two members": (
        lambda s: chain(
            s.add(1, 1), chord([s.ends("failure"), s.add(1), s.ends("failure")], failed_by(s.total(), s.on_error()))
        ),
        ["in place ChordError"],
        5,
    ),
    "of a plain body whose header fails": (
        lambda s: chain(s.add(1, 1), chord([s.ends("failure"), s.add(1)], failed_by(s.plain_total(), s.on_error()))),
        ["in place ChordError"],
        4,
    ),
    "of a body that fails": (
        lambda s: chain(s.add(1, 1), chord([s.add(1), s.add(1)], failed_by(still(s.ends(0, "failure")), s.on_error()))),
        [IN_PLACE],
        5,
    ),
    "of a member and of the body": (
        lambda s: chain(
            s.add(1, 1),
            chord([failed_by(s.ends("failure"), s.on_error()), s.add(1)], failed_by(s.total(), s.on_error())),
        ),
        [IN_PLACE, "in place ChordError"],
        5,
    ),
    "of a body whose header has a failing chain": (
        lambda s: chain(
            s.add(1, 1),
            chord([chain(s.ends("failure"), s.plus_one(), s.add(1)), s.add(1)], failed_by(s.total(), s.on_error())),
        ),
        ["in place ChordError"],
        4,
    ),
    "of a group as the body": (
        lambda s: chain(
            s.add(1, 1), chord([s.ends("failure"), s.add(1)], group(failed_by(s.total(), s.on_error()), s.total()))
        ),
        [IN_PLACE],
        4,
    ),
    "of a chord within a header": (
        lambda s: chain(
            s.add(1, 1),
            chord(
                [chord([s.ends("failure"), s.add(1)], failed_by(s.total(), s.on_error())), s.add(1)],
                failed_by(s.total(), s.on_error()),
            ),
        ),
        ["in place ChordError"],  # Celery never ends the outer chord
        5,
    ),
    "of a body with a step behind it, within what replaces a task": (
        lambda s: s.replaced_by(
            1, chain(chord([s.ends(0, "failure"), s.add(1, 1)], failed_by(s.total(), s.on_error())), s.add(1))
        ),
        ["in place ChordError"],
        4,
    ),
    "of an errback that fails itself": (
        lambda s: chain(s.add(1, 1), failed_by(s.ends("failure"), s.fails_on_error(), s.on_error()), s.add(1)),
        ["fails itself", IN_PLACE],
        4,
    ),
    "of a task that is replaced": (
        lambda s: failed_by(chain(s.replaced_by(1, s.ends(0, "failure")), s.add(1)), s.on_error()),
        [IN_PLACE],
        3,
    ),
    "of a body, where a member of the header is rejected": (
        lambda s: chain(s.add(1, 1), chord([s.ends("reject"), s.add(1)], failed_by(s.total(), s.on_error()))),
        ["in place ChordError"],
        4,
    ),
    "of a body, where a chain in the header is rejected at its beginning": (
        lambda s: chain(
            s.add(1, 1), chord([chain(s.ends("reject"), s.add(1)), s.add(1)], failed_by(s.total(), s.on_error()))
        ),
        ["in place ChordError"],
        4,
    ),
    "of a mapped list": (
        lambda s: failed_by(s.tasks.ends.starmap([(1, "failure")]), s.on_error()),
        [IN_PLACE],
        2,
    ),
    "that is a chain of immutable steps": (
        lambda s: chain(s.add(1, 1), failed_by(s.ends("failure"), chain(still(s.add(1, 1)), s.plus_one(), s.add(1)))),
        [],
        4,
    ),
    "that is a group": (
        lambda s: chain(s.add(1, 1), failed_by(s.ends("failure"), group(s.on_error_of(), still(s.add(1, 1))))),
        ["published"],
        4,
    ),
    "that has a link": (
        lambda s: chain(s.add(1, 1), failed_by(s.ends("failure"), linked(s.on_error_of(), still(s.add(1, 1))))),
        ["published"],
        4,
    ),
    "of a plain step behind a body whose header fails": (
        lambda s: chain(
            s.add(1, 1),
            chord([s.ends("failure"), s.add(1)], s.plain_total()),
            failed_by(s.plus_one(), s.on_error()),
            s.add(1),
        ),
        [],
        3,
    ),
    "of a chord whose body is a chain": (
        lambda s: chain(
            s.add(1, 1),
            failed_by(chord([s.ends("failure"), s.add(1)], chain(failed_by(s.total(), s.on_error()), s.add(1)))),
        ),
        ["in place ChordError"],
        4,
    ),
    "of a chain within a header that has a chord": (
        lambda s: chain(
            s.add(1, 1),
            chord(
                [chain(chord([s.ends("failure"), s.add(1)], s.total()), s.add(1)), s.add(1)],
                failed_by(s.total(), s.on_error()),
            ),
        ),
        ["in place ChordError"],
        5,
    ),
}


#: Celery 5.6 calls none of these, with no sessions either.
NEW_ERRBACKS = [
    "of a chord whose body is a chain",
    "of a group as the body",
    "of a chain within a header that has a chord",
    "of a mapped list",
    "of an errback that fails itself",
    "of a body with a step behind it, within what replaces a task",
    "of a body, where a member of the header is rejected",
    "of a body, where a chain in the header is rejected at its beginning",
]


@pytest.mark.parametrize("errback", parameters(ERRBACKS, new=NEW_ERRBACKS))
def test_an_errback_gets_the_live_session_and_ends_it(project, s, errback):
    flow, said, calls = ERRBACKS[errback]
    with pytest.raises(Exception, match=r"failure|retries|reject|Dependency"):
        project.run(flow(s))
    assert_sessions(project, calls)
    assert sorted(said_by_errbacks(project)) == sorted(said)


def test_errbacks_of_workflows_that_succeed_do_not_run_and_hold_no_session(project, s):
    flow = chain(
        s.add(1, 1), failed_by(s.plus_one(), s.on_error()), chord([s.add(1)], failed_by(s.total(), s.on_error()))
    )
    assert project.run(flow) == 4
    assert_sessions(project, 3)


@pytest.mark.parametrize("step", ["ends", "ends_plainly"])
def test_the_errback_of_a_body_is_not_waited_for_where_a_member_of_the_header_is_ignored(project, s, step):
    ignored = getattr(s, step)("ignore")
    chain(s.add(1, 1), chord([ignored, s.add(1)], failed_by(s.total(), s.on_error()))).apply_async()
    assert_sessions(project, 3 if step == "ends" else 2)


def test_the_errback_of_a_body_is_not_waited_for_where_a_chord_in_the_header_fails_as_well(project, s):
    inner = chord([s.ends_plainly("failure")], s.total())
    # Celery does not tell the outer chord that the inner one has failed: it never ends.
    chain(s.add(1, 1), chord([s.ends("failure"), inner], failed_by(s.total(), s.on_error()))).apply_async()
    assert_sessions(project, 2)


def test_an_errback_uses_a_session_that_lives_or_opens_its_own(project, s):
    flow = chain(linked(s.add(1, 1), s.add(1)), failed_by(s.ends_plainly("failure"), s.on_error()))
    with pytest.raises(ValueError, match="failure"):
        project.run(flow)
    wait_until(lambda: project.recorder.methods().count(CALL) == 3)
    assert_sessions(project, [3] if len(project.recorder.session_ids) == 1 else [1, 2])


# Ends in each place


#: Name: a workflow with a step that ends there, and the number of calls when that step makes one.
PLACES = {
    "first step": (lambda s, step: chain(step(0), s.add(1), s.add(1)), 1),
    "only step": (lambda _, step: step(0), 1),
    "step in the middle": (lambda s, step: chain(s.add(1, 1), step(), s.add(1)), 2),
    "last step": (lambda s, step: chain(s.add(1, 1), s.add(1), step()), 3),
    "step before a group": (lambda s, step: chain(s.add(1, 1), step(), group(s.add(1), s.add(1)), s.total()), 2),
    "member of a header": (lambda s, step: chain(s.add(1, 1), group(step(), s.add(1), s.add(1)), s.total()), 4),
    "all members of a header": (lambda s, step: chain(s.add(1, 1), group(step(), step()), s.total()), 3),
    "member of a header with a plain body": (
        lambda s, step: chain(s.add(1, 1), group(step(), s.add(1)), s.plain_total(), s.add(1)),
        3,
    ),
    "beginning of a chain in a header": (
        lambda s, step: chain(s.add(1, 1), group(chain(step(), s.plus_one(), s.add(1)), s.add(1)), s.total()),
        3,
    ),
    "end of a chain in a header": (
        lambda s, step: chain(s.add(1, 1), group(chain(s.add(1), step()), s.add(1)), s.total()),
        4,
    ),
    "member of a header within a header": (
        lambda s, step: chain(
            s.add(1, 1), chord([chord([step(), s.add(1)], s.total()), s.add(1)], s.total()), s.add(1)
        ),
        4,
    ),
    "body of a chord within a header": (
        lambda s, step: chain(s.add(1, 1), chord([chord([s.add(1)], step()), s.add(1)], s.total()), s.add(1)),
        4,
    ),
    "member of a header whose body is a group": (
        lambda s, step: chain(s.add(1, 1), chord([step(), s.add(1)], group(s.total(), s.total()))),
        3,
    ),
    "body": (lambda s, step: chain(s.add(1, 1), group(s.add(1), s.add(1)), step(), s.add(1)), 4),
    "member of a body that is a group": (
        lambda s, step: chain(s.add(1, 1), chord([s.add(1)], group(step(), s.total())), s.total()),
        4,
    ),
    "member of a group at the end": (lambda s, step: chain(s.add(1, 1), group(step(), s.add(1))), 3),
    "link": (lambda s, step: chain(linked(s.add(1, 1), step()), s.add(1)), 3),
    "step with a link": (lambda s, step: chain(s.add(1, 1), linked(step(), s.add(1)), s.add(1)), 2),
    "replacement": (lambda s, step: chain(s.add(1, 1), s.replaced_by(step(0)), s.add(1)), 3),
}
#: Name: how often the step runs.
ENDS = {"failure": 1, "retries": 2, "ignore": 1, "reject": 1}
#: Where a session goes past the step, should it be a plain one.
PASSED = [place for place in PLACES if place not in {"first step", "only step"}]


@pytest.mark.parametrize("place", PLACES)
def test_wherever_and_however_a_task_ends_its_session_ends_once(project, s, place):
    flow, calls = PLACES[place]
    steps = 2 if place == "all members of a header" else 1
    for how in ENDS:
        flow(s, lambda *args, how=how: s.ends(*args, how)).apply_async()
    assert_sessions(project, [calls + (times - 1) * steps for times in ENDS.values()])


@pytest.mark.parametrize("place", PASSED)
def test_wherever_and_however_a_plain_task_ends_the_session_that_went_past_it_ends_once(project, s, place):
    flow, calls = PLACES[place]
    steps = 2 if place == "all members of a header" else 1
    for how in ENDS:
        flow(s, lambda *args, how=how: s.ends_plainly(*args, how)).apply_async()
    assert_sessions(project, [calls - steps] * len(ENDS))


# Steps that cannot be published


#: Name: a workflow with a step that has too many arguments, and the number of calls.
WRONG_ARITY = {
    "next step": (lambda s: chain(s.add(1, 1), s.add(1, 2)), 1),
    "step behind a plain one": (lambda s: chain(s.add(1, 1), s.plus_one(), s.add(1, 2)), 1),
    "first member of a header": (lambda s: chain(s.add(1, 1), group(s.add(1, 2), s.add(1)), s.total()), 1),
    "step of a chain in a header": (
        lambda s: chain(s.add(1, 1), group(chain(s.add(1), s.add(1, 2)), s.add(1)), s.total()),
        3,
    ),
    "link": (lambda s: chain(linked(s.add(1, 1), s.add(1, 2)), s.add(1)), 1),
    "step of which an errback is told in place": (
        lambda s: chain(failed_by(s.add(1, 1), s.on_error()), s.add(1, 2)),
        2,
    ),
    "step of which an errback is told by a message": (
        lambda s: chain(failed_by(s.add(1, 1), s.on_error_of()), s.add(1, 2)),
        2,
    ),
    "step behind a plain one of which an errback is told": (
        lambda s: chain(s.add(1, 1), failed_by(s.plus_one(), s.on_error_of()), s.add(1, 2)),
        2,
    ),
    "replacement": (lambda s: chain(s.add(1, 1), s.replaced_by(s.add(1, 2, 3)), s.add(1)), 2),
}


@pytest.mark.parametrize("place", WRONG_ARITY)
def test_a_step_that_cannot_be_published_ends_the_session(project, s, place):
    flow, calls = WRONG_ARITY[place]
    flow(s).apply_async()
    assert_sessions(project, calls)


# Other ends


def test_a_list_that_is_mapped_fails_with_what_follows_it(project, s):
    flow = chain(s.tasks.ends.starmap([(1, "failure")]), s.plain_total(), s.add(1))
    with pytest.raises(ValueError, match="failure"):
        project.run(flow)
    assert_sessions(project, 1)


def test_a_list_that_is_mapped_fails_after_some_items_with_what_follows_it(project, s):
    flow = chain(s.tasks.fails_at.starmap([(1, 3), (2, 3), (3, 3), (4, 3)]), s.plain_total(), s.add(1))
    with pytest.raises(ValueError, match="3"):
        project.run(flow)
    assert_sessions(project, 3)


def slow_member(s):
    """A step that the server takes some time for, and whose result says whether it was let."""
    slow = s.tasks.slow.si(10, 0.05).set(queue="b")
    slow.freeze()
    return slow


def test_a_member_that_fails_after_it_has_detached_ends_the_session_for_the_body(project, s):
    slow = slow_member(s)
    with pytest.raises(ValueError, match="2"):
        project.run(chain(s.add(1, 1), group(s.fails_detached().set(queue="a"), slow), s.total()))
    assert_sessions(project, 3)
    assert len(project.app.AsyncResult(slow.id).get(timeout=60)) == 10


def test_a_soft_time_limit_ends_the_session_after_the_other_members(project, s):
    hangs = s.ends("hang").set(soft_time_limit=1)
    with pytest.raises(SoftTimeLimitExceeded):
        project.run(chain(s.add(1, 1), group(hangs, chain(s.add(1), s.add(1))), s.total()))
    assert_sessions(project, 4)


def test_a_soft_time_limit_ends_the_session_carried_past_a_plain_task(project, s):
    hangs = s.ends_plainly("hang").set(soft_time_limit=1)
    with pytest.raises(SoftTimeLimitExceeded):
        project.run(chain(s.add(1, 1), hangs, s.add(1)))
    assert_sessions(project, 1)


def test_a_task_that_is_terminated_ends_the_session_after_the_other_members(project, s):
    hangs, slow = s.ends("hang").set(queue="a"), slow_member(s)
    hangs.freeze()
    chain(s.add(1, 1), group(hangs, slow), s.total()).apply_async()
    project.recorder.wait_for(lambda exchange: "hang" in str(exchange.rpc_params))
    project.app.control.revoke(hangs.id, terminate=True)
    assert_sessions(project, 3)
    assert len(project.app.AsyncResult(slow.id).get(timeout=60)) == 10


def test_a_task_that_catches_the_failure_of_itself_as_a_function_keeps_no_session_for_its_errbacks(project, s):
    assert project.run(chain(failed_by(s.catches_itself(), s.on_error()), s.add(1))) == 2
    assert_sessions(project, [1, 2])
