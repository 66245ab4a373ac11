"""Peak throughput and memory of known GPUs, and the memory of the devices at hand."""

from pathlib import Path

import jax

GIB = 2**30

NOMINAL_PEAK = {
    "NVIDIA B200": 2250e12,
    "NVIDIA H200": 989e12,
    "NVIDIA H100 80GB HBM3": 989e12,
    "NVIDIA H100 NVL": 835e12,
    "NVIDIA H100 PCIe": 756e12,
    "NVIDIA A100-SXM4-80GB": 312e12,
    "NVIDIA A100-SXM4-40GB": 312e12,
    "NVIDIA A100 80GB PCIe": 312e12,
    "NVIDIA A100-PCIE-40GB": 312e12,
    "NVIDIA L40S": 362e12,
    "NVIDIA L4": 121e12,
    "NVIDIA GeForce RTX 4090": 165e12,
    "NVIDIA GeForce RTX 3090": 71e12,
    "NVIDIA GeForce RTX 2070 SUPER": 36e12,
}
"""FLOP/s of dense bfloat16 products accumulated in float32, by JAX's `device_kind`.

From NVIDIA's data sheets, half of the figure "with sparsity" where they give no other; GeForce from the white papers of
the architectures, at boost clock. The RTX 2070 SUPER has no bfloat16 in its tensor cores: float16, 40 SMs x 512 FMA x
1.77 GHz, halved on GeForce for float32 sums.
"""

RESERVED_BYTES = round(0.7 * GIB)
"""Memory of a GPU that the CUDA context, its kernels and libraries take beside what a program allocates."""
GPU_MEMORY_GIB = {
    "rtx2070super": 8, "rtx3060": 12, "rtx3090": 24, "rtx4060ti": 16, "rtx4070": 12, "rtx4080": 16, "rtx4090": 24,
    "rtx5090": 32, "t4": 15, "l4": 22.5, "a10": 22.5, "l40s": 45, "a100_40gb": 39.5, "a100_80gb": 79.3,
    "h100": 79.6, "h200": 140.4, "b200": 179,
}  # fmt: skip
"""Memory as `nvidia-smi` shows it, by a short name of the product, rounded down where models differ.

Error correction takes a part of the nominal size.
"""


def nominal_peak(device_kind: str) -> float | None:
    """bfloat16 FLOP/s that the vendor states for one device; None for a device that is not in the table."""
    return NOMINAL_PEAK.get(device_kind)


def available_memory() -> int | None:
    """Bytes that JAX may still allocate on the default device; None where JAX does not count (CPUs)."""
    stats = jax.local_devices()[0].memory_stats() or {}
    return stats["bytes_limit"] - stats["bytes_in_use"] if "bytes_limit" in stats else None


def available_host_memory() -> int | None:
    """Bytes that this machine's programs may still take without swapping; None where Linux does not say."""
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
    except OSError:
        return None
    found = [line.split()[1] for line in lines if line.startswith("MemAvailable:")]
    return int(found[0]) * 1024 if found else None


def peak_memory() -> int | None:
    """Most bytes allocated at one time on any device of this process so far; None where JAX does not count (CPUs)."""
    stats = [device.memory_stats() for device in jax.local_devices()]
    return max((s["peak_bytes_in_use"] for s in stats if s and "peak_bytes_in_use" in s), default=None)
