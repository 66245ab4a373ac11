"""Two evaluated runs side by side: `python -m tools.compare_runs BEFORE AFTER [--task TASK] [--json FILE]`."""

import argparse
from pathlib import Path

from mla_jax.errors import InputError, one_line_errors
from mla_jax.evals.cells import CORRECT
from mla_jax.evals.compare import are_paired, compare, format_comparison
from mla_jax.evals.results import Results, results_of_run
from mla_jax.files import write_json


def main() -> None:
    """The command line; exit code 1 if a run has no results, or none of the same task as the other."""
    parser = argparse.ArgumentParser(
        prog="python -m tools.compare_runs",
        description="Compares the evaluations of two runs: rates, and their differences with 95 %% intervals, which "
        "are paired where both were asked the same prompts.",
    )
    parser.add_argument("before", type=Path, help="a run that experiments.evaluate has evaluated")
    parser.add_argument("after", type=Path, help="another")
    parser.add_argument("--task", help="only this task (default: all that both have results of)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the rates of one task to FILE; needs --task")
    args = parser.parse_args()
    if args.json and not args.task:
        parser.error("--json needs --task")
    with one_line_errors():
        before, after = (_results(folder, args.task) for folder in (args.before, args.after))
        tasks = [task for task in before if task in after]
        if not tasks:
            raise InputError(
                f"{args.before} was evaluated on {', '.join(before)} and {args.after} on {', '.join(after)}: nothing "
                "to compare"
            )
        for task in tasks:
            how = "the same prompts" if are_paired(before[task], after[task]) else "different prompts"
            print(f"{before[task].title}: {args.before} and {args.after}, {how}\n")
            print(format_comparison(compare(before[task], after[task])) + "\n")
        if args.json:
            one, other = before[args.task], after[args.task]
            content = {
                "task": args.task,
                "before": _rates(one),
                "after": _rates(other),
                "paired": are_paired(one, other),
                "differences": [each.to_json() for each in compare(one, other)],
            }
            write_json(args.json, content)
            print(f"Written: {args.json}")


def _results(folder: Path, task: str | None) -> dict[str, Results]:
    """The results of a run by task."""
    found = {results.task: results for results in results_of_run(folder) if task in (None, results.task)}
    if not found:
        of = f" of {task}" if task else ""
        raise InputError(f"{folder} has no results{of}; evaluate it first: python -m experiments.evaluate run={folder}")
    return found


def _rates(results: Results) -> dict[str, dict]:
    total = results.total
    return {name: total.rate(name).to_json() for name in (CORRECT, *total.rates)}


if __name__ == "__main__":
    main()
