"""Matrix products of a warp and a warpgroup, and their tiles in shared memory (PTX ISA, 9.7.14 and 9.7.15).

In the figures of those sections, thread t of a warp has row t / 4 and columns 2 (t % 4) and 2 (t % 4) + 1 of an 8 x 8
matrix of 16-bit numbers; of 8-bit ones, four columns.
"""

import re

import numpy as np

from ptx.arithmetic import bf16_to_f32
from ptx.memory import SWIZZLES, swizzle
from ptx.operands import LANE, THREADS, WARP, Operands
from ptx.parser import Instruction, UnsupportedError

_ROW, _QUAD = np.arange(32) // 4, np.arange(32) % 4
_SWIZZLE_OF_DESCRIPTOR = {1: SWIZZLES[3], 2: SWIZZLES[2], 3: SWIZZLES[1]}
"""Bytes by bits 62 and 63 of a matrix descriptor, which count the other way round."""


_UNKNOWN = np.full(THREADS, 0xFFFFFFFF, np.uint32)
"""An accumulator, float32 or int32, that must not be read."""


def _numbers(raw: np.ndarray, kind: str) -> np.ndarray:
    """float64 of contiguous bytes, along the last axis."""
    if kind == "bf16":
        return bf16_to_f32(raw.view(np.uint16)).astype(np.float64)
    return raw.view({"s8": np.int8, "f16": np.float16}[kind]).astype(np.float64)


def _add(accumulator: np.ndarray, product: np.ndarray, is_integer: bool) -> np.ndarray:
    """float32 or int32 bits of the sum."""
    if is_integer:
        return accumulator.view(np.int32) + product.astype(np.int64).astype(np.int32)
    return (accumulator.view(np.float32) + product).astype(np.float32)


def _fragments(registers: list[np.ndarray], kind: str, rows: int) -> np.ndarray:
    """[4 warps, rows, K] from the registers of all threads: matrices of 8 rows, first down, then to the right."""
    width, down = (4 if kind == "s8" else 2), rows // 8  # numbers in a register, matrices above each other
    matrix = np.arange(len(registers))[:, None]
    row = (LANE // 4)[:, None, None] + 8 * (matrix % down)
    column = width * (LANE % 4)[:, None, None] + np.arange(width) + 4 * width * (matrix // down)
    out = np.zeros((4, rows, 4 * width * len(registers) // down))
    numbers = _numbers(np.stack(registers, 1).view(np.uint8), kind)
    out[WARP[:, None, None], row, column] = numbers.reshape(THREADS, -1, width)
    return out


def matrix_to_registers(instruction: Instruction, operands: Operands):
    """ldmatrix and stmatrix: 8 x 8 matrices of 16 bits; threads 0 to 7, 8 to 15, ... hold the addresses of rows."""
    found = re.fullmatch(r"(ld|st)matrix\.sync\.aligned\.m8n8\.x([124])(\.trans)?\.shared\.b16", instruction.opcode)
    if not found:
        raise UnsupportedError(str(instruction))
    is_load, count, transposed = found[1] == "ld", int(found[2]), bool(found[3])
    registers, place = instruction.operands if is_load else instruction.operands[::-1]
    address, names = operands.address(place), operands.list(registers)
    reads, writes = [operands.read(name, "u32") for name in names], [operands.write(name) for name in names]
    rows, columns = np.broadcast_arrays(_ROW[:, None], 2 * _QUAD[:, None] + np.arange(2))
    places = (columns, rows) if transposed else (rows, columns)

    def step(wg, mask):
        wg.require_whole_warps(mask)
        memory, shared = wg.machine.memory, wg.cta.shared
        values = np.stack([read(wg) for read in reads], 1) if not is_load else np.zeros((THREADS, count), np.uint32)
        for warp in np.unique(WARP[mask]):
            lanes = slice(32 * warp, 32 * warp + 32)
            for i in range(count):
                starts = address(wg)[lanes][8 * i : 8 * i + 8]
                if is_load:
                    matrix = memory.load(shared, starts, 16).view(np.uint16)
                    values[lanes, i] = matrix[places].view(np.uint32)[:, 0]
                else:
                    matrix = np.zeros((8, 8), np.uint16)
                    matrix[places] = np.ascontiguousarray(values[lanes, i : i + 1]).view(np.uint16)
                    memory.store(shared, starts, matrix.view(np.uint8))
        if is_load:
            for write, column in zip(writes, values.T, strict=True):
                write(wg, mask, np.ascontiguousarray(column))
        else:
            wg.machine.events += 1

    return step


def warp_product(instruction: Instruction, operands: Operands):
    """mma.sync of m16n8k16 in 16 bits and m16n8k32 in 8, A by rows and B by columns."""
    found = re.fullmatch(
        r"mma\.sync\.aligned\.m16n8k(16|32)\.row\.col\.(?:f32|s32)\.(bf16|f16|s8)\.\2\.(?:f32|s32)", instruction.opcode
    )
    if not found or (found[1] == "32") != (found[2] == "s8"):
        raise UnsupportedError(str(instruction))
    kind = found[2]
    a, b, c = ([operands.read(name, "u32") for name in operands.list(o)] for o in instruction.operands[1:])
    writes = [operands.write(name) for name in operands.list(instruction.operands[0])]

    def step(wg, mask):
        wg.require_whole_warps(mask)
        values_a, values_b = ([read(wg) for read in reads] for reads in (a, b))
        products = _fragments(values_a, kind, 16) @ _fragments(values_b, kind, 8).swapaxes(1, 2)
        parts = [products[WARP, LANE // 4 + 8 * (i // 2), 2 * (LANE % 4) + i % 2] for i in range(4)]
        out = [_add(read(wg), part, kind == "s8") for read, part in zip(c, parts, strict=True)]
        for write, x in zip(writes, out, strict=True):
            write(wg, mask, x)

    return step


def warpgroup_product(instruction: Instruction, operands: Operands):
    """wgmma.mma_async of 16 bits and int8, A in registers or shared memory, B in shared memory; and waiting for it.

    It is done when it is waited for, with what shared memory holds by then; until then its accumulator holds NaN.
    """
    if instruction.opcode == "wgmma.commit_group.sync.aligned":
        return lambda wg, mask: wg.products.append([])
    if instruction.opcode == "wgmma.wait_group.sync.aligned":
        return _wait(int(instruction.operands[0]))
    found = re.fullmatch(
        r"wgmma\.mma_async\.sync\.aligned\.m64n(\d+)k(16|32)\.(f32|s32)\.(bf16|f16|s8)\.\4", instruction.opcode
    )
    accumulator, a, b, scale_d, *immediate = instruction.operands
    if not found or (found[3] == "s32") != (found[4] == "s8"):
        raise UnsupportedError(str(instruction))
    n, k, kind = int(found[1]), int(found[2]), found[4]
    names, in_registers = operands.list(accumulator), a.startswith("{")
    reads, writes = [operands.read(name, "u32") for name in names], [operands.write(name) for name in names]
    reads_a = [operands.read(name, "u32" if in_registers else "u64") for name in operands.list(a)]
    descriptor_b, keep = operands.read(b, "u64"), operands.read(scale_d, "pred")
    flags = [int(x) for x in immediate]  # the signs of A and B, which int8 has not; transposed or not, of 16 bits only
    if (kind != "s8" and flags[:2] != [1, 1]) or (kind == "s8" and flags not in ([], [1, 1])):
        raise UnsupportedError(str(instruction))
    transposed_a, transposed_b = ([0, *flags[2:]] if in_registers else flags[2:]) if kind != "s8" else (0, 0)
    thread_row = 16 * WARP + LANE // 4

    def step(wg, mask):
        if not mask.all():
            raise UnsupportedError(f"{instruction}: threads of the warpgroup are not together")
        values_a, start_b, kept = [read(wg) for read in reads_a], int(descriptor_b(wg)[0]), keep(wg)
        for name, read, write in zip(names, reads, writes, strict=True):
            sums, products = wg.accumulators.get(name, (read(wg), 0))
            wg.accumulators[name] = sums, products + 1
            write(wg, mask, _UNKNOWN)

        def complete():
            if in_registers:
                matrix_a = np.concatenate(_fragments(values_a, kind, 16))
            else:
                matrix_a = _described(wg.cta.shared, int(values_a[0][0]), 64, k, kind, transposed_a)
            product = matrix_a @ _described(wg.cta.shared, start_b, n, k, kind, transposed_b).T
            for i, (name, write) in enumerate(zip(names, writes, strict=True)):
                part = product[thread_row + 8 * (i // 2 % 2), 8 * (i // 4) + 2 * (LANE % 4) + i % 2]
                sums, products = wg.accumulators.pop(name)
                sums = _add(np.where(kept, sums, np.uint32(0)), part, kind == "s8").view(np.uint32)
                if products > 1:
                    wg.accumulators[name] = sums, products - 1
                else:
                    write(wg, mask, sums)

        wg.products[-1].append(complete)

    return step


def _wait(groups: int):
    """wgmma.wait_group: completes the products of all committed groups but the last ones, of this number."""

    def step(wg, mask):
        while len(wg.products) > groups + 1:  # the last list is of no group yet
            for complete in wg.products.pop(0):
                complete()

    return step


def _described(shared: np.ndarray, descriptor: int, rows: int, k: int, kind: str, transposed: int) -> np.ndarray:
    """[rows, k] of a matrix descriptor. Rows are along M or N; transposed, they are what is contiguous."""
    start, leading, stride = ((descriptor >> shift & 0x3FFF) << 4 for shift in (0, 16, 32))
    width = _SWIZZLE_OF_DESCRIPTOR.get(descriptor >> 62)
    if width is None or descriptor >> 49 & 7:
        raise UnsupportedError(f"the matrix descriptor {descriptor:#x}: no swizzle, or a base offset")
    size = 1 if kind == "s8" else 2
    row, column = np.arange(rows)[:, None], np.arange(k)
    if transposed:
        each = width // size
        places = row // each * leading + row % each * size + column // 8 * stride + column % 8 * width
    else:
        places = row // 8 * stride + row % 8 * width + column * size
    addresses = swizzle(start + places, width)
    return _numbers(shared[addresses[..., None] + np.arange(size)].reshape(rows, -1), kind)


HANDLERS = {
    "ldmatrix": matrix_to_registers,
    "stmatrix": matrix_to_registers,
    "mma": warp_product,
    "wgmma": warpgroup_product,
}
