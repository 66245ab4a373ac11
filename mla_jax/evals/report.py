"""How results over a length x depth grid are kept and shown: JSON, a terminal table, a heatmap."""

import contextlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from mla_jax.errors import InputError
from mla_jax.evals.stats import wilson_interval

COLORS = "YlGnBu"
"""Pale yellow (0) to dark blue (1): one hue after the other, so that lightness alone tells the order."""


@dataclass(frozen=True)
class Cell:
    """How many of `n` prompts of `length` tokens, with the needle at `depth`, were answered correctly."""

    length: int
    depth: float | None
    """Between 0 (start) and 1 (end); None counts all depths."""
    n: int
    correct: int

    @property
    def accuracy(self) -> float:
        """Share of correct answers."""
        return self.correct / self.n

    @property
    def interval(self) -> tuple[float, float]:
        """Wilson 95 % interval of the accuracy."""
        return wilson_interval(self.correct, self.n)

    def to_json(self) -> dict:
        """The counts with accuracy and interval spelled out."""
        low, high = self.interval
        return {
            "length": self.length,
            "depth": self.depth,
            "n": self.n,
            "correct": self.correct,
            "accuracy": round(self.accuracy, 6),
            "interval": [round(low, 6), round(high, 6)],
        }


def over_depths(cells: Sequence[Cell]) -> list[Cell]:
    """One cell (depth None) for each length, shortest first, that counts all its depths."""
    totals = []
    for length in sorted({cell.length for cell in cells}):
        row = [cell for cell in cells if cell.length == length]
        totals.append(Cell(length, None, sum(cell.n for cell in row), sum(cell.correct for cell in row)))
    return totals


def write_json(path: Path, content: dict) -> None:
    """Writes `content`; a file of that name is replaced only by a complete one.

    Raises:
        InputError: the file cannot be written.
    """
    with replacing(path) as partial:
        partial.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A path to write to, which takes the name `path` when the block ends well and vanishes when it does not."""
    partial = path.with_name(path.name + ".partial")
    try:
        yield partial
        partial.replace(path)
    except OSError as e:
        raise InputError(f"could not write {path} ({e.strerror}); free space or name another folder") from e
    finally:
        with contextlib.suppress(OSError):
            partial.unlink()


def format_length(tokens: int) -> str:
    """256 -> "256", 131072 -> "128k", 1048576 -> "1M"."""
    for unit, suffix in ((1 << 20, "M"), (1 << 10, "k")):
        if tokens >= unit and tokens % unit == 0:
            return f"{tokens // unit}{suffix}"
    return str(tokens)


def _format_depth(depth: float | None) -> str:
    return "all" if depth is None else f"{100 * depth:g}%"


def _percent_range(cell: Cell) -> str:
    low, high = cell.interval
    return f"{100 * low:.0f}-{100 * high:.0f}"


def _rows(cells: Sequence[Cell]) -> tuple[list[int], list[float | None], dict[tuple[int, float | None], Cell]]:
    """Lengths, depths (the last one is None, all of them) and every cell by both."""
    lengths = sorted({cell.length for cell in cells})
    depths = sorted({cell.depth for cell in cells if cell.depth is not None})
    return lengths, [*depths, None], {(cell.length, cell.depth): cell for cell in [*cells, *over_depths(cells)]}


def format_table(cells: Sequence[Cell]) -> str:
    """The grid as text: length across, depth down; each entry is correct/n [Wilson 95 % interval in %]."""
    lengths, depths, by_place = _rows(cells)
    rows = [["depth", *(f"{format_length(length)} tokens" for length in lengths)]]
    for depth in depths:
        entries = [by_place[length, depth] for length in lengths]
        rows.append([_format_depth(depth), *(f"{c.correct}/{c.n} [{_percent_range(c)}]" for c in entries)])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(text.rjust(width) for text, width in zip(row, widths, strict=True)) for row in rows]
    rule = "-" * len(lines[0])
    return "\n".join([lines[0], rule, *lines[1:-1], rule, lines[-1]])


def plot_heatmap(
    cells: Sequence[Cell], path: Path, *, title: str, subtitle: str = "", trained_lengths: Sequence[int] = ()
) -> None:
    """Draws the grid as a PNG: length across, depth down, each cell with accuracy, correct/n and interval.

    Args:
        cells: the whole grid, one cell for each length and depth.
        path: where the PNG goes; replaced only by a complete one.
        title: what was measured on which model.
        subtitle: a second, smaller line.
        trained_lengths: sequence lengths seen in training, in tokens; a line separates the lengths beyond them.

    Raises:
        InputError: the file cannot be written.
    """
    lengths, depths, by_place = _rows(cells)
    scale = ScalarMappable(Normalize(0, 1), COLORS)
    figure = Figure(figsize=(max(2.4 + 1.15 * len(lengths), 5.6), 2.1 + 0.72 * len(depths)), dpi=160)
    figure.set_layout_engine("constrained", h_pad=0.08, w_pad=0.08)
    axes = figure.add_subplot()
    rows = [float(row) for row in range(len(depths))]
    rows[-1] += 0.15  # sets the totals apart from the grid
    for y, depth in zip(rows, depths, strict=True):
        for x, length in enumerate(lengths):
            _draw_cell(axes, x, y, by_place[length, depth], scale)
    axes.set_xlim(-0.5, len(lengths) - 0.5)
    axes.set_ylim(rows[-1] + 0.5, -0.5)
    axes.set_xticks(range(len(lengths)), [format_length(length) for length in lengths])
    axes.set_yticks(rows, [_format_depth(depth).replace("%", " %") for depth in depths])
    axes.set_xlabel("length of the prompt (tokens)")
    axes.set_ylabel("depth of the needle (0 % = start)")
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    _mark_trained(axes, lengths, trained_lengths)

    figure.suptitle(title, fontsize=12, weight="bold")
    legend = "in each cell: accuracy, correct/n (Wilson 95 % interval)"
    axes.set_title(f"{subtitle}\n{legend}".strip(), fontsize=8, color="#505050", pad=22 if trained_lengths else 6)
    bar = figure.colorbar(scale, ax=axes, aspect=30, ticks=[0, 0.25, 0.5, 0.75, 1], format=_percent)
    bar.set_label("accuracy")
    with replacing(path) as partial:
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
    percent, details = f"{100 * cell.correct // cell.n} %", f"{cell.correct}/{cell.n}  ({_percent_range(cell)})"
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
