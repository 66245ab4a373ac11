"""Words for integers, threads and PTX in what the Hopper kernels say to Mosaic GPU itself."""

from typing import Any

from jax.experimental.mosaic import gpu as mgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, llvm


def i8() -> ir.Type:
    """The type of a byte."""
    return ir.IntegerType.get_signless(8)


def i32() -> ir.Type:
    """The type of a word."""
    return ir.IntegerType.get_signless(32)


def constant(n: int) -> Any:
    """A word."""
    return arith.constant(i32(), n)


def thread(threads: int = 128) -> Any:
    """The number of the thread among so many: those of a warpgroup, or of several."""
    return arith.remui(mgpu.utils.thread_idx(), constant(threads))


def split(x: Any, n: int) -> tuple[Any, Any]:
    """Quotient and remainder of x and n, without a sign."""
    return arith.divui(x, constant(n)), arith.remui(x, constant(n))


def times(x: Any, n: int) -> Any:
    """The product."""
    return arith.muli(x, constant(n))


def plus(x: Any, *others) -> Any:
    """The sum."""
    for other in others:
        x = arith.addi(x, other)
    return x


def run(code: str, constraints: str, *operands) -> None:
    """PTX that returns nothing and has effects."""
    llvm.inline_asm(ir.Type.parse("!llvm.void"), operands, code, constraints, has_side_effects=True)
