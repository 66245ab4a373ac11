"""MLIR helpers: 32-bit integer arithmetic, thread indices and inline PTX, for code inside `plgpu.inline_mgpu`."""

from typing import Any

from jax.experimental.mosaic import gpu as mgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, llvm


def i8() -> ir.Type:
    """The 8-bit integer type; with it, `getelementptr` counts in bytes."""
    return ir.IntegerType.get_signless(8)


def i32() -> ir.Type:
    """The 32-bit integer type."""
    return ir.IntegerType.get_signless(32)


def constant(n: int) -> Any:
    """A 32-bit constant."""
    return arith.constant(i32(), n)


def thread_index(num_threads: int = 128) -> Any:
    """The index of this thread among `num_threads`: those of its warpgroup, or of several neighbouring ones."""
    return arith.remui(mgpu.utils.thread_idx(), constant(num_threads))


def divmod_unsigned(x: Any, n: int) -> tuple[Any, Any]:
    """Quotient and remainder of x / n, unsigned."""
    return arith.divui(x, constant(n)), arith.remui(x, constant(n))


def mul(x: Any, n: int) -> Any:
    """x * n."""
    return arith.muli(x, constant(n))


def add(x: Any, *others) -> Any:
    """The sum of all arguments."""
    for other in others:
        x = arith.addi(x, other)
    return x


def inline_ptx(code: str, constraints: str, *operands) -> None:
    """Inline PTX with side effects and no result."""
    llvm.inline_asm(ir.Type.parse("!llvm.void"), operands, code, constraints, has_side_effects=True)
