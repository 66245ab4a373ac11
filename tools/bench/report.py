"""Results as a table and as JSON."""

import contextlib
import importlib.metadata
from collections.abc import Callable
from pathlib import Path
from typing import Any

from latent_attention import UnavailableError
from mla_jax.evals.provenance import provenance
from mla_jax.files import write_json
from tools.bench.peers import PeerMissing
from tools.bench.timing import Timing

WRONG = 0.03
"""A relative error beyond this is no rounding of 8 or 16 bits: the time then says nothing and is not reported."""


def origin() -> dict[str, Any]:
    """Where the numbers come from, with the versions of the packages whose kernels are compared."""
    versions = {}
    for package in ("jax", "jaxlib", "jax-triton", "torch", "triton"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[package] = importlib.metadata.version(package)
    return provenance() | {"packages": versions}


def measured(name: str, peer: bool, measure: Callable[[], tuple[Timing, float, dict[str, Any]]]) -> dict[str, Any]:
    """A row: what `measure` returns (timing, relative error, more columns), or the reason why there is nothing."""
    row = {"implementation": name, "peer": peer, "seconds": None, "reason": None}
    try:
        timing, error, more = measure()
    except (UnavailableError, PeerMissing) as e:
        return row | {"reason": str(e)}
    except Exception as e:  # whatever a kernel raises, the others shall still be measured
        return row | {"reason": f"failed: {type(e).__name__}: {' '.join(str(e).split())[:300]}"}
    row |= {"error": error, "spread": timing.spread, **more}
    if not error < WRONG:  # NaN is wrong too
        return row | {"reason": f"wrong: relative error {error:.2g}"}
    return row | {"seconds": timing.seconds}


def with_ratios(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Adds to each row, by the name of each peer, how many times the row's time the peer takes."""
    peers = {row["implementation"]: row["seconds"] for row in rows if row["peer"] and row["seconds"]}
    return [
        row | {"ratios": {name: seconds / row["seconds"] for name, seconds in peers.items()} if row["seconds"] else {}}
        for row in rows
    ]


def table(title: str, columns: dict[str, Callable[[dict[str, Any]], str]], rows: list[dict[str, Any]]) -> str:
    """Rows as Markdown, those without a time as a list of reasons below."""
    peers = [row["implementation"] for row in rows if row["peer"] and row["seconds"]]
    lines = [["", *columns, *(f"{name} / this" for name in peers)]]
    for row in rows:
        if row["seconds"]:
            cells = [cell(row) for cell in columns.values()]
            lines.append([row["implementation"], *cells, *(f"{row['ratios'][name]:.2f}" for name in peers)])
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    lines.insert(1, [f"{'-' * (width - 1)}:" if i else "-" * width for i, width in enumerate(widths)])
    text = [f"**{title}**", ""]
    for line in lines:
        padded = [
            cell.rjust(width) if i else cell.ljust(width)
            for i, (cell, width) in enumerate(zip(line, widths, strict=True))
        ]
        text.append(f"| {' | '.join(padded)} |")
    text += ["", *(f"- {row['implementation']}: {row['reason']}" for row in rows if row["reason"])]
    return "\n".join(text).rstrip() + "\n"


def publish(
    title: str, columns: dict[str, Callable[[dict[str, Any]], str]], rows: list[dict[str, Any]],
    results: dict[str, Any], path: Path | None,
) -> None:  # fmt: skip
    """Prints rows as a table, adds them to `results["rows"]`, and writes all results to `path` if there is one."""
    print(table(title, columns, rows), flush=True)
    results["rows"] += rows
    if path:
        write_json(path, results)
