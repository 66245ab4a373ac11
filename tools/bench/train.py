"""Times training steps: `python -m tools.bench.train [KEY=VALUE ...] [--shapes ...] [--keep ...] [--json FILE]`.

The whole step of `experiments.sft` on random tokens: loss, gradients, clipping, optimizer. Each way to save or
recompute activations (`model.remat`) gets the same parameters and tokens and must find the same loss.
"""

import argparse
import dataclasses
import os
from pathlib import Path
from typing import Any

import jax

from experiments.entry import compose_config
from mla_jax.config import ModelConfig, RunConfig
from mla_jax.errors import one_line_errors
from mla_jax.hardware import nominal_peak
from mla_jax.mesh import make_mesh
from mla_jax.observability.flops import train_flops
from mla_jax.optim import make_optimizer
from mla_jax.state import init_state
from tools.bench import ceilings, report
from tools.bench.steps import Shape, compile_step, time_steps

DEFAULT_SHAPES = ["4x8k", "1x32k", "1x128k"]
DEFAULT_KEEP = ["full", "latent_attention", "none"]
_SAME_LOSS = 1e-3


def keeping(model: ModelConfig, text: str) -> ModelConfig:
    """The model with `none`, `dots` or `full` as model.remat, or `SAVED+SAVED/OFFLOADED+OFFLOADED` by names.

    Raises:
        UsageError: an unknown name.
    """
    if text in ("none", "dots", "full"):
        return dataclasses.replace(model, remat=text, saved=(), offloaded=())
    saved, _, offloaded = text.partition("/")
    names = [tuple(name for name in part.split("+") if name) for part in (saved, offloaded)]
    return dataclasses.replace(model, remat="names", saved=names[0], offloaded=names[1])


def measure(config: RunConfig, shape: Shape, trace: Path | None) -> dict[str, Any]:
    """Seconds a step, loss and gradient norm of the first step, and the cost that `compile_step` finds."""
    compiled, (batch, rate), takes = compile_step(config, shape)
    state = init_state(config.model, make_optimizer(config.optim), config.seed)
    metrics: list[Any] = []

    def step() -> Any:
        nonlocal state
        state, found = compiled(state, batch, rate)
        metrics.append(found)
        return found

    takes |= time_steps(step)
    if trace:
        with jax.profiler.trace(trace):
            jax.block_until_ready(step())
    first = metrics[0]
    return takes | {"loss": float(first["loss"] / first["weight"]), "grad_norm": float(first["grad_norm"])}


def print_memory(config: RunConfig, shape: Shape, models: dict[str, ModelConfig]) -> None:
    """Prints the memory that each way takes, without running it."""
    for name, model in models.items():
        try:
            takes = compile_step(dataclasses.replace(config, model=model), shape)[2]
        except jax.errors.JaxRuntimeError as e:
            print(f"{shape}, {name}: {' '.join(str(e).split())[:200]}", flush=True)
            continue
        device, host = takes["bytes"] / 1e9, takes["host_bytes"] / 1e9
        print(f"{shape}, {name}: {device:.1f} GB on each device, {host:.1f} GB on the host", flush=True)


def bench(
    config: RunConfig, shape: Shape, models: dict[str, ModelConfig], work: float, peak: float, trace: Path | None
) -> list[dict[str, Any]]:
    """The rows of one shape; `work` is the FLOPs of a device's step, `peak` its measured ceiling in FLOP/s."""
    rows: list[dict[str, Any]] = []
    nominal = nominal_peak(jax.devices()[0].device_kind)
    for name, model in models.items():
        row = {"shape": str(shape), "implementation": name, "peer": False, "seconds": None, "reason": None}
        folder = trace / f"{shape}, {name.replace('/', ' offloaded ')}" if trace else None
        try:
            found = measure(dataclasses.replace(config, model=model), shape, folder)
        except jax.errors.JaxRuntimeError as e:
            rows.append(row | {"reason": f"failed: {' '.join(str(e).split())[:200]}"})
            continue
        reference = next((other["loss"] for other in rows if other["seconds"]), found["loss"])
        if not abs(found["loss"] - reference) < _SAME_LOSS * reference:
            rows.append(row | {"reason": f"wrong: loss {found['loss']:.4f}, not {reference:.4f}"})
            continue
        speed = work / found["seconds"]
        row |= found | {"tokens_a_second": shape.batch * shape.tokens / found["seconds"], "flop_a_second": speed}
        row |= {"mfu": speed / nominal if nominal else None, "mfu_of_measured": speed / peak}
        rows.append(row)
        print(f"{shape}, {name}: {found['seconds'] * 1e3:,.1f} ms", flush=True)
    return report.with_ratios(rows)


COLUMNS = {
    "ms": lambda row: f"{row['seconds'] * 1e3:,.1f}",
    "spread": lambda row: f"{row['spread']:.1%}",
    "tokens/s": lambda row: f"{row['tokens_a_second']:,.0f}",
    "MFU": lambda row: f"{row['mfu']:.1%}" if row["mfu"] else "",
    "MFU of measured peak": lambda row: f"{row['mfu_of_measured']:.1%}",
    "GB": lambda row: f"{row['bytes'] / 1e9:.1f}",
    "GB on host": lambda row: f"{row['host_bytes'] / 1e9:.1f}",
    "loss": lambda row: f"{row['loss']:.4f}",
    "gradient norm": lambda row: f"{row['grad_norm']:.4f}",
    "compiled in s": lambda row: f"{row['compile_seconds']:.0f}",
}


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m tools.bench.train", description="Times training steps.")
    parser.add_argument(
        "overrides", nargs="*", default=["experiment=infinite_1b"], metavar="KEY=VALUE",
        help="as of experiments.sft (default: experiment=infinite_1b)",
    )  # fmt: skip
    parser.add_argument(
        "--shapes", nargs="+", default=DEFAULT_SHAPES, metavar="SHAPE", help="4x8k: 4 rows of 8k tokens"
    )
    parser.add_argument(
        "--keep", nargs="+", default=DEFAULT_KEEP, metavar="WHAT",
        help="full, dots, none, or names: SAVED+SAVED/OFFLOADED+OFFLOADED (model.saved, model.offloaded)",
    )  # fmt: skip
    parser.add_argument("--unroll", nargs="+", type=int, default=[1], help="model.unroll, each with each of --keep")
    parser.add_argument("--compile-only", action="store_true", help="print the memory that steps take, run none")
    parser.add_argument("--trace", type=Path, help="folder for a profile of one step of each")
    parser.add_argument("--json", type=Path, help="file for the results, rewritten after each shape")
    args = parser.parse_args()
    os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.95")
    with one_line_errors():
        shapes = [Shape.parse(text) for text in args.shapes]
        config = compose_config(args.overrides)
        models = {
            f"{text}, unroll {unroll}": keeping(dataclasses.replace(config.model, unroll=unroll), text)
            for text in args.keep
            for unroll in args.unroll
        }
        devices = make_mesh(config.mesh)
        if args.compile_only:
            with jax.set_mesh(devices):
                for shape in shapes:
                    print_memory(config, shape, models)
            return
        peak = ceilings.matmul()  # of one device: outside the mesh
        with jax.set_mesh(devices):
            results = {"provenance": report.origin(), "matmul_ceiling": peak, "rows": []}
            print(f"ceiling: {peak / 1e12:,.1f} TFLOP/s, matmul of bfloat16\n", flush=True)
            for shape in shapes:
                work = train_flops(config.model, shape.batch, shape.tokens) / jax.device_count()
                rows = bench(config, shape, models, work, peak, args.trace)
                report.publish(str(shape), COLUMNS, rows, results, args.json)


if __name__ == "__main__":
    main()
