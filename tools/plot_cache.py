"""Draws the KV cache against the context for three kinds of attention: `python -m tools.plot_cache OUT.svg [MODEL]`.

Multi-head and grouped-query attention are those of MODEL's width, depth and heads, at 16 bits.
"""

import argparse
from pathlib import Path

import matplotlib
from matplotlib.figure import Figure

from experiments.entry import compose_config
from mla_jax.config import ModelConfig
from mla_jax.errors import UsageError, one_line_errors
from mla_jax.files import atomic_file
from mla_jax.hardware import GIB
from mla_jax.lengths import format_length

KV_HEADS = 8
"""Heads that have keys and values of their own in grouped-query attention, as in Llama-3."""
CONTEXTS = tuple(2**i for i in range(12, 21))
"""Lengths drawn, in tokens."""
MEMORY = {"a card of 8 GiB": 8, "one of 80 GiB": 80}
"""GiB of GPUs that are marked."""
_COLORS = {"multi-head": "#b2182b", "grouped-query": "#c05a1c", "multi-head latent": "#2166ac"}


def bytes_per_token(model: ModelConfig) -> dict[str, int]:
    """Bytes of 16-bit cache a token over all layers, by the kind of attention.

    Raises:
        UsageError: the width is no multiple of the number of heads, or that none of KV_HEADS.
    """
    heads = model.num_attention_heads
    if model.hidden_size % heads or heads % KV_HEADS:
        raise UsageError(f"{heads} heads must divide the width, {model.hidden_size}, and be a multiple of {KV_HEADS}")
    head = 2 * model.hidden_size // heads * 2 * model.num_hidden_layers  # a key and a value of 2 bytes a number
    return {
        "multi-head": heads * head,
        "grouped-query": KV_HEADS * head,
        "multi-head latent": model.cache_bytes_per_token(),
    }


def cache_figure(model: ModelConfig) -> Figure:
    """The figure: contexts across, GiB of cache up, both logarithmic."""
    figure = Figure(figsize=(7, 3.6), layout="constrained")
    axes = figure.add_subplot()
    longest = CONTEXTS[-1]
    for kind, size in bytes_per_token(model).items():
        axes.plot(CONTEXTS, [size * tokens / GIB for tokens in CONTEXTS], color=_COLORS[kind], linewidth=2.5)
        label = f"{kind}: {size * longest / GIB:.4g} GiB"
        place = {"xytext": (8, 0), "textcoords": "offset points", "va": "center"}
        axes.annotate(label, (longest, size * longest / GIB), color=_COLORS[kind], annotation_clip=False, **place)
    for label, gib in MEMORY.items():
        axes.plot((CONTEXTS[0], longest), (gib, gib), color="#808080", linewidth=1, linestyle=(0, (4, 3)))
        axes.annotate(label, (CONTEXTS[0], gib), color="#606060", fontsize=8, xytext=(0, 3), textcoords="offset points")
    axes.set_xscale("log", base=2)
    axes.set_yscale("log", base=10)
    axes.set_xticks(CONTEXTS, [format_length(tokens) for tokens in CONTEXTS])
    axes.set_yticks([0.1, 1, 10, 100], ["0.1", "1", "10", "100"])
    axes.set_xlabel("context (tokens of one sequence)")
    axes.set_ylabel("KV cache at 16 bits (GiB)")
    axes.spines[["top", "right"]].set_visible(False)
    return figure


def main() -> None:
    """The command line; exit code 1 if the file cannot be written."""
    parser = argparse.ArgumentParser(prog="python -m tools.plot_cache", description="Draws cache against context.")
    parser.add_argument("out", type=Path, help="SVG to write")
    parser.add_argument("model", nargs="?", default="infinite_1b", help="of conf/model (default: infinite_1b)")
    args = parser.parse_args()
    with one_line_errors():
        model = compose_config([f"model={args.model}"]).model
        with atomic_file(args.out) as partial, matplotlib.rc_context({"svg.hashsalt": "cache"}):
            cache_figure(model).savefig(partial, format="svg", metadata={"Date": None})


if __name__ == "__main__":
    main()
