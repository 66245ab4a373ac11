"""What threads share: global and shared memory, mbarriers, and the tensor maps of TMA copies.

Addresses are generic, all spaces in one. Shared memory starts at 0, where each CTA sees its own.
"""

import math

import numpy as np

from ptx.parser import UnsupportedError

DYNAMIC_SHARED = 1024
"""Where dynamic shared memory starts, aligned as all swizzles need."""
PARAMS, GLOBAL = 1 << 32, 1 << 33
"""Where parameters of the kernel and global memory start."""
SWIZZLES = {1: 32, 2: 64, 3: 128}
"""Bytes that are permuted, by CUtensorMapSwizzle."""
_ELEMENT_BYTES = {0: 1, 1: 2, 2: 4, 3: 4, 4: 8, 5: 8, 6: 2, 7: 4, 8: 8, 9: 2}
"""By CUtensorMapDataType."""


class AccessError(RuntimeError):
    """An access out of bounds or out of alignment, or an mbarrier that is not one."""


def swizzle(addresses: np.ndarray, width: int) -> np.ndarray:
    """Addresses in shared memory with units of 16 bytes permuted in rows of `width` (PTX ISA, swizzling modes)."""
    return addresses ^ ((addresses >> 7 & width // 16 - 1) << 4)


class Memory:
    """Global memory and parameters, of all CTAs."""

    def __init__(self, params: bytes, data: np.ndarray):
        self.params, self.data = np.frombuffer(params, np.uint8), data

    def locate(self, shared: np.ndarray, addresses: np.ndarray, num_bytes: int) -> tuple[np.ndarray, np.ndarray]:
        """The array that addresses, one or more, are in, and the index of each of the `num_bytes` after them.

        Raises:
            AccessError: they are not aligned to `num_bytes`, up to 16, or not in one space.
        """
        addresses = addresses.astype(np.int64)
        space, start = next(
            (space, start)
            for space, start in ((self.data, GLOBAL), (self.params, PARAMS), (shared, 0))
            if addresses[0] >= start
        )
        indices = addresses - start
        if indices.min() < 0 or indices.max() + num_bytes > space.size:
            raise AccessError(f"out of bounds: {num_bytes} bytes from {addresses.min():#x} to {addresses.max():#x}")
        if (indices % math.gcd(num_bytes, 16)).any():
            raise AccessError(f"not aligned to {math.gcd(num_bytes, 16)} bytes: {addresses.max():#x}")
        return space, indices[:, None] + np.arange(num_bytes)

    def load(self, shared: np.ndarray, addresses: np.ndarray, num_bytes: int) -> np.ndarray:
        """uint8 [addresses, num_bytes]."""
        space, indices = self.locate(shared, addresses, num_bytes)
        return space[indices]

    def store(self, shared: np.ndarray, addresses: np.ndarray, data: np.ndarray) -> None:
        """Writes uint8 [addresses, bytes]; of equal addresses the last wins."""
        space, indices = self.locate(shared, addresses, data.shape[1])
        space[indices] = data


class MBarrier:
    """An mbarrier object (PTX ISA, parallel synchronization: mbarrier)."""

    def __init__(self, count: int):
        self.count = self.pending = count
        self.tx_bytes = self.phase = 0

    def arrive(self, arrivals: int = 0, expected_bytes: int = 0, copied_bytes: int = 0) -> None:
        """Counts arrivals, bytes that are to come and bytes that have; then the phase may be complete.

        Raises:
            AccessError: more arrivals than the phase has.
        """
        self.tx_bytes += expected_bytes - copied_bytes
        self.pending -= arrivals
        if self.pending < 0:
            raise AccessError(f"an mbarrier of {self.count} arrivals has one too many")
        if self.pending == self.tx_bytes == 0:
            self.pending, self.phase = self.count, self.phase + 1

    def has_completed(self, parity: int) -> bool:
        """Whether the latest phase of this parity is complete, given that it is the current one or the one before."""
        return self.phase % 2 != parity


class TensorMap:
    """A tensor map, in the format of fake_cuda.c."""

    def __init__(self, raw: np.ndarray):
        (self.address,) = raw[:8].view(np.uint64).astype(int)
        rank, kind, mode = raw[100:112].view(np.uint32).astype(int)
        self.sizes = raw[8:48].view(np.uint64)[:rank].astype(int)
        self.element_bytes = _ELEMENT_BYTES[kind]
        self.strides = np.array([self.element_bytes, *raw[48:80].view(np.uint64)[: rank - 1].astype(int)])
        self.box = raw[80:100].view(np.uint32)[:rank].astype(int)
        self.swizzle = SWIZZLES.get(mode)
        if mode and not self.swizzle:
            raise UnsupportedError(f"tensor map with swizzle {mode}")

    def load(self, memory: Memory, coordinates: list[int]) -> np.ndarray:
        """The bytes of the box at these coordinates, the fastest first; zeros where it is beyond the tensor."""
        axes = [start + np.arange(size) for start, size in zip(coordinates, self.box, strict=True)]
        places = np.meshgrid(*axes[::-1], indexing="ij")[::-1]
        inside = np.all([(0 <= x) & (x < size) for x, size in zip(places, self.sizes, strict=True)], axis=0)
        offsets = sum(x * stride for x, stride in zip(places, self.strides, strict=True))
        out = np.zeros((inside.size, self.element_bytes), np.uint8)
        if inside.any():
            wanted = self.address + offsets[inside]
            out[inside.reshape(-1)] = memory.load(np.empty(0, np.uint8), wanted, self.element_bytes)
        return out.reshape(-1)
