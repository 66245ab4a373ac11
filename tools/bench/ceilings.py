"""Measured ceilings of this device: bandwidth of reading and copying, throughput of matrix multiplication."""

import jax
import jax.numpy as jnp

from tools.bench.timing import has_torch_gpu, time_jax, time_torch


def _on_gpu() -> bool:
    return jax.default_backend() == "gpu"


def read_and_copy() -> tuple[float, float]:
    """Read and copy bandwidth in bytes/s: the fastest of several kernels over a few GB (a copy counts twice)."""
    size = 2**29 if _on_gpu() else 2**20
    x = jax.lax.bitcast_convert_type(jax.random.bits(jax.random.key(0), (size,)), jnp.int32)
    reads = [
        time_jax(step, (), [(x,)])[1].seconds
        for step in (jnp.sum, jnp.max, lambda x: jnp.sum(x.reshape(-1, 2**14), axis=1))
    ]
    copies = [time_jax(lambda x: x + 1, (), [(x,)], calls=1)[1].seconds]
    if has_torch_gpu():
        import torch

        from tools.bench.triton_read import read

        x_torch = torch.from_dlpack(x)
        for block in (4096, 8192):
            for programs_per_sm in (2, 4, 8):
                reads.append(time_torch(lambda b=block, p=programs_per_sm: read(x_torch, b, p), [()])[1].seconds)
        y_torch = torch.empty_like(x_torch)
        copies.append(time_torch(lambda: y_torch.copy_(x_torch), [()])[1].seconds)
    return x.nbytes / min(reads), 2 * x.nbytes / min(copies)


def matmul(size: int | None = None) -> float:
    """FLOP/s of the product of two square bfloat16 matrices of random numbers, 8192 wide on a GPU."""
    size = size or (8192 if _on_gpu() else 512)
    a, b = (jax.random.normal(jax.random.key(i), (size, size), jnp.bfloat16) for i in range(2))
    seconds = [time_jax(jnp.matmul, (), [(a, b)])[1].seconds]
    if has_torch_gpu():
        import torch

        a_torch, b_torch = torch.from_dlpack(a), torch.from_dlpack(b)
        seconds.append(time_torch(lambda: a_torch @ b_torch, [()])[1].seconds)
    return 2 * size**3 / min(seconds)
