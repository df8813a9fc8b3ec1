"""What an import costs: fresh processes, in turn."""

import subprocess
import sys
from statistics import median

TIMED = "import time; begun = time.perf_counter(); {}; print(time.perf_counter() - begun)"
STATEMENTS = {
    "import celery": "import celery",
    "from celery import Celery, Task": "from celery import Celery, Task",
    "... and from mcp_celery import MCPTask": "from celery import Celery, Task; from mcp_celery import MCPTask",
}


def measure(runs: int) -> list[dict[str, object]]:
    """Measure each of `STATEMENTS` in *runs* processes, and compare with Celery's within each turn."""
    seconds: dict[str, list[float]] = {name: [] for name in STATEMENTS}
    for _ in range(runs + 1):
        for name, statement in STATEMENTS.items():
            command = [sys.executable, "-c", TIMED.format(statement)]
            seconds[name].append(float(subprocess.run(command, check=True, capture_output=True, text=True).stdout))
    # The first round writes bytecode and warms the disk cache.
    measured = {name: values[1:] for name, values in seconds.items()}
    _, celery, _ = measured.values()
    return [
        {
            "name": name,
            "median_ms": median(values) * 1000,
            "times_celery": median(values) / median(celery),
            "added_ms": median(one - other for one, other in zip(values, celery, strict=True)) * 1000,
        }
        for name, values in measured.items()
    ]
