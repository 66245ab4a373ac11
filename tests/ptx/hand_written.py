"""Small kernels written by hand, for the interpreter's own tests."""

import numpy as np

from ptx.machine import Machine
from ptx.memory import GLOBAL


def launch(body, *arrays, params=(), grid=(1, 1, 1), block=128):
    """A machine for statements, and its global memory. %rd1, %rd2, ... are the addresses of arrays, %r0 is the thread.

    %rd11, %rd12, ... are the addresses of the thread's 32-bit word in each. Other parameters are p0, p1, ... from the
    number of arrays on, as bytes.
    """
    values, data = [], b""
    for array in arrays:
        values.append((GLOBAL + len(data)).to_bytes(8, "little"))
        data += array.tobytes().ljust(-(-array.nbytes // 1024) * 1024, b"\0")
    kinds = [*[".param .u64 p{}"] * len(values), *(f".param .align 64 .b8 p{{}}[{len(x)}]" for x in params)]
    text = "".join(
        f"ld.param.b64 %rd{i + 1}, [p{i}]; add.s64 %rd{i + 11}, %rd{i + 1}, %rd10;\n" for i in range(len(values))
    )
    ptx = f""".version 9.0
.target sm_90a
.visible .entry kernel({", ".join(kind.format(i) for i, kind in enumerate(kinds))})
.maxntid {block}, 1, 1
{{
    .reg .pred %p<9>;
    .reg .b16 %rs<99>;
    .reg .b32 %r<999>;
    .reg .b64 %rd<99>;
    mov.u32 %r0, %tid.x;
    mul.wide.u32 %rd10, %r0, 4;
    {text}{body}
    ret;
}}"""
    memory = np.frombuffer(bytearray(data), np.uint8)
    return Machine(ptx, grid, block, 64 << 10, b"".join([*values, *params]), memory), memory


def execute(body, *arrays, **options):
    """What is in the first array after statements."""
    machine, memory = launch(body, *arrays, **options)
    machine.run()
    return memory[: arrays[0].nbytes].view(arrays[0].dtype).reshape(arrays[0].shape)
