"""The results of evaluated runs as a Markdown table: `python -m tools.results_table RUN [RUN ...]`."""

import argparse
from pathlib import Path

from mla_jax.errors import InputError, one_line_errors
from mla_jax.evals.results_table import read_runs, results_table


def main() -> None:
    """The command line; exit code 1 if there are no results, or some that cannot be read."""
    parser = argparse.ArgumentParser(
        prog="python -m tools.results_table",
        description="Prints all results in RUN/eval as one Markdown table: a row for each score, columns for lengths.",
    )
    parser.add_argument("runs", type=Path, nargs="+", metavar="RUN", help="a run, or a folder that holds some")
    folders = parser.parse_args().runs
    with one_line_errors():
        for folder in folders:
            if not read_runs([folder]):
                raise InputError(f"{folder} has no results; evaluate it first: python -m experiments.evaluate run=RUN")
        print(results_table(read_runs(folders)), end="")


if __name__ == "__main__":
    main()
