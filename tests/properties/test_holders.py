"""Random workflows with random failures: each session goes where it should, and ends once, after its last holder.

`MCP_CELERY_EXAMPLES=2000` tries so many canvases, and others than the usual ones.
"""

import os

import pytest
from canvases import canvases
from faults import FAULTS
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from invariants import ViolationError

#: Hypothesis keeps all choices of a round in memory.
ROUND = 250
EXAMPLES = int(os.environ.get("MCP_CELERY_EXAMPLES", "0"))

pytestmark = [
    # What redis-py thinks of how Celery uses it.
    pytest.mark.filterwarnings("ignore:Call to deprecated setex"),
    pytest.mark.timeout(0 if EXAMPLES else 240),
]
usual = settings(
    database=None, deadline=None, derandomize=not EXAMPLES, print_blob=True, suppress_health_check=list(HealthCheck)
)


def rounds(count):
    """Sizes of rounds, *count* in all."""
    return [min(ROUND, count - begun) for begun in range(0, count, ROUND)]


def check_all(trials, strategy, **options):
    """Check random canvases, in random orders."""

    @settings(usual, **options)
    @given(strategy, st.randoms(use_true_random=False))
    def check(canvas, random):
        trials.check(canvas, lambda count: random.randrange(count) if count > 1 else 0)

    check()


def test_each_session_goes_where_it_should_and_ends_once(trials):
    for size in rounds(EXAMPLES or 60):
        check_all(trials, canvases(40), max_examples=size)


@pytest.mark.parametrize("shapes", dict.fromkeys(FAULTS.values()), ids=lambda shapes: shapes.__name__)
def test_nothing_is_found_in_the_shapes_of_the_faults_without_them(trials, shapes):
    check_all(trials, canvases(15, shapes()), max_examples=20)


@pytest.mark.parametrize("plant", FAULTS, ids=lambda plant: plant.__name__)
def test_a_planted_fault_is_found(trials, monkeypatch, plant):
    shapes = canvases(15, FAULTS[plant]())
    plant(monkeypatch)
    with pytest.raises(ViolationError):
        check_all(trials, shapes, max_examples=300, phases=[Phase.generate], report_multiple_bugs=False)
