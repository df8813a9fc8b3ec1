"""The verdict on a soak can fail: on samples that are made up."""

from dataclasses import replace

import pytest
from samples import Kill, Measured, ProcessSample, TotalSample
from verdict import RISE_MB_A_MINUTE, judge, slope

LOAD_SECONDS = 600.0
STEADY = ProcessSample(0.0, "prefork", "child", 7, rss_mb=90.0, threads=4, sockets=8, descriptors=30)


def measured(process=lambda sample: sample, total=lambda sample: sample, *, until=LOAD_SECONDS):
    """Return ten minutes of samples, each changed by what is given, and a minute of quiet after them."""
    times = range(0, int(LOAD_SECONDS) + 60, 5)
    return Measured(
        LOAD_SECONDS,
        [process(replace(STEADY, seconds=float(at))) for at in times if at <= until],
        [total(TotalSample(float(at), sessions=5, keys=200, marks=at, under_way=5, ended=at)) for at in times],
        [Kill(100.0, "child", 9)],
    )


def not_flat(found, expected=()):
    return [(finding.what, finding.measure) for finding in judge(found, expected) if not finding.is_flat]


def test_what_stays_as_it_is_is_flat():
    assert not_flat(measured()) == []


def test_noise_and_a_warm_up_are_flat():
    def noisy(sample):
        at = sample.seconds
        return replace(sample, rss_mb=90 + min(at, 100) / 10 + at % 3, threads=4 + int(at) % 2, sockets=8 + int(at) % 4)

    assert not_flat(measured(noisy, lambda total: replace(total, keys=200 + int(total.seconds) % 30))) == []


def test_memory_that_grows_all_the_time_is_not_flat():
    def leaking(sample):
        return replace(sample, rss_mb=90 + 4 * RISE_MB_A_MINUTE * sample.seconds / 60)

    (finding,) = [finding for finding in judge(measured(leaking)) if not finding.is_flat]
    assert (finding.what, finding.measure) == ("prefork child (7)", "memory")
    assert finding.figure.startswith(f"{4 * RISE_MB_A_MINUTE:+.3f} MB a minute")


@pytest.mark.parametrize("measure", ["threads", "sockets", "descriptors"])
def test_what_is_opened_and_not_closed_is_not_flat(measure):
    def leaking(sample):
        return replace(sample, **{measure: getattr(sample, measure) + int(sample.seconds / 30)})

    assert not_flat(measured(leaking)) == [("prefork child (7)", measure)]


@pytest.mark.parametrize(("measure", "field"), [("open sessions", "sessions"), ("keys", "keys")])
def test_sessions_and_keys_that_pile_up_are_not_flat(measure, field):
    def leaking(total):
        return replace(total, **{field: getattr(total, field) + int(total.seconds)})

    assert not_flat(measured(total=leaking)) == [("all together", measure)]


def test_a_process_that_was_killed_early_is_not_judged_by_itself():
    assert not_flat(measured(lambda sample: replace(sample, rss_mb=sample.seconds), until=300)) == []


def test_a_process_that_should_have_lived_and_has_not_is_not_flat():
    early = measured(until=300)
    assert not_flat(early, ["prefork child"]) == [("prefork child", "life")]
    assert not_flat(measured(), ["prefork child"]) == []


def test_what_grows_after_the_load_has_ended_is_not_judged():
    late = measured(lambda sample: replace(sample, rss_mb=90 + max(0, sample.seconds - LOAD_SECONDS)), until=660)
    assert not_flat(late) == []


def test_a_run_that_is_all_warm_up_is_not_judged():
    short = measured(lambda sample: replace(sample, rss_mb=sample.seconds))
    assert not_flat(short) == [("prefork child (7)", "memory")]
    assert not_flat(replace(short, load_seconds=60.0)) == []


def test_a_line_is_fitted_by_least_squares():
    assert slope([(0, 1), (1, 3), (2, 5)]) == pytest.approx(2)
    assert slope([(0, 0), (1, 2), (2, 0)]) == pytest.approx(0)
    assert slope([(1, 4)]) == 0


def test_samples_are_the_same_out_of_their_files(tmp_path):
    written = measured()
    written.write(tmp_path)
    assert Measured.read(tmp_path, LOAD_SECONDS) == written
