"""The figures as tables, and the targets beside them."""

from typing import Any

from bench.calls import RAW, RAW_ASYNC, SDK, STEADY, STEP
from bench.chains import STEPS
from bench.durable import DURABLE


def targets(results: dict[str, Any]) -> list[dict[str, Any]]:
    """Return each target with its figure and whether it is met."""
    by_name = {row["name"]: row for row in results["calls"]}
    raw, raw_async, steady, step, sdk = (by_name[name] for name in (RAW, RAW_ASYNC, STEADY, STEP, SDK))
    added = results["imports"][-1]["added_ms"]
    chain = results["chain"]
    raw_posts = STEPS * raw["median_ms"]
    waited = max(row["round_trips"] - row["off_path"] for row in results["durable"] if row["name"] == DURABLE)
    checked = [
        at_most("a resumed call takes at most 1.5 x a raw POST", steady["median_ms"], raw["median_ms"]),
        at_most("... and at most 1.5 x one on an event loop", steady["median_ms"], raw_async["median_ms"]),
        ("a resumed call is 1 HTTP request", steady["requests"], "", steady["requests"] == 1),
        ("a resumed step is 1 HTTP request", step["requests"], "", step["requests"] == 1),
        faster("a resumed call is at least 4 x faster than a fresh SDK session", sdk, steady),
        faster("a resumed step is at least 4 x faster than a fresh SDK session", sdk, step),
        ("the import adds less than 30 ms to Celery's", added, "ms", added < 30),
        ("a handle takes less than 512 bytes", results["handle_bytes"], "bytes", results["handle_bytes"] < 512),
        at_most(f"the MCP part of a chain takes at most 1.5 x {STEPS} raw POSTs", chain["mcp_part_ms"], raw_posts),
        at_most("... and at most 1.5 x those made in the workers", chain["mcp_part_ms"], chain["raw_part_ms"]),
        ("a durable call waits for the store at most twice", waited, "", waited <= 2),
        ("a step in the middle asks the store once", chain["step_round_trips"], "", chain["step_round_trips"] == 1),
    ]
    return [{"target": text, "figure": figure, "unit": unit, "met": met} for text, figure, unit, met in checked]


def faster(text: str, slow: dict[str, Any], quick: dict[str, Any]) -> tuple[str, float, str, bool]:
    ratio = slow["median_ms"] / quick["median_ms"]
    return text, ratio, "x", ratio >= 4


def at_most(text: str, milliseconds: float, baseline: float) -> tuple[str, float, str, bool]:
    return text, milliseconds / baseline, "x", milliseconds <= 1.5 * baseline


def print_report(results: dict[str, Any]) -> None:
    environment = results["environment"]
    print("\n" + ", ".join(f"{name} {value}" for name, value in environment.items()))
    print_table(
        ("one tool call", "median", "x raw", "requests", "connections"),
        [
            (
                row["name"],
                f"{row['median_ms']:.2f} ms",
                f"{row['times_raw']:.2f}",
                f"{row['requests']:.2f}",
                f"{row['connections']:.2f}",
            )
            for row in results["calls"]
        ],
    )
    print_table(
        ("one further call", "median", "x plain", "store round trips", "not waited for"),
        [
            (
                f"{row['name']}, {row['server']}",
                f"{row['median_ms']:.2f} ms",
                f"{row['times_plain']:.2f}",
                f"{row['round_trips']:.2f}",
                f"{row['off_path']:.2f}",
            )
            for row in results["durable"]
        ],
    )
    print_table(
        ("import", "median", "x celery", "more than celery"),
        [
            (
                row["name"],
                f"{row['median_ms']:.0f} ms",
                f"{row['times_celery']:.2f}",
                f"{row['added_ms']:.1f} ms" if row["added_ms"] > 0 else "",
            )
            for row in results["imports"]
        ],
    )
    chain = results["chain"]
    print_table(
        (f"a chain of {chain['steps']} steps on two workers", "median", "more than without", "x raw"),
        [
            ("without MCP", f"{chain['plain_ms']:.1f} ms", "", ""),
            ("a raw POST in each step", f"{chain['raw_ms']:.1f} ms", f"{chain['raw_part_ms']:.1f} ms", "1.00"),
            (
                f"with mcp_celery ({chain['requests']} requests)",
                f"{chain['mcp_ms']:.1f} ms",
                f"{chain['mcp_part_ms']:.1f} ms",
                f"{chain['mcp_part_ms'] / chain['raw_part_ms']:.2f}",
            ),
            (
                "with mcp_celery, durable",
                f"{chain['durable_ms']:.1f} ms",
                f"{chain['durable_part_ms']:.1f} ms",
                f"{chain['durable_part_ms'] / chain['raw_part_ms']:.2f}",
            ),
        ],
    )
    print_table(
        ("a step of one call, in the middle of a chain", "store round trips"),
        [
            ("with mcp_celery", f"{chain['step_round_trips']:.2f}"),
            ("with mcp_celery, durable", f"{chain['durable_step_round_trips']:.2f}"),
        ],
    )
    print_table(
        ("target", "figure", ""),
        [
            (row["target"], f"{row['figure']:.4g} {row['unit']}".rstrip(), "met" if row["met"] else "MISSED")
            for row in results["targets"]
        ],
    )


def print_table(head: tuple[str, ...], rows: list[tuple[str, ...]]) -> None:
    lines = [head, *rows]
    first, *widths = [max(map(len, cells)) for cells in zip(*lines, strict=True)]
    print()
    for line in lines:
        cells = (cell.rjust(width) for cell, width in zip(line[1:], widths, strict=True))
        print("  ".join([line[0].ljust(first), *cells]).rstrip())
