"""Workers are killed at each named point, and some at random: what `make chaos` does for longer, on all servers."""

from random import Random

import pytest
from arena import Arena
from campaign import Campaign
from celery_versions import skip_without_quick_redelivery
from points import IN_FLIGHT, IN_MAIN, POINTS

#: As long as it takes for events to come in the middle of a call.
CALL_SECONDS = 0.2
SEED = 20261122


@pytest.fixture
def campaign_on():
    """`campaign_on(server)` returns a `Campaign` on two workers; a test that fails shows what they have logged."""
    arenas = []

    def begin(server):
        arenas.append(Arena(server, Random(SEED), workers=2).__enter__())  # noqa: S311 - to be repeated
        return Campaign(arenas[-1], at_once=8, seconds=CALL_SECONDS)

    yield begin
    for arena in arenas:
        print(arena.logs())
        arena.__exit__(None, None, None)


def test_a_process_that_is_killed_costs_a_workflow_nothing_wherever_it_was(campaign_on):
    campaign = campaign_on("python, events in memory")
    campaign.kill_at(point for point in POINTS if point not in IN_MAIN)
    figures = campaign.close()
    assert figures.problems == []
    assert figures.errors == {"CallInterruptedError": list(POINTS.values()).count("interrupted")}
    assert figures.sessions_left == figures.twice == 0
    assert figures.unknown >= 1, "of the session that was opened and not recorded"


def test_a_worker_that_is_killed_is_replaced_by_another_one(campaign_on):
    skip_without_quick_redelivery()
    campaign = campaign_on("python, events in redis")
    campaign.kill_at(["tool finished, before it is read", *IN_MAIN], "worker")
    campaign.fail(["server restarted, a child killed"])
    campaign.kill_at_random(4, every_seconds=0.5, workers=0, faults=["responses cut off"])
    figures = campaign.close()
    assert figures.problems == []
    assert figures.workers_killed >= 3


def test_without_events_a_call_that_was_under_way_is_not_made_again(campaign_on):
    campaign = campaign_on("python, no events")
    campaign.kill_at(IN_FLIGHT)
    figures = campaign.close()
    assert figures.problems == []
    assert figures.errors == {"CallInterruptedError": len(IN_FLIGHT)}


def test_a_server_that_gives_the_rest_only_after_the_tool_is_asked_until_then(campaign_on):
    campaign = campaign_on("everything")
    campaign.kill_at(["after the token", "tool finished, before it is read", "in the journal"])
    figures = campaign.close()
    assert figures.problems == []
    assert figures.right == 3
