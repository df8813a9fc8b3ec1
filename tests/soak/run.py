"""Have workers of several pools work for minutes, kill some, and see whether anything grows that should not."""

import argparse
import secrets
import sys
import time
from pathlib import Path

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE.parent), str(HERE.parent / "chaos"), str(HERE.parent.parent)]

from processes import exit_at_signals  # noqa: E402 - found by the lines above
from soak_chart import draw  # noqa: E402 - as above
from soak_stage import NEVER_KILLED, SAMPLE_SECONDS, Stage  # noqa: E402 - as above
from verdict import SHORTEST_SECONDS, judge  # noqa: E402 - as above

#: A workflow is sent so often, unless so many are under way.
LAUNCH_SECONDS = 0.4
AT_ONCE = 24
#: Between two kills, on average.
KILL_SECONDS = 20.0
#: How often workflows are looked at.
TURN_SECONDS = 0.2


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="make soak", description=__doc__)
    parser.add_argument("--minutes", type=float, default=15.0, help="of load, the first third to warm up (default: 15)")
    parser.add_argument("--seed", type=int, help="of a run that is to be repeated; any by default")
    parser.add_argument("--out", type=Path, default=Path("build/soak"), metavar="FOLDER", help="default: build/soak")
    return parser.parse_args()


def load(stage: Stage, seconds: float) -> None:
    """Have workflows under way for some time, and kill processes meanwhile."""
    next_launch = next_sample = 0.0
    next_kill = stage.fate.uniform(0, 2 * KILL_SECONDS)
    while (now := stage.seconds) < seconds:
        if now >= next_launch and stage.under_way < AT_ONCE:
            stage.launch()
            next_launch = max(next_launch + LAUNCH_SECONDS, now - LAUNCH_SECONDS)
        if now >= next_sample:
            stage.sample()
            next_sample = now + SAMPLE_SECONDS
        if now >= next_kill:
            stage.kill()
            next_kill = now + stage.fate.uniform(0, 2 * KILL_SECONDS)
        stage.tend()
        time.sleep(TURN_SECONDS)
    stage.sample()
    stage.measured.load_seconds = stage.seconds


def main() -> int:
    arguments = parse_arguments()
    exit_at_signals()
    seed = secrets.randbelow(10**6) if arguments.seed is None else arguments.seed
    print(f"Seed {seed}, {arguments.minutes:g} minutes of load", flush=True)
    with Stage(seed) as stage:
        load(stage, arguments.minutes * 60)
        print("The load has ended; waiting for what it has left", flush=True)
        left = stage.drain()
        measured, ledger, put_back = stage.measured, stage.ledger, stage.put_back
        arguments.out.mkdir(parents=True, exist_ok=True)
        (arguments.out / "logs.txt").write_text(stage.logs())
    measured.write(arguments.out)
    draw(measured, arguments.out / "soak.svg")
    findings = judge(measured, NEVER_KILLED)
    print(*findings or [f"Growth is judged of runs of {SHORTEST_SECONDS / 60:g} minutes or more"], sep="\n")
    interrupted = ", ".join(f"{count} {name}" for name, count in ledger.interrupted.items()) or "none"
    shapes = ", ".join(f"{count} {shape}" for shape, count in ledger.right.items())
    print(f"\nEnded as they should: {ledger.right.total()} workflows ({shapes})")
    workers = sum(kill.what == "worker" for kill in measured.kills)
    print(f"Interrupted by one of {len(measured.kills)} kills, {workers} of them of a whole worker: {interrupted}")
    print(f"Put back, since the Redis broker lost them with a killed process: {put_back}")
    print(f"CSV files, logs and the plot are in {arguments.out}")
    problems = [str(finding) for finding in findings if not finding.is_flat] + ledger.problems + left
    print(
        *problems or [f"{'Flat: nothing has grown, n' if findings else 'N'}othing is left, nothing is lost."], sep="\n"
    )
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
