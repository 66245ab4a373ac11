"""Times a training step on one device as each of several would run it under `mesh.context`, without the others.

`python -m tools.bench.context [KEY=VALUE ...] [--shapes ...] [--devices ...] [--attention ...] [--json FILE]`: of n
devices that share sequences of T tokens, this one holds T / n, expands the latents of all and attends to them. What the
others would send is made of its own latents. So all that is missing is what devices send each other (docs/scaling.md);
weights are whole. MFU is that of n such devices: an n-th of the whole work over the time and the peak of one.
"""

import argparse
import contextlib
import dataclasses
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp

from experiments.entry import compose_config
from mla_jax import mesh
from mla_jax.config import MeshConfig, RunConfig
from mla_jax.errors import UsageError, one_line_errors
from mla_jax.observability.flops import train_flops
from tools.bench import ceilings, report, train
from tools.bench.steps import Shape

DEFAULT_SHAPES = ["1x128k", "1x256k"]
COLUMNS = {name: train.COLUMNS[name] for name in ("ms", "spread", "MFU", "MFU of measured peak", "GB", "compiled in s")}


@contextlib.contextmanager
def one_of(devices: int, index: int) -> Iterator[None]:
    """Makes this device, on a mesh of one, number `index` of so many that share each sequence.

    Device i of them holds the tokens of this one, rolled by i: keys that differ, or XLA might attend to them once.
    """
    stand_ins = {
        "num_sequence_shards": lambda x_BTX: devices,
        "sequence_shard": lambda: jax.lax.axis_index("context") + index,  # traced, as on a mesh of several
        "all_gather_sequence": lambda x_BTX: jnp.stack([jnp.roll(x_BTX, i, axis=1) for i in range(devices)]),
    }
    with mock.patch.multiple(mesh, **stand_ins):
        yield
    jax.clear_caches()  # of what was traced for these devices


def share(shape: Shape, devices: int) -> Shape:
    """What each of so many devices holds of a batch.

    Raises:
        UsageError: the tokens of a sequence do not divide into an early and a late chunk for each device.
    """
    if shape.tokens % (2 * devices):
        raise UsageError(f"{shape}: {shape.tokens} tokens are no multiple of {2 * devices}, twice the devices")
    return Shape(shape.batch, shape.tokens // devices)


def bench(config: RunConfig, shape: Shape, devices: int, index: int, attention: list[str], peak: float) -> list[Any]:
    """The rows of device `index` of so many, one for each implementation of attention; `peak` in FLOP/s is measured."""
    models = {name: dataclasses.replace(config.model, attention=name) for name in attention}
    work = train_flops(config.model, shape.batch, shape.tokens) / devices
    with one_of(devices, index):
        rows = train.bench(config, share(shape, devices), models, work, peak, None)
    whole = {"shape": str(shape), "devices": devices, "index": index}
    return report.with_ratios([row | whole | {"peer": row["implementation"] != attention[0]} for row in rows])


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m tools.bench.context", description="Times steps as devices that share sequences run them."
    )
    parser.add_argument(
        "overrides", nargs="*", default=["experiment=infinite_1b"], metavar="KEY=VALUE",
        help="as of experiments.sft (default: experiment=infinite_1b)",
    )  # fmt: skip
    parser.add_argument(
        "--shapes", nargs="+", default=DEFAULT_SHAPES, metavar="SHAPE", help="1x256k: one sequence of 256k, whole"
    )
    parser.add_argument("--devices", nargs="+", type=int, default=[2, 4, 8], help="how many share a sequence")
    parser.add_argument(
        "--index", nargs="+", type=int, default=[0, -1], metavar="I",
        help="which of them to be; from the last where negative (default: the first and the last, the other extreme)",
    )  # fmt: skip
    parser.add_argument(
        "--attention", nargs="+", default=["cudnn", "triton"], metavar="NAME",
        help="model.attention; the others are compared with the first (default: cudnn triton)",
    )  # fmt: skip
    parser.add_argument("--json", type=Path, help="file for the results, rewritten after each table")
    args = parser.parse_args()
    os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.95")
    with one_line_errors():
        shapes = [Shape.parse(text) for text in args.shapes]
        cases = [(shape, n, index % n) for shape in shapes for n in args.devices for index in args.index]
        for shape, n, _ in cases:
            share(shape, n)
        config = compose_config(args.overrides)
        peak = ceilings.matmul()
        results: dict[str, Any] = {"provenance": report.origin(), "matmul_ceiling": peak, "rows": []}
        print(f"ceiling: {peak / 1e12:,.1f} TFLOP/s, matmul of bfloat16\n", flush=True)
        with jax.set_mesh(mesh.make_mesh(MeshConfig(), jax.devices()[:1])):
            for shape, n, index in dict.fromkeys(cases):
                rows = bench(config, shape, n, index, args.attention, peak)
                report.publish(f"{shape}, device {index} of {n}", COLUMNS, rows, results, args.json)


if __name__ == "__main__":
    main()
