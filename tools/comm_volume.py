"""Communication volume of a training step on a mesh: `python -m tools.comm_volume --devices N`.

Compiles the step for N fake devices on a CPU and adds up its collective operations; nothing is computed. XLA's CPU
back end gathers weights in float32 that a GPU gathers in bfloat16, and sums gradients by all-reduce where a GPU has
reduce-scatter: docs/scaling.md counts with both in mind.
"""

import argparse
import collections
import dataclasses
import math
import os
import re
from typing import NamedTuple

from mla_jax.errors import UsageError, one_line_errors

_BYTES = {"pred": 1, "s8": 1, "bf16": 2, "f16": 2, "s32": 4, "u32": 4, "f32": 4}
_KINDS = "all-gather|all-reduce|reduce-scatter|all-to-all|collective-permute"
_OPERATION = re.compile(rf"= (?P<type>[^=]*?) (?P<kind>{_KINDS})\((?P<rest>.*)")


class Collective(NamedTuple):
    """All collective operations of one kind over groups of one size, in a step."""

    kind: str
    group: int
    """Devices that take part in each."""
    count: int
    whole: float
    """Bytes of the whole arrays, gathered or summed."""

    @property
    def sent(self) -> float:
        """Bytes that each device sends by rings; an all-reduce sends twice as much as the reduce-scatter it may be."""
        rounds = 2 if self.kind == "all-reduce" else 1
        return rounds * self.whole * (self.group - 1) / self.group


def collectives(program: str) -> list[Collective]:
    """Adds up the collective operations of a partitioned HLO program, whose loops must hold none."""
    found: dict[tuple[str, int], list[float]] = collections.defaultdict(list)
    for match in _OPERATION.finditer(re.sub(r"/\*.*?\*/", "", program)):
        arrays = re.findall(r"(\w+)\[([\d,]*)\]", match["type"])
        size = sum(_BYTES[kind] * math.prod(int(n) for n in dims.split(",") if n) for kind, dims in arrays)
        group = _group_size(match["rest"])
        if group > 1:
            found[match["kind"], group].append(size * (group if match["kind"] == "reduce-scatter" else 1))
    return [Collective(kind, group, len(sizes), sum(sizes)) for (kind, group), sizes in sorted(found.items())]


def _group_size(rest: str) -> int:
    """Devices of a group: 4 for `replica_groups=mesh['x'=2,'y'=4] {'y'}`, 2 for `replica_groups={{0,1},{2,3}}`."""
    listed = re.search(r"replica_groups=\{\{([\d,]*)\}", rest)
    if listed:
        return len(listed[1].split(","))
    groups = re.search(r"replica_groups=mesh\[([^]]*)\].*?\{('[^}]*)\}", rest)
    if groups is None:  # a permutation sends from one to another
        return 2
    sizes = dict(re.findall(r"'(\w+)'=(\d+)", groups[1]))
    return math.prod(int(sizes[axis]) for axis in re.findall(r"'(\w+)'", groups[2]))


def compiled_step(overrides: list[str], text: str) -> str:
    """The partitioned program of a step over a batch of shape `text` on all devices."""
    import jax

    from experiments.entry import compose_config
    from mla_jax.mesh import make_mesh
    from tools.bench.steps import Shape, compile_step

    config = compose_config(overrides)
    if config.train.grad_accumulation > 1:
        raise UsageError("train.grad_accumulation puts communication into a loop; count one micro-batch with --shape")
    model = dataclasses.replace(config.model, unroll=-1, attention="xla")  # no loop around collectives
    with jax.set_mesh(make_mesh(config.mesh)):
        return compile_step(dataclasses.replace(config, model=model), Shape.parse(text))[0].as_text()


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m tools.comm_volume", description="Communication of a training step."
    )
    parser.add_argument(
        "overrides", nargs="*", default=["experiment=infinite_1b"], metavar="KEY=VALUE",
        help="as of experiments.sft: mesh.data, mesh.fsdp and mesh.context above all",
    )  # fmt: skip
    parser.add_argument("--devices", type=int, required=True)
    parser.add_argument("--shape", default="8x8k", help="BATCHxTOKENS of a step (default: 8x8k)")
    args = parser.parse_args()
    os.environ["JAX_PLATFORMS"] = "cpu"
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={args.devices}"
    with one_line_errors():
        for c in collectives(compiled_step(args.overrides, args.shape)):
            size = f"{c.whole / 1e6:,.1f} MB in {c.count} operations, {c.sent / 1e6:,.1f} MB sent by each device"
            print(f"{c.kind} over {c.group} devices: {size}")


if __name__ == "__main__":
    main()
