"""16-bit tiles in shared memory with the 128-byte swizzle, by address: what Pallas has no operation for.

Rows are cleared or copied to global memory; wgmma accumulators are stored to a tile and loaded from it transposed
(stmatrix, ldmatrix).

A tile [rows, width], as `smem_tiles.swizzled_smem` makes it for whole `CHUNK`s of columns, consists of swizzle atoms of
8 rows x 1 chunk: 128 bytes per row, whose 16-byte units are permuted; unit u of row r is at u xor (r mod 8).
"""

from collections.abc import Iterator
from typing import Any

import numpy as np
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, llvm, scf, vector

from latent_attention.hopper.mailbox import spin_receive
from latent_attention.hopper.mlir import add, constant, divmod_unsigned, i8, i32, inline_ptx, mul, thread_index
from latent_attention.hopper.smem_tiles import CHUNK

_TILE = plgpu.RefType((plgpu.TilingTransform((8, CHUNK)), plgpu.SwizzleTransform(128)))
_ATOM = 1024
"""Bytes of a swizzle atom: 8 rows of a chunk."""


def clear_rows(tile_ref, valid) -> None:
    """Zeros the rows from `valid` on of a tile [64, width], for following wgmmas."""
    rows, width = tile_ref.shape
    assert rows == 64

    @plgpu.inline_mgpu(arg_types=(_TILE, plgpu.Layout.WG_SPLAT))
    def clear(_, tile, valid):
        row, half = divmod_unsigned(thread_index(), 2)  # two threads per row, each with half of every chunk
        beyond = scf.IfOp(arith.cmpi(arith.CmpIPredicate.sge, row, valid.registers.item()))
        with ir.InsertionPoint(beyond.then_block):
            atom_row, row_in_atom = divmod_unsigned(row, 8)
            own = add(mul(atom_row, width // CHUNK * _ATOM), mul(row_in_atom, 128), mul(half, 64))
            zeros = vector.broadcast(ir.VectorType.get((4,), i32()), constant(0))
            for i in range(width // CHUNK * 4):
                offset = add(own, constant(i // 4 * _ATOM + i % 4 * 16))
                llvm.store(zeros, mgpu.utils.getelementptr(mgpu.utils.memref_ptr(tile), [offset], i8()), alignment=16)
            scf.yield_([])

    clear(tile_ref, valid)  # pyright: ignore[reportCallIssue]
    plgpu.commit_smem()


def store_accumulator(tile_ref, x, columns: int = CHUNK) -> None:
    """Stores a 16-bit accumulator x [M, N] to a tile [N, M]; other threads need a barrier before they read it.

    The tile of an accumulator [64, N] can also be one of half as many columns a swizzle atom, CHUNK / 2.
    """
    tile_type = plgpu.RefType((plgpu.TilingTransform((8, columns)), plgpu.SwizzleTransform(2 * columns)))

    @plgpu.inline_mgpu(arg_types=(tile_type, plgpu.Layout.WGMMA))
    def store(_, tile, x):
        for address, offset, indices in _matrices(tile, x.shape, columns):
            words = [mgpu.utils.bitcast(x.registers[index], i32()) for index in indices]
            registers = ", ".join(f"${i + 1}" for i in range(len(words)))
            code = f"stmatrix.sync.aligned.m8n8.x{len(words)}.trans.shared.b16 [$0 + {offset}], {{{registers}}};"
            constraints = ",".join(["r"] * (1 + len(words)) + ["~{memory}"])
            inline_ptx(code, constraints, address, *words)

    store(tile_ref, x)  # pyright: ignore[reportCallIssue]


def copy_rows(tile_ref, ref) -> None:
    """Copies a tile [rows, width], rows a multiple of 4, to global memory of this shape, 512 bytes a warp at a time."""
    rows, width = tile_ref.shape
    assert rows % 4 == 0 and width % 256 == 0

    @plgpu.inline_mgpu(arg_types=(_TILE, plgpu.RefType()))
    def copy(_, tile, ref):
        atom_row_bytes, (warp, lane) = width // CHUNK * _ATOM, divmod_unsigned(thread_index(), 32)
        chunk, unit = divmod_unsigned(lane, 8)
        words = ir.VectorType.get((4,), i32())
        source, target = (mgpu.utils.memref_ptr(x) for x in (tile, ref))
        for first in range(0, rows, 4):
            row = add(warp, constant(first % 8))  # in the atom
            own = add(mul(chunk, _ATOM), mul(row, 128), mul(arith.xori(unit, row), 16))
            for start in range(0, width, 256):
                src = add(own, constant(first // 8 * atom_row_bytes + start // CHUNK * _ATOM))
                dst = add(mul(warp, 2 * width), mul(lane, 16), constant(2 * (first * width + start)))
                loaded = llvm.load(words, mgpu.utils.getelementptr(source, [src], i8()), alignment=16)
                llvm.store(loaded, mgpu.utils.getelementptr(target, [dst], i8()), alignment=16)

    copy(tile_ref, ref)  # pyright: ignore[reportCallIssue]


def receive_rows(words_ref, tile_refs, epoch, num_threads: int) -> None:
    """`mailbox.receive` of a matrix [rows, width], whose first columns go to one tile and the others to another."""
    rows = tile_refs[0].shape[0]
    widths = [ref.shape[1] for ref in tile_refs]
    assert words_ref.shape == (rows * sum(widths),)

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(), _TILE, _TILE, plgpu.Layout.WG_SPLAT))
    def receive(_, words, *rest):
        *tiles, epoch = rest
        pointers = [mgpu.utils.memref_ptr(tile) for tile in tiles]
        starts = [llvm.ptrtoint(i32(), pointer) for pointer in pointers]
        chunks = [width // CHUNK for width in widths]
        for quad, elements in spin_receive(words, epoch, num_threads):
            row, column = divmod_unsigned(quad, sum(widths) // 4)
            (atom_row, row_in_atom), (chunk, inside) = divmod_unsigned(row, 8), divmod_unsigned(column, CHUNK // 4)
            unit, half = divmod_unsigned(inside, 2)
            is_second = arith.cmpi(arith.CmpIPredicate.uge, chunk, constant(chunks[0]))
            to_second = add(arith.subi(starts[1], starts[0]), constant(-chunks[0] * _ATOM))
            offset = add(
                arith.select(is_second, to_second, constant(0)), mul(chunk, _ATOM),
                arith.muli(atom_row, arith.select(is_second, constant(chunks[1] * _ATOM), constant(chunks[0] * _ATOM))),
                mul(row_in_atom, 128), mul(arith.xori(unit, row_in_atom), 16), mul(half, 8),
            )  # fmt: skip
            llvm.store(elements, mgpu.utils.getelementptr(pointers[0], [offset], i8()), alignment=8)

    receive(words_ref, *tile_refs, epoch)  # pyright: ignore[reportCallIssue]


def load_accumulator(tile_ref, dtype) -> Any:
    """Loads a tile [N, M] of this 16-bit type as an accumulator [M, N]."""
    N, M = tile_ref.shape

    @plgpu.inline_mgpu(arg_types=(_TILE,), return_type=plgpu.ShapeDtypeStruct((M, N), dtype, layout=plgpu.Layout.WGMMA))
    def load(_, tile):
        registers = np.empty(mgpu.WGMMA_LAYOUT.registers_shape((M, N)), dtype=object)
        pair = ir.VectorType.get((2,), ir.MemRefType(tile.type).element_type)
        for address, offset, indices in _matrices(tile, (M, N)):
            count = len(indices)
            out = ", ".join(f"${i}" for i in range(count))
            code = f"ldmatrix.sync.aligned.m8n8.x{count}.trans.shared.b16 {{{out}}}, [${count} + {offset}];"
            constraints = ",".join(["=r"] * count + ["r", "~{memory}"])
            result = i32() if count == 1 else llvm.StructType.get_literal([i32()] * count)
            loaded: Any = llvm.inline_asm(result, [address], code, constraints, has_side_effects=True)
            words = [loaded] if count == 1 else [llvm.extractvalue(i32(), loaded, [i]) for i in range(count)]
            for index, word in zip(indices, words, strict=True):
                registers[index] = mgpu.utils.bitcast(word, pair)
        return mgpu.FragmentedArray(_registers=registers, _layout=mgpu.WGMMA_LAYOUT, _is_signed=None)

    return load(tile_ref)  # pyright: ignore[reportCallIssue]


def _matrices(tile, shape: tuple[int, int], columns: int = CHUNK) -> Iterator[tuple[Any, int, list[tuple]]]:
    """The ldmatrix or stmatrix instructions between an accumulator [M, N] and a tile [N, M].

    Each is (address in this thread, further offset in bytes, indices of one to four registers). A register holds its
    thread's elements of an 8 x 8 matrix of the accumulator; transposed, the matrix is 8 rows of 16 bytes of the tile. A
    thread supplies the address of one row: thread t that of row t mod 8 of matrix t / 8.
    """
    (M, N), atom_row_bytes = shape, shape[0] // CHUNK * _ATOM
    assert columns == CHUNK or (columns, M) == (CHUNK // 2, 64)
    warp, lane = divmod_unsigned(thread_index(), 32)
    matrix, row = divmod_unsigned(lane, 8)
    base = llvm.ptrtoint(i32(), mgpu.utils.memref_ptr(tile))
    row_address = add(base, mul(matrix, atom_row_bytes), mul(row, 2 * columns))
    for half in range(2):  # a warp has 16 rows of the accumulator: two units of a row of the tile
        unit = add(mul(warp, 2), constant(half))
        if columns == CHUNK:
            address = add(row_address, mul(arith.xori(unit, row), 16))
        else:  # two atoms, of four units a row, in which unit u of row r is at u xor (r / 2)
            atom, unit = divmod_unsigned(unit, 4)
            unit = arith.xori(unit, arith.divui(row, constant(2)))
            address = add(row_address, mul(atom, _ATOM // 2), mul(unit, 16))
        for block in range(M // CHUNK):
            first = 0
            while first < N // 8:
                count = next(n for n in (4, 2, 1) if first + n <= N // 8)
                indices = [(block, first + i, 0, 0, half, 0, 0, 0, 0) for i in range(count)]
                yield address, block * _ATOM + first * atom_row_bytes, indices
                first += count
