"""Operands of instructions: registers, immediate values, addresses (PTX ISA, 6: Instruction operands).

A register is an array over the 128 threads of a warpgroup, of the unsigned type of its width; predicates are bool.
"""

import re
from collections.abc import Callable
from typing import Any

import numpy as np

from ptx.memory import DYNAMIC_SHARED, PARAMS
from ptx.parser import Program, UnsupportedError, split

THREADS = 128
LANE, WARP = np.arange(THREADS) % 32, np.arange(THREADS) // 32

_BITS = {8: np.uint8, 16: np.uint16, 32: np.uint32, 64: np.uint64}
DTYPES: dict[str, Any] = {
    "pred": np.bool_,
    "f32": np.float32,
    "f16": np.float16,
    **{f"{kind}{bits}": unsigned for kind in "bu" for bits, unsigned in _BITS.items()},
    **{f"s{bits}": np.dtype(f"int{bits}").type for bits in _BITS},
    **{"bf16": np.uint16, "bf16x2": np.uint32, "f16x2": np.uint32},
}
"""NumPy's type of a PTX type; of those that NumPy has not, of their bits."""

Read = Callable[[Any], np.ndarray]
"""The values of an operand in the threads of a warpgroup."""
Write = Callable[[Any, np.ndarray, np.ndarray], None]
"""Sets a register of a warpgroup where a mask is true."""


def unsigned_of(ptx_type: str) -> Any:
    """The unsigned type of the width of a PTX type."""
    return np.bool_ if ptx_type == "pred" else _BITS[8 * np.dtype(DTYPES[ptx_type]).itemsize]


class Operands:
    """Makes functions that read and write the operands of one program."""

    def __init__(self, program: Program):
        self._registers = program.registers
        starts = np.cumsum([0, *(-(-size // 128) * 128 for size in program.params.values())])
        self.params = dict(zip(program.params, (PARAMS + int(x) for x in starts), strict=False))
        """Address by name of a parameter; each starts at a multiple of 128 bytes."""

    def read(self, operand: str, ptx_type: str) -> Read:
        """Values as NumPy's type of this PTX type; from a wider register, its low bits."""
        dtype, bits = DTYPES[ptx_type], unsigned_of(ptx_type)
        if self._type_of(operand):
            return lambda wg: wg.registers[operand].astype(bits, copy=False).view(dtype)
        if special := _SPECIAL.get(operand):
            return lambda wg: special(wg).astype(bits).view(dtype)
        values = np.full(THREADS, self._constant(operand) & (1 << 64) - 1, np.uint64).astype(bits).view(dtype)
        return lambda wg: values

    def _constant(self, operand: str) -> int:
        if operand.startswith("0f"):
            return int(operand[2:], 16)
        if re.fullmatch(r"-?(0x[0-9a-fA-F]+|\d+)U?", operand):
            return int(operand.rstrip("U"), 0)
        if "dynamic_shmem" in operand:
            return DYNAMIC_SHARED
        if operand in self.params:
            return self.params[operand]
        raise UnsupportedError(f"the operand {operand}")

    def write(self, operand: str) -> Write:
        """Writes a register; narrower values are extended, by their sign if they have one."""
        ptx_type = self._type_of(operand)
        if operand == "_":
            return lambda wg, mask, values: None
        if ptx_type is None:
            raise UnsupportedError(f"the register {operand}, which is not declared")
        bits = unsigned_of(ptx_type)

        def write(wg, mask, values):
            if values.dtype.kind == "f":
                values = values.view(_BITS[8 * values.itemsize])
            values = values.astype(bits, copy=False)
            if not mask.all():
                values = np.where(mask, values, wg.registers.get(operand, np.zeros(THREADS, bits)))
            wg.registers[operand] = values

        return write

    def _type_of(self, operand: str) -> str | None:
        return self._registers.get(operand) or self._registers.get(operand.rstrip("0123456789"))

    def list(self, operand: str) -> list[str]:
        """`{a, b}` and `a` as lists."""
        return split(operand[1:-1]) if operand.startswith("{") else [operand]

    def address(self, operand: str) -> Read:
        """uint64 addresses of `[base]`, `[base + 4]` and `[base+-4]`."""
        found = re.fullmatch(r"\[\s*([^\s+]+)\s*(?:\+\s*(-?\d+))?\s*\]", operand)
        if not found:
            raise UnsupportedError(f"the address {operand}")
        base, offset = self.read(found[1], "u64"), np.uint64(int(found[2] or 0) & (1 << 64) - 1)
        return lambda wg: base(wg) + offset


def _same(value: int) -> np.ndarray:
    return np.full(THREADS, value, np.uint32)


_SPECIAL: dict[str, Read] = {
    "%tid.x": lambda wg: THREADS * wg.index + np.arange(THREADS),
    "%tid.y": lambda wg: _same(0),
    "%tid.z": lambda wg: _same(0),
    "%laneid": lambda wg: LANE,
    "%ctaid.x": lambda wg: _same(wg.cta.place[0]),
    "%ctaid.y": lambda wg: _same(wg.cta.place[1]),
    "%ctaid.z": lambda wg: _same(wg.cta.place[2]),
}
