"""Instructions on registers: arithmetic, logic, comparisons, conversions (PTX ISA, 9.7.1 to 9.7.9)."""

import operator

import numpy as np

from ptx.operands import DTYPES, THREADS, Operands, unsigned_of
from ptx.parser import Instruction, UnsupportedError

_NO_EFFECT = {"rn", "lo", "approx", "full", "ftz", "rzi", "rni"}
"""Parts of opcodes that make no difference here, or are handled with the conversion that has them."""


def bf16_to_f32(bits: np.ndarray) -> np.ndarray:
    """float32 of the bits of bfloat16."""
    return (bits.astype(np.uint32) << 16).view(np.float32)


def f32_to_bf16(x: np.ndarray) -> np.ndarray:
    """The bits of the nearest bfloat16, ties to even; of NaN, the canonical one."""
    bits = x.astype(np.float32).view(np.uint32).astype(np.uint64)
    rounded = bits + 0x7FFF + (bits >> 16 & 1) >> 16
    return np.where(np.isnan(x), 0x7FFF, rounded).astype(np.uint16)


def _fma(x, y, z):
    """In float64: of float32, the product is exact there."""
    return x * y + z if x.dtype != np.float32 else (x.astype(np.float64) * y + z).astype(np.float32)


def _divide(x, y):
    if x.dtype == np.float32:
        return x / y
    raise UnsupportedError("a division of integers")


_FUNCTIONS = {
    "add": operator.add,
    "sub": operator.sub,
    "mul": operator.mul,
    "mad": _fma,
    "fma": _fma,
    "div": _divide,
    "neg": operator.neg,
    "abs": np.abs,
    "and": operator.and_,
    "or": operator.or_,
    "xor": operator.xor,
    "not": np.invert,
    "rcp": lambda x: np.float32(1) / x,
    "rsqrt": lambda x: np.float32(1) / np.sqrt(x),
    "ex2": np.exp2,
    "lg2": np.log2,
}
_COMPARISONS = {
    "eq": np.equal,
    "ne": np.not_equal,
    "lt": np.less,
    "le": np.less_equal,
    "gt": np.greater,
    "ge": np.greater_equal,
}


def elementwise(instruction: Instruction, operands: Operands):
    """d = f(a, b, ...), all of the type at the end of the opcode."""
    name, *modifiers, kind = instruction.parts
    function = _FUNCTIONS[name]
    if unknown := set(modifiers) - _NO_EFFECT:
        raise UnsupportedError(f"{instruction}: {', '.join(sorted(unknown))}")
    write = operands.write(instruction.operands[0])
    if kind == "f16x2" and name in ("add", "sub", "mul"):
        words = [operands.read(operand, "u32") for operand in instruction.operands[1:]]
        return lambda wg, mask: write(
            wg, mask, function(*(read(wg).view(np.float16) for read in words)).view(np.uint32)
        )
    if kind not in DTYPES or "f16" in kind:
        raise UnsupportedError(f"{instruction}: the type {kind}")
    inputs = [operands.read(operand, kind) for operand in instruction.operands[1:]]
    return lambda wg, mask: write(wg, mask, function(*(read(wg) for read in inputs)))


def minimum_or_maximum(instruction: Instruction, operands: Operands):
    """min and max. Of floats, NaN is dropped without .NaN; .relu makes negative results 0."""
    name, *modifiers, kind = instruction.parts
    if set(modifiers) - {"NaN", "relu", "ftz"}:
        raise UnsupportedError(str(instruction))
    by_nan = {True: {"min": np.minimum, "max": np.maximum}, False: {"min": np.fmin, "max": np.fmax}}
    function = by_nan["NaN" in modifiers or kind[0] != "f"][name]
    x, y = (operands.read(operand, kind) for operand in instruction.operands[1:])
    write, least = operands.write(instruction.operands[0]), 0 if "relu" in modifiers else None
    zero = np.zeros(THREADS, DTYPES[kind])
    return lambda wg, mask: write(
        wg, mask, function(x(wg), y(wg)) if least is None else np.maximum(function(x(wg), y(wg)), zero)
    )


def multiply_wide(instruction: Instruction, operands: Operands):
    """mul.wide, mad.wide and mul.hi: the product in twice the bits, or its upper half."""
    name, part, kind = instruction.parts
    bits = int(kind[1:])
    if bits > 32 or (name, part) == ("mad", "hi"):
        raise UnsupportedError(str(instruction))
    wide = f"{kind[0]}{2 * bits}"
    x, y = (operands.read(operand, kind) for operand in instruction.operands[1:3])
    add = operands.read(instruction.operands[3], wide) if name == "mad" else None
    write = operands.write(instruction.operands[0])

    def step(wg, mask):
        product = x(wg).astype(DTYPES[wide]) * y(wg).astype(DTYPES[wide])
        if part == "hi":
            product = (product >> bits).astype(DTYPES[kind])
        write(wg, mask, product if add is None else product + add(wg))

    return step


def shift(instruction: Instruction, operands: Operands):
    """shl and shr; amounts above the width are as the width."""
    name, kind = instruction.parts
    bits = int(kind[1:])
    x, by = operands.read(instruction.operands[1], kind), operands.read(instruction.operands[2], "u32")
    write = operands.write(instruction.operands[0])

    def step(wg, mask):
        amount = np.minimum(by(wg), bits).astype(np.uint64)
        values, half = x(wg), (amount // 2).astype(DTYPES[kind])  # in two steps, as NumPy's shifts end below the width
        rest = amount.astype(DTYPES[kind]) - half
        write(wg, mask, values << half << rest if name == "shl" else values >> half >> rest)

    return step


def extract_bits(instruction: Instruction, operands: Operands):
    """bfe: a field of bits, of s32 extended by its sign."""
    kind = instruction.parts[-1]
    x, start, length = (
        operands.read(operand, each)
        for operand, each in zip(instruction.operands[1:], (kind, "u32", "u32"), strict=True)
    )
    write = operands.write(instruction.operands[0])

    def step(wg, mask):
        first, count = start(wg).astype(np.int64) & 255, length(wg).astype(np.int64) & 255
        if count.min() < 1 or (first + count).max() > int(kind[1:]):
            raise UnsupportedError(f"{instruction}: a field that is empty or beyond the register")
        up = (int(kind[1:]) - first - count).astype(DTYPES[kind])
        write(wg, mask, x(wg) << up >> (up + first.astype(DTYPES[kind])))

    return step


def permute_bytes(instruction: Instruction, operands: Operands):
    """prmt: each byte of the result is one of the 8 of a and b, or copies of its sign."""
    if instruction.opcode != "prmt.b32":
        raise UnsupportedError(str(instruction))
    x, y, selector = (operands.read(operand, "u32") for operand in instruction.operands[1:])
    write = operands.write(instruction.operands[0])

    def step(wg, mask):
        choices = np.stack([x(wg), y(wg)], 1).view(np.uint8)
        nibbles = selector(wg)[:, None] >> np.arange(0, 16, 4, dtype=np.uint32) & 15
        chosen = np.take_along_axis(choices, (nibbles & 7).astype(int), 1)
        signs = np.where(chosen >> 7, 255, 0).astype(np.uint8)
        write(wg, mask, np.where(nibbles >> 3, signs, chosen).view(np.uint32)[:, 0])

    return step


def compare(instruction: Instruction, operands: Operands):
    """setp without a boolean operator: comparisons are false of NaN, the unordered ones (`ltu`) true."""
    _, comparison, kind = instruction.parts
    x, y = (operands.read(operand, kind) for operand in instruction.operands[1:])
    write = operands.write(instruction.operands[0])
    of_floats = {"nan": True, "num": False}
    if comparison in _COMPARISONS:
        function = _COMPARISONS[comparison]
        return lambda wg, mask: write(wg, mask, function(x(wg), y(wg)))
    unordered = _COMPARISONS.get(comparison.removesuffix("u"))
    if kind[0] != "f" or not (unordered or comparison in of_floats):
        raise UnsupportedError(str(instruction))

    def step(wg, mask):
        a, b = x(wg), y(wg)
        either_nan = np.isnan(a) | np.isnan(b)
        write(wg, mask, unordered(a, b) | either_nan if unordered else either_nan == of_floats[comparison])

    return step


def select(instruction: Instruction, operands: Operands):
    """selp: a where the predicate is true, else b."""
    kind = instruction.parts[1]
    x, y = (operands.read(operand, kind) for operand in instruction.operands[1:3])
    predicate, write = operands.read(instruction.operands[3], "pred"), operands.write(instruction.operands[0])
    return lambda wg, mask: write(wg, mask, np.where(predicate(wg), x(wg), y(wg)))


def convert(instruction: Instruction, operands: Operands):
    """cvt. Floats are rounded to the nearest even, to integers as .rni and .rzi say, and clamped to their range."""
    _, *modifiers, to, kind = instruction.parts
    if len(modifiers) > 1 or set(modifiers) - {"rn", "rni", "rzi"}:
        raise UnsupportedError(str(instruction))
    write = operands.write(instruction.operands[0])
    inputs = [operands.read(operand, kind) for operand in instruction.operands[1:]]
    if to in ("bf16x2", "f16x2") and kind == "f32":
        upper, lower = inputs
        narrow = _narrow(to.removesuffix("x2"))
        return lambda wg, mask: write(
            wg, mask, narrow(upper(wg)).astype(np.uint32) << 16 | narrow(lower(wg)).astype(np.uint32)
        )
    (x,) = inputs
    if kind == "bf16" and to == "f32":
        return lambda wg, mask: write(wg, mask, bf16_to_f32(x(wg)))
    if kind == "f32" and to in ("bf16", "f16"):
        narrow = _narrow(to)
        return lambda wg, mask: write(wg, mask, narrow(x(wg)))
    if "bf16" in (to, kind):
        raise UnsupportedError(str(instruction))
    to_integer = {"rni": np.rint, "rzi": np.trunc}.get(modifiers[0] if modifiers else "")
    if kind[0] == "f" and (to[0] != "f" or to_integer):
        return lambda wg, mask: write(wg, mask, _clamped(to_integer(x(wg)), to))
    return lambda wg, mask: write(wg, mask, x(wg).astype(DTYPES[to]))


def _narrow(kind: str):
    return f32_to_bf16 if kind == "bf16" else lambda x: x.astype(np.float16).view(np.uint16)


def _clamped(x: np.ndarray, to: str) -> np.ndarray:
    if to[0] == "f":
        return x
    limits = np.iinfo(DTYPES[to])
    if limits.bits > 32:
        raise UnsupportedError(f"cvt of a float to {to}")
    return np.where(np.isnan(x), 0, np.clip(x.astype(np.float64), limits.min, limits.max)).astype(DTYPES[to])


def move(instruction: Instruction, operands: Operands):
    """mov, also of the low and high half of a register to or from two: `mov.b32 {a, b}, c`."""
    _, kind = instruction.parts
    to, source = instruction.operands
    if not to.startswith("{") and not source.startswith("{"):
        read, write = operands.read(source, kind), operands.write(to)
        return lambda wg, mask: write(wg, mask, read(wg))
    parts = operands.list(to if to.startswith("{") else source)
    part = f"b{int(kind[1:]) // len(parts)}"
    if to.startswith("{"):
        read, writes = operands.read(source, kind), [operands.write(name) for name in parts]

        def unpack(wg, mask):
            values = read(wg).copy().view(unsigned_of(part)).reshape(THREADS, len(parts))
            for write, values_of_part in zip(writes, values.T, strict=True):
                write(wg, mask, values_of_part)

        return unpack
    reads, write = [operands.read(name, part) for name in parts], operands.write(to)
    return lambda wg, mask: write(wg, mask, np.stack([read(wg) for read in reads], 1).view(unsigned_of(kind))[:, 0])


def _multiply(instruction: Instruction, operands: Operands):
    wide = {"wide", "hi"} & set(instruction.parts)
    return (multiply_wide if wide else elementwise)(instruction, operands)


HANDLERS = {
    **dict.fromkeys(_FUNCTIONS, elementwise),
    **dict.fromkeys(("mul", "mad"), _multiply),
    **dict.fromkeys(("min", "max"), minimum_or_maximum),
    **dict.fromkeys(("shl", "shr"), shift),
    "bfe": extract_bits,
    "prmt": permute_bytes,
    "setp": compare,
    "selp": select,
    "cvt": convert,
    "mov": move,
}
