"""Kills workers for some time, and prints what came of it: `make chaos ARGS="--seed 123"`."""

import argparse
import secrets
import shlex
import sys
import time
from pathlib import Path
from random import Random

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent), str(HERE.parent.parent)]

from arena import SERVERS, Arena  # noqa: E402 - found by the lines above
from campaign import Campaign, Figures, table  # noqa: E402 - as above
from outages import AT_ANY_TIME, FAULTS  # noqa: E402 - as above
from points import IN_MAIN, POINTS  # noqa: E402 - as above
from processes import exit_at_signals  # noqa: E402 - as above


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="make chaos", description=__doc__)
    parser.add_argument("--seed", type=int, help="of a run that is to be repeated; any by default")
    parser.add_argument(
        "--kills",
        type=int,
        default=200,
        help="at least so many, over all servers (default: 200); every point is visited in any case, "
        "which takes about 190 on all of them",
    )
    parser.add_argument("--server", action="append", choices=SERVERS, help="only this one; may be repeated")
    parser.add_argument("--no-faults", action="store_true", help="kill only")
    parser.add_argument("--keep", type=Path, metavar="FOLDER", help="write the workers' logs of failed servers there")
    return parser.parse_args()


def run(server: str, seed: int, kills: int, arguments: argparse.Namespace) -> Figures:
    random = Random(f"{seed} {server}")  # noqa: S311 - to be repeated, not to be secret
    begun = time.monotonic()

    def say(what: str) -> None:
        print(f"  {time.monotonic() - begun:5.0f} s  {what}", flush=True)

    workers = random.randint(2, 4)
    print(f"{server}: {workers} workers", flush=True)
    with Arena(server, random, workers=workers) as arena:
        campaign = Campaign(arena, say=say)
        campaign.kill_at(point for point in POINTS if point not in IN_MAIN)
        campaign.kill_at(POINTS, "worker")
        left = max(0, kills - arena.all_kills())
        if arguments.no_faults:
            campaign.kill_at_random(left)
        else:
            campaign.kill_at_random(left // 2)
            campaign.fail(random.sample(list(FAULTS), len(FAULTS)))
            campaign.kill_at_random(left - left // 2, faults=AT_ANY_TIME)
        figures = campaign.close()
        say("all sessions have ended" if not figures.sessions_left else "sessions are left")
        if figures.problems and arguments.keep is not None:
            arguments.keep.mkdir(parents=True, exist_ok=True)
            (arguments.keep / f"{server}.log").write_text(arena.logs())
    return figures


def main() -> int:
    arguments = parse_arguments()
    exit_at_signals()
    seed = secrets.randbelow(10**6) if arguments.seed is None else arguments.seed
    print(f"Seed {seed}", flush=True)
    servers = arguments.server or list(SERVERS)
    all_figures = [run(server, seed, -(-arguments.kills // len(servers)), arguments) for server in servers]
    print(f"\n{table(all_figures)}\n")
    for figures in all_figures:
        for problem in figures.problems:
            print(f"{figures.server}: {problem}")
    if any(figures.problems for figures in all_figures):
        given = sys.argv[1:] if arguments.seed is not None else ["--seed", str(seed), *sys.argv[1:]]
        print(f'Once more: make chaos ARGS="{shlex.join(given)}"')
        return 1
    print("No call was executed twice, no result is wrong, no session is left.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
