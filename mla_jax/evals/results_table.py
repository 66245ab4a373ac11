"""The results of evaluated runs as one Markdown table, lengths across."""

import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from mla_jax.evals.report import format_cell, format_rate, format_value, grid, measure_title
from mla_jax.evals.results import Results, results_of_run
from mla_jax.lengths import format_length

_POOLED = ("depth", "position")
"""Parameters of cells that make no row each."""


def read_runs(folders: Sequence[Path]) -> dict[str, list[Results]]:
    """The results of evaluated runs, by the path of each below what all have in common.

    Args:
        folders: runs, and folders of runs, at any depth: whatever holds results in a folder `eval`.

    Raises:
        InputError: results that cannot be read.
    """
    places = [place.absolute().parent for folder in folders for place in sorted(folder.rglob("eval"))]
    found = {place: results for place in dict.fromkeys(places) if (results := results_of_run(place))}
    common = os.path.commonpath(found) if found else ""
    return {place.name if str(place) == common else os.path.relpath(place, common): found[place] for place in found}


def results_table(runs: dict[str, list[Results]]) -> str:
    """One row for each score, run and value of what is neither depth nor position, of which all are counted together.

    Cells are those of `format_cell`, and `format_rate` for other scores than `correct`. Below the table stands on what,
    by which commit and when the results were made.
    """
    rows: dict[tuple[str, str], dict[str, dict[int, str]]] = {}  # by task and title, by run, by length
    for run, results in runs.items():
        for each in results:
            for title, cells in _rows(each):
                rows.setdefault((each.task, title), {})[run] = cells
    lengths = sorted({length for by_run in rows.values() for cells in by_run.values() for length in cells})
    table = [["correct/n [95 % interval in %]", "run", *map(format_length, lengths)]]
    for (_, title), by_run in sorted(rows.items(), key=lambda row: row[0][0]):
        table += [[title, run, *(cells.get(n, "") for n in lengths)] for run, cells in by_run.items()]
    if len(runs) == 1:
        table = [[title, *cells] for title, _, *cells in table]
    sources = _sources([each for results in runs.values() for each in results])
    return format_markdown(table) + "".join(f"\n{line}\n" for line in sources)


def _rows(results: Results) -> Iterator[tuple[str, dict[int, str]]]:
    """Title and cells by length of the rows of one evaluation."""
    lengths, name, values, cells = grid(results.cells)
    for value in [None] if name in _POOLED else values[:-1]:
        title = results.title if value is None else f"{results.title}, {name} {format_value(name, value)}"
        yield title, {length: format_cell(cells[length, value]) for length in lengths}
    for score in results.total.rates:
        rates = {length: format_rate(cells[length, None].rates.get(score)) for length in lengths}
        yield f"{results.title}: {measure_title(score)}", rates


def _sources(results: Sequence[Results]) -> Iterator[str]:
    """Lines that name what results have in common: hardware, JAX and commit, and the days of their dates."""
    days: dict[tuple[Any, ...], list[str]] = {}
    for each in results:
        source = tuple(each.provenance.get(key) for key in ("hardware", "jax", "git_revision"))
        days.setdefault(source, []).append(str(each.provenance.get("date", ""))[:10])
    for (hardware, jax, commit), dates in days.items():
        when = " to ".join(dict.fromkeys((min(dates), max(dates))))
        yield f"{len(dates)} evaluation{'s' * (len(dates) > 1)}: {hardware}, JAX {jax}, commit {commit}, {when}"


def format_markdown(rows: Sequence[Sequence[str]]) -> str:
    """A table in Markdown, of which the first row is the head."""
    return "".join(f"| {' | '.join(row)} |\n" for row in (rows[0], ["---"] * len(rows[0]), *rows[1:]))
