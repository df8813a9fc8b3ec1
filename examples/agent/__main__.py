"""Two agents on two workers with all that it takes: run by `make agent`."""

import sys

from examples.demo import Parts, stage


def play(parts: Parts) -> None:
    parts.run("workflow", "examples.agent.run")


if __name__ == "__main__":
    sys.exit(stage(play, "examples.agent.tasks"))
