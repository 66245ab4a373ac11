"""Instructions that move data: loads, stores, shuffles, mbarriers, bulk copies (PTX ISA, 9.7.9 and 9.7.13)."""

import re

import numpy as np

from ptx.memory import GLOBAL, AccessError, MBarrier, TensorMap, swizzle
from ptx.operands import LANE, THREADS, WARP, Operands, unsigned_of
from ptx.parser import Instruction, UnsupportedError, split

_ACCESS_PARTS = {
    "param::entry",
    "param",
    "global",
    "shared",
    "shared::cta",
    "relaxed",
    "acquire",
    "release",
    "gpu",
    "cta",
}


def _vector(instruction: Instruction) -> tuple[int, str]:
    """Number and type of the elements of a load or store."""
    *parts, kind = instruction.parts[1:]
    counts = [int(part[1:]) for part in parts if re.fullmatch(r"v[24]", part)]
    if unknown := {part for part in parts if not re.fullmatch(r"v[24]", part)} - _ACCESS_PARTS:
        raise UnsupportedError(f"{instruction}: {', '.join(sorted(unknown))}")
    return (counts or [1])[0], kind


def load(instruction: Instruction, operands: Operands):
    """ld, also of vectors. A relaxed or acquiring one may be part of a loop that waits."""
    count, kind = _vector(instruction)
    target, source = instruction.operands
    writes, address = [operands.write(name) for name in operands.list(target)], operands.address(source)
    bits = np.dtype(unsigned_of(kind))
    signed = np.dtype(f"int{8 * bits.itemsize}") if kind[0] == "s" else bits
    polls = bool({"relaxed", "acquire"} & set(instruction.parts))

    def step(wg, mask):
        raw = wg.machine.memory.load(wg.cta.shared, address(wg)[mask], count * bits.itemsize)
        values = np.zeros((THREADS, count), bits)
        values[mask] = raw.view(bits)
        for write, column in zip(writes, values.view(signed).T, strict=True):
            write(wg, mask, np.ascontiguousarray(column))
        wg.polled |= polls

    return step


def store(instruction: Instruction, operands: Operands):
    """st, also of vectors."""
    _, kind = _vector(instruction)
    target, source = instruction.operands
    address, reads = operands.address(target), [operands.read(name, kind) for name in operands.list(source)]

    def step(wg, mask):
        values = np.stack([read(wg)[mask] for read in reads], 1)
        wg.machine.memory.store(wg.cta.shared, address(wg)[mask], values.view(np.uint8))
        wg.machine.events += 1

    return step


def reduce(instruction: Instruction, operands: Operands):
    """red.add.u32 to global memory, atomically."""
    if not re.fullmatch(r"red\.(relaxed|release)\.gpu\.global\.add\.u32", instruction.opcode):
        raise UnsupportedError(str(instruction))
    address, read = operands.address(instruction.operands[0]), operands.read(instruction.operands[1], "u32")

    def step(wg, mask):
        words, first = wg.machine.memory.data.view(np.uint32), address(wg)[mask] - np.uint64(GLOBAL)
        np.add.at(words, first.astype(np.int64) // 4, read(wg)[mask])
        wg.machine.events += 1

    return step


def convert_address(instruction: Instruction, operands: Operands):
    """cvta: nothing to do, as all addresses are generic."""
    target, source = instruction.operands
    read, write = operands.read(source, "u64"), operands.write(target)
    return lambda wg, mask: write(wg, mask, read(wg))


def elect(instruction: Instruction, operands: Operands):
    """elect.sync: the first thread of each warp that is active."""
    lane, predicate = (operands.write(name) for name in instruction.operands[0].split("|"))

    def step(wg, mask):
        _, first = np.unique(np.where(mask, WARP, THREADS), return_index=True)
        leader = np.zeros(THREADS, bool)
        leader[first] = True
        predicate(wg, mask, leader & mask)
        lane(wg, mask, np.zeros(THREADS, np.uint32))  # of the first of a warp; others are not elected here

    return step


def shuffle(instruction: Instruction, operands: Operands):
    """shfl.sync.bfly and .idx of whole warps."""
    mode = instruction.parts[2]
    if mode not in ("bfly", "idx") or "|" in instruction.operands[0]:
        raise UnsupportedError(str(instruction))
    write = operands.write(instruction.operands[0])
    value, lane, clamp, members = (operands.read(operand, "u32") for operand in instruction.operands[1:])

    def step(wg, mask):
        wg.require_whole_warps(mask)
        if (clamp(wg)[mask] != 31).any() or (members(wg)[mask] != 0xFFFF_FFFF).any():
            raise UnsupportedError(f"{instruction}: of a part of a warp")
        source = lane(wg).astype(int) % 32
        write(wg, mask, value(wg)[32 * WARP + (LANE ^ source if mode == "bfly" else source)])

    return step


def mbarrier(instruction: Instruction, operands: Operands):
    """mbarrier.init, .arrive, .arrive.expect_tx and .try_wait.parity."""
    *_, action = [part for part in instruction.parts if part in ("init", "arrive", "expect_tx", "try_wait")] or [""]
    if action == "try_wait":
        return _try_wait(instruction, operands)
    if action not in ("init", "arrive", "expect_tx") or len(instruction.operands) not in (2, 3):
        raise UnsupportedError(str(instruction))
    address, count = operands.address(instruction.operands[-2]), operands.read(instruction.operands[-1], "u32")

    def step(wg, mask):
        for at, number in zip(address(wg)[mask].tolist(), count(wg)[mask].tolist(), strict=True):
            if action == "init":
                wg.cta.mbarriers[at] = MBarrier(number)
            else:
                arrival = {"arrivals": number} if action == "arrive" else {"arrivals": 1, "expected_bytes": number}
                find_mbarrier(wg, at).arrive(**arrival)
        wg.machine.events += 1

    return step


def _try_wait(instruction: Instruction, operands: Operands):
    if "parity" not in instruction.parts:
        raise UnsupportedError(str(instruction))
    write, address = operands.write(instruction.operands[0]), operands.address(instruction.operands[1])
    parity = operands.read(instruction.operands[2], "u32")

    def step(wg, mask):
        done, places, parities = np.zeros(THREADS, bool), address(wg), parity(wg) & 1
        for thread in np.flatnonzero(mask):
            done[thread] = find_mbarrier(wg, int(places[thread])).has_completed(int(parities[thread]))
        wg.polled |= not done[mask].all()
        write(wg, mask, done)

    return step


def find_mbarrier(wg, address: int) -> MBarrier:
    """The mbarrier at an address of a warpgroup's CTA."""
    if address not in wg.cta.mbarriers:
        raise AccessError(f"no mbarrier has been initialised at {address:#x}")
    return wg.cta.mbarriers[address]


def bulk_copy(instruction: Instruction, operands: Operands):
    """cp.async.bulk of bytes, and of the box of a tensor map, from global to shared memory; they arrive later."""
    if ".global.mbarrier::complete_tx::bytes" not in instruction.opcode:
        raise UnsupportedError(str(instruction))
    return (_tensor_copy if ".tensor." in instruction.opcode else _byte_copy)(instruction, operands)


def _byte_copy(instruction: Instruction, operands: Operands):
    target, source, barrier = (operands.address(instruction.operands[i]) for i in (0, 1, 3))
    count = operands.read(instruction.operands[2], "u32")

    def step(wg, mask):
        for thread in np.flatnonzero(mask):
            to, size = int(target(wg)[thread]), int(count(wg)[thread])
            if to % 16 or size % 16 or source(wg)[thread] % 16:
                raise AccessError(f"a bulk copy of {size} bytes to {to:#x} is not aligned to 16")
            data = wg.machine.memory.load(wg.cta.shared, source(wg)[thread : thread + 1], size)[0]
            _issue(wg, to + np.arange(size), data, int(barrier(wg)[thread]))

    return step


def _tensor_copy(instruction: Instruction, operands: Operands):
    to, tensor, barrier = instruction.operands
    found = re.fullmatch(r"\[\s*(\S+),\s*(\{[^}]*\})\s*\]", tensor)
    if not found or ".tile" in instruction.opcode or "multicast" in instruction.opcode:
        raise UnsupportedError(str(instruction))
    target, barrier, place = operands.address(to), operands.address(barrier), operands.read(found[1], "u64")
    coordinates = [operands.read(name, "s32") for name in split(found[2][1:-1])]

    def step(wg, mask):
        memory = wg.machine.memory
        for thread in np.flatnonzero(mask):
            tensor_map = TensorMap(memory.load(wg.cta.shared, place(wg)[thread : thread + 1], 128)[0])
            data = tensor_map.load(memory, [int(read(wg)[thread]) for read in coordinates])
            addresses = int(target(wg)[thread]) + np.arange(data.size)
            if addresses[0] % 128:
                raise AccessError(f"a tensor copy to {addresses[0]:#x}, which is not aligned to 128")
            if tensor_map.swizzle:
                addresses = swizzle(addresses, tensor_map.swizzle)
            _issue(wg, addresses, data, int(barrier(wg)[thread]))

    return step


def _issue(wg, addresses: np.ndarray, data: np.ndarray, barrier: int) -> None:
    """A copy of what is in global memory now; the machine chooses when it arrives."""
    if addresses.max() >= wg.cta.shared.size:
        raise AccessError(f"a copy to {addresses.max():#x}, beyond shared memory")
    mbarrier = find_mbarrier(wg, barrier)

    def complete():
        wg.cta.shared[addresses] = data
        mbarrier.arrive(copied_bytes=data.size)
        wg.machine.events += 1

    wg.machine.copies.append(complete)
    wg.machine.events += 1


HANDLERS = {
    "ld": load,
    "st": store,
    "red": reduce,
    "cvta": convert_address,
    "elect": elect,
    "shfl": shuffle,
    "mbarrier": mbarrier,
    "cp": bulk_copy,
}
