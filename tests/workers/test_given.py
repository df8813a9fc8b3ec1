"""Sessions whose handles were given by hand, to several workflows at once too, and sessions that were detached."""

import pytest
from celery import chain, chord, group
from processes import wait_until
from recorded import assert_sessions, assert_well_kept, exchanges_of

from mcp_celery.settings import ServerSettings
from mcp_celery.sync_session import new_session


def open_session(project, handle=None):
    return new_session(ServerSettings(name="peer", url=project.recorder.url), handle)


def end_by_hand(project, handle):
    """End a session, which must be alive."""
    session = open_session(project, handle)
    session.call_tool("echo", {"text": "alive"})
    session.close()
    session.release()


def keep(project):
    """Open a session outside of all workflows, make one call, and return the handle."""
    session = open_session(project)
    session.call_tool("echo", {"text": "opened"})
    handle = session.detach()
    session.release()
    return handle


@pytest.fixture
def kept(project):
    """The handle of such a session."""
    return keep(project)


def test_a_session_given_to_several_workflows_ends_with_the_last_of_them(project, s, kept):
    slow = s.tasks.slow.s(10, 0.05, mcp_session=kept).set(queue="b")
    flows = [
        chain(slow, s.tasks.add.si(1, 1).set(queue="b")),
        s.add(1, 1, mcp_session=kept).set(queue="a"),
        chain(s.add(1, 1, mcp_session=kept).set(queue="a"), s.plus_one(), s.add(-1).set(queue="a")),
    ]
    assert [result.get(timeout=60) for result in [flow.apply_async() for flow in flows]] == [2, 2, 2]
    assert_sessions(project, 1 + 2 + 1 + 2)


def test_a_session_given_to_members_of_a_group_ends_after_the_last_of_them(project, s):
    """Side by side, since the members are given some time to join, and after it the reaper ends the session."""
    alone, header, one, behind, failing = (keep(project) for _ in range(5))
    flows = {
        "all members": (group(s.add(number, 1, mcp_session=alone) for number in range(4)), [1, 2, 3, 4]),
        "of a header; the body has its own": (
            chord(
                [s.add(1, 1, mcp_session=header), chain(s.add(1, 1, mcp_session=header), s.plus_one(), s.add(1))],
                s.total(),
            ),
            6,
        ),
        "one member, beside the session of the others": (
            chain(s.add(1, 1), group(s.add(1, mcp_session=one), s.add(2)), s.total()),
            7,
        ),
        "members behind a step that has its own": (
            chain(s.add(1, 1), group(s.add(1, mcp_session=behind), s.add(2, mcp_session=behind)), s.total()),
            7,
        ),
        "a member that fails, with the session of the others": (
            chain(s.add(1, 1), group(s.ends("failure", mcp_session=failing), s.add(2)), s.total()),
            None,
        ),
    }
    results = [(flow.apply_async(), result) for flow, result in flows.values()]
    for sent, result in results:
        if result is None:
            with pytest.raises(ValueError, match="failure"):
                sent.get(timeout=60)
        else:
            assert sent.get(timeout=60) == result
    assert_sessions(project, [1 + 4, 1 + 3, 1, 1 + 1, 3, 1 + 2, 2, 1 + 1, 2])


def test_a_session_given_to_two_steps_of_a_chain_is_one(project, s, kept):
    flow = chain(s.add(1, 1, mcp_session=kept), s.plus_one(), s.add(1, mcp_session=kept), s.add(1))
    assert project.run(flow) == 5
    assert_sessions(project, 1 + 3)


def test_a_session_given_to_a_later_step_takes_over_and_both_end(project, s, kept):
    flow = chain(s.add(1, 1), s.plus_one(), s.add(1, mcp_session=kept), group(s.add(1), s.add(1)), s.total())
    assert project.run(flow) == 10
    assert_sessions(project, [1, 1 + 4])


def test_a_session_given_to_a_retried_step_and_an_errback_ends_once(project, s, kept):
    failing = s.ends(1, "retries", mcp_session=kept)
    failing.link_error(s.on_error())
    with pytest.raises(ValueError, match="retries"):
        project.run(chain(failing, s.add(1)))
    assert_sessions(project, 1 + 3)


def test_a_session_given_to_a_task_that_cannot_be_sent_stays_with_its_owner(project, s, kept):
    with pytest.raises(TypeError, match="argument"):
        s.add(1, 2, 3, mcp_session=kept).apply_async()
    assert project.stored() == {}
    end_by_hand(project, kept)
    assert_sessions(project, 1 + 1)


# Detached


def test_a_detached_session_is_not_ended_by_the_workflow(project, s):
    assert project.run(chain(s.add(1, 1), s.detaches(), s.add(1))) == 3
    project.sessions_closed()
    project.rest()
    detached, other = project.recorder.session_ids
    assert [exchange.name for exchange in exchanges_of(project.recorder, detached)].count("POST tools/call") == 2
    assert_well_kept(project.recorder, detached, closed=False)
    assert_well_kept(project.recorder, other)
    assert project.stored() == {}


def test_a_session_detached_by_one_member_is_ended_by_the_others(project, s):
    assert project.run(chain(s.add(1, 1), group(s.detaches(), s.add(1)), s.total())) == 5
    assert_sessions(project, 4)


def test_a_session_detached_by_its_last_holder_lives(project, s):
    assert project.run(chain(s.add(1, 1), group(s.add(1), s.plus_one()), s.total(), s.detaches())) == 6
    project.rest()
    (detached,) = project.recorder.session_ids
    assert_well_kept(project.recorder, detached, closed=False)
    wait_until(lambda: not project.stored(), what="an empty store")


def test_a_session_that_was_given_and_detached_lives(project, s, kept):
    assert project.run(chain(s.add(1, 1, mcp_session=kept), s.detaches())) == 2
    project.rest()
    assert_well_kept(project.recorder, kept.session_id, closed=False)
    end_by_hand(project, kept)


def test_a_session_detached_and_given_on_is_ended_by_who_has_it_now(project, s):
    handle = project.run(s.tasks.keeps.s())
    assert project.run(chain(s.add(1, 1, mcp_session=handle), s.add(1))) == 3
    assert_sessions(project, 3)
