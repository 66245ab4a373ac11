"""A plot of the perplexity by position, over a grid of lengths and parts of texts."""

from collections.abc import Sequence
from pathlib import Path

from matplotlib import colormaps
from matplotlib.figure import Figure

from mla_jax.evals.cells import NATS, Cell
from mla_jax.evals.report import COLORS, measured
from mla_jax.files import atomic_file
from mla_jax.lengths import format_length


def plot_curves(
    cells: Sequence[Cell], path: Path, *, title: str, subtitle: str = "", trained_lengths: Sequence[int] = ()
) -> None:
    """Draws perplexity over the position in tokens as a PNG, a line for each length with its 95 % intervals.

    Args:
        cells: the whole grid.
        path: where the PNG goes; replaced only by a complete one.
        title: what was measured on which model.
        subtitle: a second, smaller line.
        trained_lengths: sequence lengths seen in training, in tokens; a line marks the longest.

    Raises:
        InputError: the file cannot be written.
    """
    figure = Figure(figsize=(7.2, 4.4), dpi=160)
    figure.set_layout_engine("constrained")
    axes = figure.add_subplot()
    lengths = sorted({cell.length for cell in cells})
    for number, length in enumerate(lengths):
        line = sorted((cell for cell in cells if cell.length == length), key=lambda cell: cell.params["position"])
        middles = [(cell.params["position"] - 0.5 / len(line)) * length for cell in line]
        means, low, high = zip(*(measured(NATS, cell.means[NATS]) for cell in line), strict=True)
        color = colormaps[COLORS](0.4 + 0.6 * number / max(len(lengths) - 1, 1))
        label = f"{format_length(length)} tokens"
        axes.plot(middles, means, marker="o", color=color, label=label)
        axes.fill_between(middles, low, high, color=color, alpha=0.2, linewidth=0)
    if trained_lengths:
        axes.axvline(max(trained_lengths), color="#202020", linewidth=1.5, linestyle=(0, (4, 2)), label="trained up to")
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xlabel("position in the text (tokens)")
    axes.set_ylabel("perplexity (bands: 95 %)")
    axes.grid(color="#e5e5e5", which="both")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(fontsize=8, frameon=False)
    figure.suptitle(title, fontsize=12, weight="bold")
    axes.set_title(subtitle, fontsize=8, color="#505050")
    with atomic_file(path) as partial:
        figure.savefig(partial, format="png")
