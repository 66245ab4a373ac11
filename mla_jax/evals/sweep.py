"""The runs of a sweep compared, each beside the values that were swept: a Markdown table and a plot."""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from matplotlib import colormaps
from matplotlib.figure import Figure
from omegaconf import OmegaConf

from mla_jax.config import flatten
from mla_jax.errors import InputError
from mla_jax.evals.report import COLORS
from mla_jax.evals.results import results_of_run
from mla_jax.evals.results_table import format_markdown
from mla_jax.files import atomic_file
from mla_jax.training.summary import SUMMARY

NAMES = ("name", "run_dir")
"""Keys that differ between the runs of a sweep without being swept."""


@dataclass(frozen=True)
class SweptRun:
    """A run of a sweep."""

    name: str
    config: dict[str, Any]
    """Every key with its value, `model.kv_lora_rank` and the like."""
    summary: dict[str, Any] | None
    """As `write_summary` wrote it; None if the run has not finished."""
    evaluations: dict[str, tuple[float, int]]
    """(correct answers, prompts) of each task that RUN/eval has results of."""

    @property
    def accuracy(self) -> tuple[str, float] | None:
        """Name and value of the metric that the loss calls its accuracy; None if the run has not finished."""
        if self.summary is None:
            return None
        name = self.summary.get("accuracy_metric", "answer_accuracy")
        return name, self.summary[name]


def read_sweep(folder: Path) -> list[SweptRun]:
    """The runs in a sweep's folder.

    Raises:
        InputError: there are none, or a file of one cannot be read.
    """
    runs = [_read_run(path.parent, folder) for path in sorted(folder.rglob("config.yaml"))]
    if len(runs) < 2:
        raise InputError(f"{folder} holds {len(runs)} runs; a sweep has at least 2, each in a folder of its own in it")
    if all(run.summary is None for run in runs):
        raise InputError(f"no run in {folder} has finished yet (none has a {SUMMARY})")
    return runs


def _read_run(path: Path, folder: Path) -> SweptRun:
    try:
        config = flatten(OmegaConf.to_container(OmegaConf.load(path / "config.yaml")))
        finished = (path / SUMMARY).is_file()
        summary = json.loads((path / SUMMARY).read_text()) if finished else None
        if summary is not None:
            summary = {key: math.nan if value is None else value for key, value in summary.items()}
            accuracy = summary.get("accuracy_metric", "answer_accuracy")
            if missing := {"step", "loss", "tokens_per_second", accuracy} - summary.keys():
                raise ValueError(f"{SUMMARY} lacks {', '.join(sorted(missing))}")
    except Exception as e:
        raise InputError(f"{path} cannot be read ({str(e).splitlines()[0][:200]})") from e
    evaluations = {results.task: results.counts for results in results_of_run(path)}
    return SweptRun(str(path.relative_to(folder)), config, summary, evaluations)


def swept_keys(runs: Sequence[SweptRun]) -> list[str]:
    """Keys whose values differ between runs, in the order of the config."""
    return [
        key
        for key in dict.fromkeys(key for run in runs for key in run.config)
        if key not in NAMES and len({str(run.config.get(key)) for run in runs}) > 1
    ]


def markdown_table(runs: Sequence[SweptRun]) -> str:
    """One row for each run, the lowest loss first, then those whose loss is nan, then those that have not finished."""
    keys = swept_keys(runs)
    tasks = sorted({task for run in runs for task in run.evaluations})
    rows = [[*keys, "step", "loss", _accuracy_title(runs), "tokens/s", *(f"{task} correct" for task in tasks)]]
    for run in sorted(runs, key=_by_loss):
        row, s = [str(run.config.get(key)) for key in keys], run.summary
        if s is None or run.accuracy is None:
            row += ["not finished", "", "", ""]
        else:
            numbers = f"{s['loss']:.4f}", f"{run.accuracy[1]:.1%}", f"{s['tokens_per_second']:,.0f}"
            row += [str(s["step"]), *numbers]
        rows.append([*row, *("{}/{}".format(*run.evaluations[t]) if t in run.evaluations else "" for t in tasks)])
    return format_markdown(rows)


def _by_loss(run: SweptRun) -> tuple[bool, bool, float]:
    loss = run.summary["loss"] if run.summary else math.inf
    return run.summary is None, math.isnan(loss), 0.0 if math.isnan(loss) else loss


def _accuracy_title(runs: Sequence[SweptRun]) -> str:
    """The name of the runs' accuracy, `answers right` for that of cross-entropy."""
    names = {run.accuracy[0] for run in runs if run.accuracy}
    return " or ".join(sorted("answers right" if name == "answer_accuracy" else name for name in names))


def plot_sweep(runs: Sequence[SweptRun], path: Path, *, title: str) -> None:
    """Draws loss and accuracy over the swept key with the most values, a line for each value of the others.

    Raises:
        InputError: the file cannot be written.
    """
    done = [run for run in runs if run.summary]
    keys = swept_keys(runs)
    across = max(keys, key=lambda key: len({str(run.config.get(key)) for run in runs}), default="name")
    rest = [key for key in keys if key != across]
    lines = sorted({tuple(str(run.config.get(key)) for key in rest) for run in done}, key=_natural)
    values = sorted({run.config.get(across) for run in done}, key=lambda value: _natural((str(value),)))
    numbers = all(isinstance(value, int | float) and not isinstance(value, bool) and value > 0 for value in values)
    figure = Figure(figsize=(9, 3.8), dpi=160)
    figure.set_layout_engine("constrained")
    panels = figure.subplots(1, 2)
    colors = colormaps[COLORS]
    for index, line in enumerate(lines):
        points = [run for run in done if tuple(str(run.config.get(key)) for key in rest) == line]
        points.sort(key=lambda run: values.index(run.config.get(across)))
        places = [run.config[across] if numbers else values.index(run.config.get(across)) for run in points]
        label = ", ".join(f"{key} {value}" for key, value in zip(rest, line, strict=True))
        style = {"marker": "o", "color": colors(0.4 + 0.6 * index / max(len(lines) - 1, 1)), "label": label}
        panels[0].plot(places, [run.summary["loss"] for run in points if run.summary], **style)
        panels[1].plot(places, [100 * run.accuracy[1] for run in points if run.accuracy], **style)
    for axes, what in zip(panels, ("loss", f"{_accuracy_title(runs)} (%)"), strict=True):
        if numbers:
            axes.set_xscale("log")
            axes.minorticks_off()
        axes.set_xticks(values if numbers else range(len(values)), [str(value) for value in values])
        axes.set_xlabel(across)
        axes.set_ylabel(what)
        axes.grid(color="#e5e5e5")
        axes.spines[["top", "right"]].set_visible(False)
    if rest:
        panels[0].legend(fontsize=8, frameon=False)
    figure.suptitle(title, fontsize=12, weight="bold")
    with atomic_file(path) as partial:
        figure.savefig(partial, format="png")


def _natural(values: tuple[str, ...]) -> list[tuple[float, str]]:
    """Orders numbers by size, before words."""

    def key(value: str) -> tuple[float, str]:
        try:
            return float(value), ""
        except ValueError:
            return math.inf, value

    return [key(value) for value in values]
