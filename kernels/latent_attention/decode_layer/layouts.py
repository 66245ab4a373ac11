"""How `gemv` distributes vectors and rows over the registers of a warpgroup.

A vector [width] is distributed over the 128 threads, or, if it is narrow, replicated in each of the four warps. Rows in
8 bits are held as 32-bit words of four elements, which are where those of rows in 16 bits would be.
"""

from typing import Any

from latent_attention.hopper.registers import rows_layout, vector_layout, vector_length
from latent_attention.hopper.smem_tiles import tiled_layout

_NARROW = tiled_layout((4, 256), (1, 256), (1, 8), warps=(-6,), lanes=(-3,))
_NARROW_WORDS = tiled_layout((4, 64), (1, 64), (1, 2), warps=(-6,), lanes=(-3,))


def is_narrow(width: int) -> bool:
    """Whether each warp has whole rows of this width, a multiple of 256, instead of a quarter of every row."""
    return width % 256 == 0 and width <= 1024


def fits_int8(width: int) -> bool:
    """Whether the elements of each thread, of rows of this width, are whole words in 8 bits."""
    return is_narrow(width) or width % 512 == 0


def operand_layout(width: int) -> Any:
    """The layout of the vector that `gemv` multiplies rows of this width with."""
    return _NARROW.reduce((0,)) if is_narrow(width) else vector_layout(width)


def matrix_layout(width: int) -> Any:
    """The layout of the 16-bit rows [rows, width] that `gemv` multiplies."""
    return _NARROW if is_narrow(width) else rows_layout(vector_length(width))


def words_layout(width: int) -> Any:
    """The layout of 8-bit rows as words [rows, width / 4]."""
    return _NARROW_WORDS if is_narrow(width) else rows_layout(vector_length(width) // 4)
