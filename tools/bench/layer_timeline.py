"""Times the phases of the fused decoder layer: `python -m tools.bench.layer_timeline --out FOLDER [--int8]`.

Layers of random weights run one behind the other, as in a decode step, in the variant of the kernel that records
timestamps (latent_attention/decode_layer/timeline.py). It writes decode_layer_timeline.json and .png. Drawing, with
`--from FILE.json`, needs no GPU.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from latent_attention import quantize, quantize_cache
from latent_attention.call_shapes import LayerShape
from latent_attention.decode_layer import mosaic
from latent_attention.decode_layer.timeline import PHASES
from latent_attention.gpu import local_gpu
from mla_jax.errors import InputError, one_line_errors
from mla_jax.files import atomic_file, write_json
from mla_jax.inference.decode_loop import NO_CUDA_GRAPHS
from mla_jax.lengths import format_length
from mla_jax.model.layers import InferenceWeight
from tools.bench import report

INFINITE_1B = LayerShape(D=2560, Q=768, C=256, R=64, N=64, V=128, H=32, F=7680)
TOKENS = 1024, 131_072
"""Lengths of the cache that are measured."""
LAYERS, WARM_UP, STEPS = 6, 5, 20
"""Layers of a step, whose weights are too large for the L2 cache together; steps before those that count, and these."""
NAME = "decode_layer_timeline"
START = PHASES.index("wait for previous layer")
"""Times are counted from the end of this phase."""
KINDS = {"projection": "tab:blue", "attention": "tab:orange", "waits for a vector": "tab:gray"}
_WEIGHTS = ("q_a, kv_a", "q_b", "o", "gate, up", "down")
_ATTENTION = ("absorb, RoPE, append", "attention", "combine, values")


def random_weights(shape: LayerShape, key: jax.Array, int8: bool) -> dict:
    """A layer of bfloat16 or 8-bit weights, as in `decoder.inference_weights`."""
    D, Q, C, R, N, V, H, F = shape
    attn = {
        "q_a_proj": (Q, D), "q_b_proj": (H * (N + R), Q), "kv_a_proj_with_mqa": (C + R, D),
        "kv_b_proj": (H * (N + V), C), "o_proj": (D, H * V),
    }  # fmt: skip
    mlp = {"gate_proj": (F, D), "up_proj": (F, D), "down_proj": (D, F)}
    keys = iter(jax.random.split(key, len(attn) + len(mlp)))

    def matrices(shapes: dict) -> dict:
        rows = {name: jax.random.normal(next(keys), of, jnp.bfloat16) * of[1] ** -0.5 for name, of in shapes.items()}
        return {name: InferenceWeight(*(quantize(x) if int8 else (x, None))) for name, x in rows.items()}

    return {
        "input_layernorm": jnp.ones(D),
        "self_attn": matrices(attn) | {"q_a_layernorm": jnp.ones(Q), "kv_a_layernorm": jnp.ones(C)},
        "post_attention_layernorm": jnp.ones(D),
        "mlp": matrices(mlp),
    }


def make_inputs(shape: LayerShape, tokens: int, int8: bool = False) -> tuple:
    """Arguments of `step`: caches, workspace, weights, hidden state, cosines and sines, length.

    A cache has `tokens` tokens, of which the last is the new one. Weights and caches are in bfloat16 or in 8 bits.
    """

    @jax.jit
    def make_layer(key: jax.Array) -> tuple:
        keys = jax.random.split(key, 3)
        c, k_rope = (
            jax.random.normal(key, (1, tokens, width), jnp.bfloat16)
            for key, width in zip(keys[:2], (shape.C, shape.R), strict=True)
        )
        return quantize_cache(c, k_rope) if int8 else (c, k_rope, None), random_weights(shape, keys[2], int8)

    caches, weights = zip(*(make_layer(jax.random.key(i)) for i in range(LAYERS)), strict=True)
    h_D, angles = jax.random.normal(jax.random.key(0), (shape.D,), jnp.bfloat16), jnp.linspace(0, 1, shape.R // 2)
    cos_sin, length = (jnp.cos(angles), jnp.sin(angles)), jnp.full(1, tokens - 1, jnp.int32)
    return caches, mosaic.init_workspace(shape), weights, h_D, cos_sin, length


def step(shape: LayerShape, caches, workspace, weights, h_D, cos_sin, length) -> tuple[Any, jax.Array, list[jax.Array]]:
    """All layers: their caches, the workspace and the timelines. Nothing runs between two layers."""

    @jax.jit  # traced and lowered once for all layers
    def layer(weights, h_D, cache, workspace):
        return mosaic.decode_layer_timeline(
            shape, weights, h_D, *cos_sin, length, cache, workspace, eps=1e-6, scale=0.1
        )

    new_caches, timelines = [], []
    for cache, layer_weights in zip(caches, weights, strict=True):
        h_D, cache, workspace, timeline = layer(layer_weights, h_D, cache, workspace)
        new_caches.append(cache)
        timelines.append(timeline)
    return tuple(new_caches), workspace, timelines


def measure(shape: LayerShape, tokens: int, int8: bool) -> np.ndarray:
    """Timestamps uint32 [steps, layers, CTAs, consumers, phases, clocks], of layers of `make_inputs`.

    Raises:
        InputError: the kernel cannot run here.
    """
    reason = mosaic.why_not(shape, "bfloat16", "int8" if int8 else "bfloat16", tokens, local_gpu(), int8)
    if reason:
        raise InputError(f"the fused decoder layer cannot run here: {reason}")
    run = jax.jit(step, static_argnums=0, donate_argnums=(1, 2), compiler_options=NO_CUDA_GRAPHS)
    (caches, workspace, *rest), found = make_inputs(shape, tokens, int8), []
    for _ in range(WARM_UP + STEPS):
        caches, workspace, timelines = run(shape, caches, workspace, *rest)
        found.append(timelines)
    return np.stack([np.stack(timelines) for timelines in found[WARM_UP:]]).view(np.uint32)


def summarise(stamps: np.ndarray) -> dict[str, Any]:
    """Statistics over CTAs, layers and steps, in us, of the timestamps of `measure`.

    Of each phase `end_us`, percentiles 10, 50 and 90 of when it ends in both consumers of a CTA, counted from the end
    of the previous layer; `layer_us`, the median time from one layer to the next. The first layer of each step does not
    count, as no layer runs before it.
    """
    stamps = stamps[:, 1:]
    # Differences modulo 2^32, from a CTA's first timestamp.
    cycles, ns = ((x - x[..., :1, :1]).view(np.int32) for x in (stamps[..., 0], stamps[..., 1]))
    us_per_cycle = ns[..., -1].sum(dtype=np.int64) / cycles[..., -1].sum(dtype=np.int64) / 1e3
    ends = (cycles.max(axis=-2) - cycles[..., START].min(axis=-1)[..., None]) * us_per_cycle
    ends = ends.reshape(-1, len(PHASES))
    starts_ns = stamps[:, :, :, 0, START, 1]
    starts_ns = np.median((starts_ns - starts_ns[:, :1, :1]).view(np.int32), axis=-1)
    return {
        "layer_us": float(np.median(np.diff(starts_ns, axis=1)) / 1e3),
        "us_per_cycle": float(us_per_cycle),
        "end_us": {name: np.percentile(ends[:, i], [10, 50, 90]).tolist() for i, name in enumerate(PHASES)},
    }


def read_results(path: Path) -> dict[str, Any]:
    """Results of an earlier run. Raises InputError where they cannot be read."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as e:
        raise InputError(f"{path} is no {NAME}.json that can be read: {e}") from e


def _kind(phase: str) -> str:
    return "projection" if phase in _WEIGHTS else "attention" if phase in _ATTENTION else "waits for a vector"


def draw(results: dict[str, Any]) -> Figure:
    """One panel per context: a bar per phase, from the median end of the one before to its own."""
    contexts = results["contexts"]
    figure = Figure(figsize=(7 * len(contexts), 5.5), layout="constrained")
    for i, (name, found) in enumerate(contexts.items()):
        axes = figure.add_subplot(1, len(contexts), i + 1)
        begin = 0.0
        for y, phase in enumerate(PHASES[START + 1 :]):
            low, end, high = found["end_us"][phase]
            axes.barh(y, end - begin, left=begin, color=KINDS[_kind(phase)])
            axes.plot([low, high], [y, y], color="black", linewidth=1)
            axes.annotate(f"{end - begin:.1f}", (max(end, high), y), (4, 0), textcoords="offset points", va="center")
            begin = end
        axes.set_yticks(range(len(PHASES) - START - 1), PHASES[START + 1 :] if i == 0 else [])
        axes.invert_yaxis()
        axes.set_xlim(0, 1.08 * max(found["layer_us"], begin))
        axes.axvline(found["layer_us"], color="black", linestyle=":")
        axes.set_title(f"{name} tokens: a layer takes {found['layer_us']:.1f} us (dotted line)")
        axes.set_xlabel("us since the previous layer ended; black: percentiles 10 to 90 of the CTAs")
    handles = [Patch(color=color, label=kind) for kind, color in KINDS.items()]
    figure.legend(handles=handles, loc="outside lower center", ncols=len(KINDS))
    return figure


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m tools.bench.layer_timeline", description="Times the phases of the fused decoder layer."
    )
    parser.add_argument("--out", type=Path, required=True, metavar="FOLDER", help=f"for {NAME}.json and {NAME}.png")
    parser.add_argument("--int8", action="store_true", help="weights and caches in 8 bits")
    parser.add_argument("--from", dest="source", type=Path, metavar="FILE.json", help="only draw these results")
    args = parser.parse_args()
    with one_line_errors():
        if args.source:
            results = read_results(args.source)
        else:
            contexts = {format_length(n): summarise(measure(INFINITE_1B, n, args.int8)) for n in TOKENS}
            results = {"provenance": report.origin(), "contexts": contexts}
            write_json(args.out / f"{NAME}.json", results)
        with atomic_file(args.out / f"{NAME}.png") as path:
            draw(results).savefig(path, dpi=150, format="png")
        for name, found in results["contexts"].items():
            print(f"{name} tokens: {found['layer_us']:.1f} us a layer")


if __name__ == "__main__":
    main()
