"""Which thread has which element of the int8 tiles of the fused decoder layer: its code on a NumPy stand-in for MLIR.

A value is an array with an element for each thread; memory is an array of bytes.
"""

import types

import numpy as np
import pytest

from latent_attention.decode_layer import digits
from latent_attention.hopper import int8_tiles, mlir, swizzled_tiles
from latent_attention.hopper.int8_tiles import restore_order

THREADS = 256
MODULES = digits, int8_tiles, mlir, swizzled_tiles


def swizzled(row, column, width: int, swizzle: int, itemsize: int):
    """Byte of an element of a tile [rows, width], whose 16-byte units are permuted by bits of the address from 7 on."""
    columns = swizzle // itemsize
    atom = row // 8 * (width // columns) + column // columns
    byte = atom * 8 * swizzle + row % 8 * swizzle + column % columns * itemsize
    return byte ^ (byte >> 7 & swizzle // 16 - 1) << 4


class Memory:
    """Bytes at which every store is of places that none has written before, or of the same content."""

    def __init__(self, size: int):
        self.bytes, self.written = np.zeros(size, np.uint8), np.zeros(size, bool)

    def store(self, values, pointer, alignment=1) -> None:
        values = np.stack(np.broadcast_arrays(*values) if isinstance(values, list) else [values], -1)
        data = np.ascontiguousarray(values).view(np.uint8).reshape(len(values), -1)
        assert not (pointer[1] % alignment).any()
        for at, content in zip(pointer[1], data, strict=True):
            place = slice(at, at + len(content))
            assert not self.written[place].any() or np.array_equal(self.bytes[place], content)
            self.bytes[place], self.written[place] = content, True


@pytest.fixture
def stand_in(monkeypatch):
    """Puts NumPy in the place of MLIR."""
    threads = types.SimpleNamespace(count=128)
    u32 = lambda x: np.asarray(x, np.uint32)  # noqa: E731
    arith = types.SimpleNamespace(
        addi=lambda x, y: u32(x) + u32(y), muli=lambda x, y: u32(x) * u32(y), divui=lambda x, y: u32(x) // u32(y),
        remui=lambda x, y: u32(x) % u32(y), xori=lambda x, y: u32(x) ^ u32(y), subi=lambda x, y: u32(x) - u32(y),
    )  # fmt: skip
    prmt = {"0x5410": lambda x, y: x & 0xFFFF | y << 16, "0x7632": lambda x, y: x >> 16 | y & 0xFFFF0000}
    prmt |= {str(int(name, 16)): function for name, function in prmt.items()}
    llvm = types.SimpleNamespace(
        store=lambda x, pointer, alignment=1: pointer[0].store(x, pointer, alignment),
        ptrtoint=lambda _, memory: 0,
        inline_asm=lambda _, operands, code, *__: prmt[code.split(", ")[-1].rstrip(";")](*operands),
    )
    utils = types.SimpleNamespace(
        memref_ptr=lambda memory: memory, bitcast=lambda x, _: x,
        getelementptr=lambda memory, at, itemsize: (memory, np.asarray(at[0], np.int64) * itemsize),
        dtype_to_ir_type=lambda _: None,
    )  # fmt: skip
    types_of = types.SimpleNamespace(
        VectorType=types.SimpleNamespace(get=lambda *_: None), F32Type=types.SimpleNamespace(get=lambda: 4)
    )
    vector = types.SimpleNamespace(from_elements=lambda _, elements: elements)
    names = {
        "arith": arith, "llvm": llvm, "ir": types_of, "vector": vector, "constant": lambda n: n, "i8": lambda: 1,
        "i32": lambda: 4, "mgpu": types.SimpleNamespace(utils=utils),
        "thread_index": lambda count=128: np.arange(threads.count, dtype=np.uint32),
    }  # fmt: skip
    for module in MODULES:
        for name, value in names.items():
            if hasattr(module, name):
                monkeypatch.setattr(module, name, value)
        if hasattr(module, "plgpu"):
            monkeypatch.setattr(
                module.plgpu, "inline_mgpu", lambda **_: lambda function: lambda *args: function(None, *args)
            )
    return threads


class Tile(Memory):
    """A reference with a shape."""

    def __init__(self, shape: tuple[int, int], itemsize: int):
        super().__init__(shape[0] * shape[1] * itemsize)
        self.shape = shape


def accumulator(rows: int, columns: int):
    """Registers of a wgmma accumulator of 16 bits, of which each element is its number, for 128 threads."""
    lane, warp = np.arange(128) % 32, np.arange(128) // 32
    registers = np.empty((rows // 64, columns // 8, 1, 1, 2, 1, 1, 1, 1), object)
    for block, tile, half in np.ndindex(rows // 64, columns // 8, 2):
        row, column = 64 * block + 16 * warp + 8 * half + lane // 4, 8 * tile + 2 * (lane % 4)
        number = (row * columns + column).astype(np.uint32)
        registers[block, tile, 0, 0, half, 0, 0, 0, 0] = number | (number + 1) << 16
    return types.SimpleNamespace(registers=registers, shape=(rows, columns))


@pytest.mark.parametrize("heads", [8, 16, 24, 32])
def test_a_partial_result_is_written_in_order(stand_in, heads):
    target = Tile((heads, 256), 2)
    int8_tiles.store_restored(target, accumulator(256, heads))
    numbers = target.bytes.view(np.uint16).reshape(heads, 256)
    in_accumulator = np.arange(256 * heads).reshape(256, heads).T
    assert target.written.all()
    np.testing.assert_array_equal(numbers, restore_order(in_accumulator))


@pytest.mark.parametrize("heads", [8, 16, 24, 32])
@pytest.mark.parametrize(("rows", "columns"), [(64, 64), (256, 64), (64, 32)])
def test_matrices_of_an_accumulator_are_at_their_places_of_the_tile(stand_in, heads, rows, columns):
    """stmatrix takes the address of row t mod 8 of matrix t / 8 from lane t of each warp."""
    seen = set()
    for address, offset, indices in swizzled_tiles._matrices(Memory(0), (rows, heads), columns):
        for i, (block, tile, _, _, half, *_) in enumerate(indices):
            for warp, row in np.ndindex(4, 8):
                column = 64 * block + 16 * warp + 8 * half
                at = address[32 * warp + 8 * i + row] + offset
                assert at == swizzled(8 * tile + row, column, rows, 2 * columns, 2)
                seen.add((8 * tile + row, column))
    assert len(seen) == heads * rows // 8


@pytest.mark.parametrize("heads", [8, 16, 24, 32])
def test_digits_of_queries_are_at_their_places_of_the_tiles(stand_in, monkeypatch, heads):
    stand_in.count = THREADS
    c, rope, scales = Tile((2 * heads, 256), 1), Tile((2 * heads, 64), 1), Memory(4 * heads)
    distances_seen = []

    def to_digits(elements, distances):
        distances_seen.append(distances)
        lanes = np.stack(elements)[:, :, None] // 80  # rows of the quads that the lanes have
        assert (lanes == lanes[:1, :, :]).all() and (
            lanes.reshape(3, -1, 32) == lanes.reshape(3, -1, 32)[..., :1]
        ).all()
        quads = [np.asarray(quad, np.uint32) for quad in elements]
        return [quad + 10_000 for quad in quads], [quad + 50_000 for quad in quads], quads[0] // 80

    monkeypatch.setattr(digits, "_elements", lambda part: [part])
    monkeypatch.setattr(digits, "_to_digits", to_digits)
    monkeypatch.setattr(digits, "spin_receive_quads", lambda _, quads, __: [(quad, quad) for quad in quads])
    digits.receive_queries(Memory(0), (c, rope), scales, "bfloat16", 1, 8)
    assert set(distances_seen) == {(1, 2, 4, 8, 16)} and c.written.all() and rope.written.all()
    np.testing.assert_array_equal(scales.bytes.view(np.uint32), np.arange(heads))
    for tile, width, first in ((c, 256, 0), (rope, 64, 64)):
        for head, quad in np.ndindex(heads, width // 4):
            for row, digit in ((head, 10_000), (heads + head, 50_000)):
                at = swizzled(row, 4 * quad, width, 64, 1)
                assert tile.bytes[at : at + 4].view(np.uint32) == head * 80 + first + quad + digit
