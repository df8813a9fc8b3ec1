"""Measures over loopback, in one run, and prints figures and targets: `python -m bench [--calls N] [--json FILE]`.

`python -m bench recipe` prints instead who resumes a session in another process, and with how many requests.

A missed target is said and fails nothing: on a shared machine only ratios of one run mean something.
"""

import argparse
import json
import os
import platform
import signal
import sys
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

from bench import calls, chains, durable, imports, recipe
from bench.processes import Log, accepts, free_port, running
from bench.report import print_report, targets
from bench.store import valkey
from mcp_celery.portal import close_portal

PACKAGES = ("mcp-celery-task", "mcp", "celery", "httpx2", "openai-agents", "uvicorn")


def measure(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    with ExitStack() as stack:
        url = os.environ["BENCH_MCP_URL"] = stack.enter_context(server(folder))
        url_with_events = stack.enter_context(server(folder, "--event-store"))
        redis_url = stack.enter_context(valkey(folder))
        handle = calls.open_session(url)
        say(f"Tool calls, {options.calls} each ...")
        called = calls.measure(url, handle, options.calls)
        say(f"Durable calls, {options.calls} each ...")
        urls = {durable.WITHOUT_EVENTS: url, durable.WITH_EVENTS: url_with_events}
        journaled = durable.measure(urls, redis_url, options.calls)
        say(f"Imports, {options.imports} processes each ...")
        imported = imports.measure(options.imports)
        say(f"Chains, {options.chains} each ...")
        with chains.workers(folder, redis_url, os.environ) as app:
            chained = chains.measure(app, url, redis_url, handle.session_id, options.chains)
        close_portal()
    return {
        "environment": {
            "python": platform.python_version(),
            "system": platform.system(),
            "cores": os.cpu_count(),
            **{package: version(package) for package in PACKAGES},
        },
        "calls": called,
        "durable": journaled,
        "imports": imported,
        "handle_bytes": len(handle.dumps()),
        "chain": chained,
    }


@contextmanager
def server(folder: Path, *options: str) -> Iterator[str]:
    """Run an MCP server and give its URL."""
    port = free_port()
    log = Log(folder / f"server{''.join(options)}.log")
    with running(log, "bench.server", str(port), *options, is_ready=lambda: accepts(port)):
        yield f"http://127.0.0.1:{port}/mcp"


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__.splitlines()[0])
    parser.add_argument("what", nargs="?", choices=("speed", "recipe"), default="speed")
    parser.add_argument("--calls", type=int, default=300, help="of each kind, in blocks (default: %(default)s)")
    parser.add_argument("--imports", type=int, default=21, help="processes of each kind (default: %(default)s)")
    parser.add_argument("--chains", type=int, default=40, help="of each kind (default: %(default)s)")
    parser.add_argument("--json", type=Path, default=Path("build/bench.json"), help="default: %(default)s")
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
    os.environ["no_proxy"] = "127.0.0.1"
    with tempfile.TemporaryDirectory(prefix="mcp-celery-bench-") as folder:
        if options.what == "recipe":
            recipe.print_recipe(recipe.measure(Path(folder)))
            return 0
        results = measure(options, Path(folder))
    results["targets"] = targets(results)
    print_report(results)
    options.json.parent.mkdir(parents=True, exist_ok=True)
    options.json.write_text(json.dumps(results, indent=2) + "\n")
    print(f"\nWritten to {options.json}.")
    return 0


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
