"""Table and plot of the results of a sweep: `python -m tools.sweep_report runs/SWEEP`."""

import argparse
from pathlib import Path

from mla_jax.errors import InputError, one_line_errors
from mla_jax.evals.sweep import markdown_table, plot_sweep, read_sweep
from mla_jax.files import atomic_file


def main() -> None:
    """The command line; exit code 1 if the folder holds no finished sweep or cannot be written."""
    parser = argparse.ArgumentParser(
        prog="python -m tools.sweep_report",
        description="Writes FOLDER/sweep.md and FOLDER/sweep.png: what each run of the sweep reached.",
    )
    parser.add_argument("folder", type=Path, help="the folder of the sweep, that is run_dir (default: runs/NAME)")
    folder = parser.parse_args().folder
    with one_line_errors():
        if not folder.is_dir():
            raise InputError(f"{folder} is no folder; name that of a sweep, which holds a folder for each run")
        runs = read_sweep(folder)
        table = markdown_table(runs)
        with atomic_file(folder / "sweep.md") as partial:
            partial.write_text(f"# {folder.name}\n\n{table}\n![Results](sweep.png)\n", encoding="utf-8")
        plot_sweep(runs, folder / "sweep.png", title=folder.name)
        print(table)
        print(f"wrote {folder / 'sweep.md'} and {folder / 'sweep.png'}")


if __name__ == "__main__":
    main()
