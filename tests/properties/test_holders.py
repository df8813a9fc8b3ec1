"""Random workflows with random failures: each session goes where it should, and ends once, after its last holder.

`MCP_CELERY_EXAMPLES=2000` tries so many canvases, and others than the usual ones.
"""

import os

import pytest
from canvases import canvases
from faults import FAULTS, RARE_FAULTS
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from invariants import ViolationError
from trial import Trials

EXAMPLES = int(os.environ.get("MCP_CELERY_EXAMPLES", "0"))

pytestmark = [
    # What redis-py thinks of how Celery uses it.
    pytest.mark.filterwarnings("ignore:Call to deprecated setex"),
    pytest.mark.timeout(0 if EXAMPLES else 240),
]
usual = settings(
    database=None, deadline=None, derandomize=not EXAMPLES, print_blob=True, suppress_health_check=list(HealthCheck)
)


@pytest.fixture(scope="module")
def trials(valkey_server):
    with Trials(f"{valkey_server.connection_url}/7") as trials:
        yield trials


def check_all(trials, *, most, **options):
    """Check random canvases of up to *most* tasks, in random orders."""

    @settings(usual, **options)
    @given(canvases(most), st.randoms(use_true_random=False))
    def check(canvas, random):
        trials.check(canvas, lambda count: random.randrange(count) if count > 1 else 0)

    check()


def test_each_session_goes_where_it_should_and_ends_once(trials):
    check_all(trials, most=40, max_examples=EXAMPLES or 60)


@pytest.mark.parametrize("plant", FAULTS + (RARE_FAULTS if EXAMPLES else ()), ids=lambda plant: plant.__name__)
def test_a_planted_fault_is_found(trials, monkeypatch, plant):
    plant(monkeypatch)
    with pytest.raises(ViolationError):
        check_all(trials, most=15, max_examples=EXAMPLES or 300, phases=[Phase.generate], report_multiple_bugs=False)
