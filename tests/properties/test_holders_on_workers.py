"""A sample of the random workflows on two real workers: what holds in one process holds there as well."""

import os

import pytest
from canvases import canvases, steps_of
from hypothesis import HealthCheck, Phase, given, settings
from real_trial import RealTrials

EXAMPLES = int(os.environ.get("MCP_CELERY_EXAMPLES", "0"))
#: Of smaller canvases there is little to see on workers.
LEAST = 8

pytestmark = [
    pytest.mark.filterwarnings("ignore:Call to deprecated setex"),
    pytest.mark.timeout(0 if EXAMPLES else 240),
]


@pytest.fixture
def real_trials(valkey_server):
    with RealTrials(f"{valkey_server.connection_url}/8") as real_trials:
        yield real_trials


def test_each_session_goes_where_it_should_and_ends_once_on_real_workers(trials, real_trials, start_worker):
    workers = [start_worker("stepping", name, env=real_trials.environment) for name in ("a", "b")]

    @settings(
        max_examples=min(EXAMPLES, 100) or 10,  # about a second each
        phases=[Phase.generate],
        database=None,
        deadline=None,
        derandomize=not EXAMPLES,
        suppress_health_check=list(HealthCheck),
    )
    @given(canvases(40).filter(lambda canvas: sum(1 for _ in steps_of(canvas)) >= LEAST))
    def check(canvas):
        real_trials.check(canvas, trials.run_plain(canvas), len(workers))

    check()
