"""16-bit tiles in shared memory, past Pallas: rows cleared, and accumulators written to them and read transposed.

A tile [rows, width], as `mosaic_tiles.tiled` makes it for whole `CHUNK`s of columns, lies in blocks of 8 rows and a
chunk: 128 bytes a row, whose 16-byte units are exchanged, that of number u in row r being at u xor (r mod 8).
"""

from collections.abc import Iterator
from typing import Any

import numpy as np
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, llvm, scf, vector

from latent_attention.hopper.grid_sync import awaited
from latent_attention.hopper.mlir import constant, i8, i32, plus, run, split, thread, times
from latent_attention.hopper.smem_tiles import CHUNK

_TILE = plgpu.RefType((plgpu.TilingTransform((8, CHUNK)), plgpu.SwizzleTransform(128)))
_BLOCK = 1024
"""Bytes of 8 rows of a chunk."""


def clear_rows(tile_ref, valid) -> None:
    """Zeros the rows from `valid` on of a tile [64, width]."""
    rows, width = tile_ref.shape
    assert rows == 64

    @plgpu.inline_mgpu(arg_types=(_TILE, plgpu.Layout.WG_SPLAT))
    def clear(_, tile, valid):
        row, half = split(thread(), 2)  # half of what a row has in each chunk
        beyond = scf.IfOp(arith.cmpi(arith.CmpIPredicate.sge, row, valid.registers.item()))
        with ir.InsertionPoint(beyond.then_block):
            eight, at = split(row, 8)
            own = plus(times(eight, width // CHUNK * _BLOCK), times(at, 128), times(half, 64))
            nothing = vector.broadcast(ir.VectorType.get((4,), i32()), constant(0))
            for i in range(width // CHUNK * 4):
                place = plus(own, constant(i // 4 * _BLOCK + i % 4 * 16))
                llvm.store(nothing, mgpu.utils.getelementptr(mgpu.utils.memref_ptr(tile), [place], i8()), alignment=16)
            scf.yield_([])

    clear(tile_ref, valid)  # pyright: ignore[reportCallIssue]
    plgpu.commit_smem()


def store_accumulator(tile_ref, x) -> None:
    """Writes an accumulator x [M, N], in 16 bits, to a tile [N, M]; for other threads, behind a barrier."""

    @plgpu.inline_mgpu(arg_types=(_TILE, plgpu.Layout.WGMMA))
    def store(_, tile, x):
        for address, offset, places in _matrices(tile, x.shape):
            words = [mgpu.utils.bitcast(x.registers[place], i32()) for place in places]
            registers = ", ".join(f"${i + 1}" for i in range(len(words)))
            code = f"stmatrix.sync.aligned.m8n8.x{len(words)}.trans.shared.b16 [$0 + {offset}], {{{registers}}};"
            constraints = ",".join(["r"] * (1 + len(words)) + ["~{memory}"])
            run(code, constraints, address, *words)

    store(tile_ref, x)  # pyright: ignore[reportCallIssue]


def copy_rows(tile_ref, ref) -> None:
    """Copies a tile [rows, width], of a multiple of 4 rows, to memory of this shape: a warp 512 bytes at a time."""
    rows, width = tile_ref.shape
    assert rows % 4 == 0 and width % 256 == 0

    @plgpu.inline_mgpu(arg_types=(_TILE, plgpu.RefType()))
    def copy(_, tile, ref):
        of_eight, (warp, lane) = width // CHUNK * _BLOCK, split(thread(), 32)
        chunk, unit = split(lane, 8)
        words = ir.VectorType.get((4,), i32())
        source, target = (mgpu.utils.memref_ptr(x) for x in (tile, ref))
        for first in range(0, rows, 4):
            row = plus(warp, constant(first % 8))  # of the eight
            own = plus(times(chunk, _BLOCK), times(row, 128), times(arith.xori(unit, row), 16))
            for start in range(0, width, 256):
                at = plus(own, constant(first // 8 * of_eight + start // CHUNK * _BLOCK))
                to = plus(times(warp, 2 * width), times(lane, 16), constant(2 * (first * width + start)))
                loaded = llvm.load(words, mgpu.utils.getelementptr(source, [at], i8()), alignment=16)
                llvm.store(loaded, mgpu.utils.getelementptr(target, [to], i8()), alignment=16)

    copy(tile_ref, ref)  # pyright: ignore[reportCallIssue]


def collect_rows(words_ref, tile_refs, tag, threads: int) -> None:
    """`mosaic_meeting.collect` of a matrix, whose first columns go to one tile and the others to another."""
    rows = tile_refs[0].shape[0]
    widths = [ref.shape[1] for ref in tile_refs]
    assert words_ref.shape == (rows * sum(widths),)

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(), _TILE, _TILE, plgpu.Layout.WG_SPLAT))
    def collect(_, words, *rest):
        *tiles, tag = rest
        pointers = [mgpu.utils.memref_ptr(tile) for tile in tiles]
        starts = [llvm.ptrtoint(i32(), pointer) for pointer in pointers]
        chunks = [width // CHUNK for width in widths]
        for four, numbers in awaited(words, tag, threads):
            row, at = split(four, sum(widths) // 4)
            (eight, of_eight), (chunk, inside) = split(row, 8), split(at, CHUNK // 4)
            unit, half = split(inside, 2)
            is_other = arith.cmpi(arith.CmpIPredicate.uge, chunk, constant(chunks[0]))
            behind = plus(arith.subi(starts[1], starts[0]), constant(-chunks[0] * _BLOCK))
            place = plus(
                arith.select(is_other, behind, constant(0)), times(chunk, _BLOCK),
                arith.muli(eight, arith.select(is_other, constant(chunks[1] * _BLOCK), constant(chunks[0] * _BLOCK))),
                times(of_eight, 128), times(arith.xori(unit, of_eight), 16), times(half, 8),
            )  # fmt: skip
            llvm.store(numbers, mgpu.utils.getelementptr(pointers[0], [place], i8()), alignment=8)

    collect(words_ref, *tile_refs, tag)  # pyright: ignore[reportCallIssue]


def load_accumulator(tile_ref, dtype) -> Any:
    """A tile [N, M] of this 16-bit type as an accumulator [M, N]."""
    N, M = tile_ref.shape

    @plgpu.inline_mgpu(arg_types=(_TILE,), return_type=plgpu.ShapeDtypeStruct((M, N), dtype, layout=plgpu.Layout.WGMMA))
    def load(_, tile):
        registers = np.empty(mgpu.WGMMA_LAYOUT.registers_shape((M, N)), dtype=object)
        pair = ir.VectorType.get((2,), ir.MemRefType(tile.type).element_type)
        for address, offset, places in _matrices(tile, (M, N)):
            count = len(places)
            out = ", ".join(f"${i}" for i in range(count))
            code = f"ldmatrix.sync.aligned.m8n8.x{count}.trans.shared.b16 {{{out}}}, [${count} + {offset}];"
            constraints = ",".join(["=r"] * count + ["r", "~{memory}"])
            kind = i32() if count == 1 else llvm.StructType.get_literal([i32()] * count)
            loaded: Any = llvm.inline_asm(kind, [address], code, constraints, has_side_effects=True)
            words = [loaded] if count == 1 else [llvm.extractvalue(i32(), loaded, [i]) for i in range(count)]
            for place, word in zip(places, words, strict=True):
                registers[place] = mgpu.utils.bitcast(word, pair)
        return mgpu.FragmentedArray(_registers=registers, _layout=mgpu.WGMMA_LAYOUT, _is_signed=None)

    return load(tile_ref)  # pyright: ignore[reportCallIssue]


def _matrices(tile, shape: tuple[int, int]) -> Iterator[tuple[Any, int, list[tuple]]]:
    """Instructions for an accumulator [M, N] and a tile [N, M]: address, more bytes, and the registers, one to four.

    Each register has a matrix of 8 rows and 8 columns of the accumulator, transposed 8 rows of 16 bytes of the tile. A
    thread gives the address of a row: thread t that of row t mod 8 of matrix t / 8.
    """
    (M, N), of_eight = shape, shape[0] // CHUNK * _BLOCK  # bytes of 8 rows of the tile
    warp, lane = split(thread(), 32)
    matrix, row = split(lane, 8)
    base = llvm.ptrtoint(i32(), mgpu.utils.memref_ptr(tile))
    row_address = plus(base, times(matrix, of_eight), times(row, 128))
    for half in range(2):  # of a warp's 16 rows of the accumulator, two units of a row of the tile
        unit = arith.xori(plus(times(warp, 2), constant(half)), row)
        address = plus(row_address, times(unit, 16))
        for block in range(M // CHUNK):
            first = 0
            while first < N // 8:
                count = next(n for n in (4, 2, 1) if first + n <= N // 8)
                places = [(block, first + i, 0, 0, half, 0, 0, 0, 0) for i in range(count)]
                yield address, block * _BLOCK + first * of_eight, places
                first += count
