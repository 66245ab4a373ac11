"""A text table and a heatmap of results over a grid of lengths and one more parameter, depth for instance."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from mla_jax.evals.cells import NATS, Cell, Mean, Rate, totals_by_length
from mla_jax.files import atomic_file
from mla_jax.lengths import format_length

COLORS = "YlGnBu"
"""Pale yellow (0) to dark blue (1): one hue after the other, so that lightness alone tells the order."""


def format_value(name: str, value: Any) -> str:
    """A value of a cell's parameter, depths and positions in %; None is `all`."""
    return "all" if value is None else f"{100 * value:.4g}%" if name in ("depth", "position") else str(value)


def format_percent(share: float) -> str:
    """A share in % with one decimal; 0 % and 100 % are said of nothing that is not exactly that."""
    if share in (0, 1):
        return f"{100 * share:.0f} %"
    return f"{min(max(100 * share, 0.1), 99.9):.1f} %"


def format_interval(rate: Rate) -> str:
    """The interval of a rate in %."""
    low, high = rate.interval
    return f"{100 * low:.1f} to {100 * high:.1f} %"


def _percent_range(cell: Cell) -> str:
    low, high = cell.interval
    return f"{100 * low:.0f}-{100 * high:.0f}"


def grid(cells: Sequence[Cell]) -> tuple[list[int], str, list[Any], dict[tuple[int, Any], Cell]]:
    """Lengths, name and values of the other parameter (the last is None: all of them), and the cells by both."""
    (name,) = cells[0].params.keys() - {"length"}
    lengths = sorted({cell.length for cell in cells})
    values = sorted({cell.params[name] for cell in cells})
    by_place = {(cell.length, cell.params[name]): cell for cell in [*cells, *totals_by_length(cells)]}
    return lengths, name, [*values, None], by_place


def format_table(cells: Sequence[Cell]) -> str:
    """The grid as text, length across, the other parameter down, with its 95 % interval in each cell: correct/n, in %.

    Where something else was measured it is that, for instance the perplexity.
    """
    lengths, name, values, by_place = grid(cells)
    rows = [[name, *(f"{format_length(length)} tokens" for length in lengths)]]
    for value in values:
        rows.append([format_value(name, value), *(format_cell(by_place[length, value]) for length in lengths)])
    *above, totals = _aligned(rows).splitlines()
    return "\n".join([*above, above[1], totals])


def format_cell(cell: Cell) -> str:
    """Correct/n [95 % interval in %], or the means where something else was measured, the perplexity for instance."""
    if cell.measures:
        return ", ".join(format_mean(name, mean) for name, mean in cell.means.items())
    correct = f"{cell.correct}" if isinstance(cell.correct, int) else f"{cell.correct:.2f}"
    return f"{correct}/{cell.n} [{_percent_range(cell)}]"


def format_rates(cells: Sequence[Cell]) -> str:
    """The other scores of the task as text, one a line, length across: rate in %, n and interval; "" without any."""
    totals = totals_by_length(cells)
    names = dict.fromkeys(name for cell in totals for name in cell.rates)
    rows = [["", *(f"{format_length(cell.length)} tokens" for cell in totals)]]
    rows += [[name.replace("_", " "), *(format_rate(cell.rates.get(name)) for cell in totals)] for name in names]
    return _aligned(rows) if names else ""


def format_rate(rate: Rate | None) -> str:
    """A rate in %, its n and its interval; `-` without one."""
    if rate is None:
        return "-"
    low, high = rate.interval
    return f"{100 * rate.rate:.1f}% of {rate.n} [{100 * low:.0f}-{100 * high:.0f}]"


def format_mean(name: str, mean: Mean) -> str:
    """A mean and its interval, as `measured` has them."""
    middle, low, high = measured(name, mean)
    return f"{middle:.4g} [{low:.4g}-{high:.4g}]"


def measured(name: str, mean: Mean) -> tuple[float, float, float]:
    """The mean of a measure and the ends of its interval; of the logarithm of the perplexity their exponentials."""
    values = mean.mean, *mean.interval
    return tuple(math.exp(value) for value in values) if name == NATS else values  # pyright: ignore[reportReturnType]


def measure_title(name: str) -> str:
    """The words for what `measured` gives of a measure."""
    return "perplexity" if name == NATS else name.replace("_", " ")


def _aligned(rows: Sequence[Sequence[str]]) -> str:
    """A table with its columns aligned to the right, a rule under the first row."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(text.rjust(width) for text, width in zip(row, widths, strict=True)) for row in rows]
    return "\n".join([lines[0], "-" * len(lines[0]), *lines[1:]])


def plot_heatmap(
    cells: Sequence[Cell], path: Path, *, title: str, subtitle: str = "", trained_lengths: Sequence[int] = ()
) -> None:
    """Draws the grid as a PNG, length across, the other parameter down: accuracy, correct/n and interval in each cell.

    Args:
        cells: the whole grid.
        path: where the PNG goes; replaced only by a complete one.
        title: what was measured on which model.
        subtitle: a second, smaller line.
        trained_lengths: sequence lengths seen in training, in tokens; a line separates the lengths beyond them.

    Raises:
        InputError: the file cannot be written.
    """
    lengths, name, values, by_place = grid(cells)
    scale = ScalarMappable(Normalize(0, 1), COLORS)
    figure = Figure(figsize=(max(2.4 + 1.15 * len(lengths), 5.6), 2.1 + 0.72 * len(values)), dpi=160)
    figure.set_layout_engine("constrained", h_pad=0.08, w_pad=0.08)
    axes = figure.add_subplot()
    rows = [float(row) for row in range(len(values))]
    rows[-1] += 0.15  # sets the totals apart from the grid
    for y, value in zip(rows, values, strict=True):
        for x, length in enumerate(lengths):
            _draw_cell(axes, x, y, by_place[length, value], scale)
    axes.set_xlim(-0.5, len(lengths) - 0.5)
    axes.set_ylim(rows[-1] + 0.5, -0.5)
    axes.set_xticks(range(len(lengths)), [format_length(length) for length in lengths])
    axes.set_yticks(rows, [format_value(name, value).replace("%", " %") for value in values])
    axes.set_xlabel("length of the prompt (tokens)")
    axes.set_ylabel("depth of the needle (0 % = start)" if name == "depth" else name)
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    _mark_trained(axes, lengths, trained_lengths)

    figure.suptitle(title, fontsize=12, weight="bold")
    legend = "in each cell: accuracy, correct/n (95 % interval)"
    axes.set_title(f"{subtitle}\n{legend}".strip(), fontsize=8, color="#505050", pad=22 if trained_lengths else 6)
    bar = figure.colorbar(scale, ax=axes, aspect=30, ticks=[0, 0.25, 0.5, 0.75, 1], format=_percent)
    bar.set_label("accuracy")
    with atomic_file(path) as partial:
        figure.savefig(partial, format="png")


def _percent(share: float, _: object) -> str:
    return f"{100 * share:.0f} %"


def _draw_cell(axes: Axes, x: float, y: float, cell: Cell, scale: ScalarMappable) -> None:
    """One square around (x, y), filled by accuracy, with the numbers in it."""
    color = scale.to_rgba(np.array([cell.accuracy]))[0]
    axes.add_patch(Rectangle((x - 0.5, y - 0.5), 1, 1, facecolor=color, edgecolor="white", linewidth=2.5))
    luminance = color[:3] @ (0.2126, 0.7152, 0.0722)
    ink = "white" if luminance < 0.5 else "#202020"
    # Rounded down: 100 % is said of no cell that has a failure.
    percent, details = (
        f"{math.floor(100 * cell.correct / cell.n + 1e-9)} %",
        f"{cell.correct}/{cell.n}  ({_percent_range(cell)})",
    )
    axes.text(x, y - 0.02, percent, ha="center", va="bottom", color=ink, fontsize=11, weight="bold")
    axes.text(x, y + 0.1, details, ha="center", va="top", color=ink, fontsize=7)


def _mark_trained(axes: Axes, lengths: Sequence[int], trained_lengths: Sequence[int]) -> None:
    """Draws a line after the last length that was trained, and says so above the grid."""
    if not trained_lengths:
        return
    inside = sum(length <= max(trained_lengths) for length in lengths)
    style = {"transform": axes.get_xaxis_transform(), "va": "bottom", "ha": "center", "fontsize": 8}
    if 0 < inside < len(lengths):
        axes.axvline(inside - 0.5, color="#202020", linewidth=1.5, linestyle=(0, (4, 2)))
    if inside:
        axes.text((inside - 1) / 2, 1.01, "trained lengths", **style)
    if inside < len(lengths):
        axes.text((inside + len(lengths) - 1) / 2, 1.01, "longer than trained", **style)
