"""Absorbed decode in Triton, launched from PyTorch."""

import functools
import math

import torch

from latent_attention.call_shapes import DecodeShape
from latent_attention.decode.triton_heuristic import KernelLaunch, LaunchConfig, Tiling, launch_config, why_not
from latent_attention.decode.triton_kernels import combine_kernel, split_kernel
from latent_attention.gpu import Gpu, make_gpu


def decode(
    q: torch.Tensor,
    c: torch.Tensor,
    k_rope: torch.Tensor,
    lengths: torch.Tensor,
    *,
    scale: float,
    block_table: torch.Tensor | None = None,
    scales: torch.Tensor | None = None,
    out: torch.Tensor | None = None,
    tiling: Tiling | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """`latent_attention.decode` for PyTorch tensors, which may be strided along all axes but the last.

    Args:
        q: queries [B, T, H, C + R], content before rotary.
        c: cached latents [P, S, C], of the type of q or int8.
        k_rope: cached rotary keys [P, S, R]; this and `c` may be slices of one tensor.
        lengths: int32 [B], counting the T query tokens.
        scale: softmax scale, the factor of q k^T before the softmax.
        block_table: int32 [B, N]; None if row b holds page b.
        scales: float32 [P, 2, S] of an int8 cache.
        out: where to write [B, T, H, C]; a new tensor of the type of q by default.
        tiling: instead of the tuned one.

    Returns:
        out and the log-sum-exp float32 [B, T, H].

    Raises:
        ValueError: the kernels do not support the call; shapes, types or strides do not fit together.
    """
    (batch, queries, heads, width), (pages, page_size, c_width) = q.shape, c.shape
    rope_width, per_row = width - c_width, 1 if block_table is None else block_table.shape[1]
    out = q.new_empty(batch, queries, heads, c_width) if out is None else out
    lse = q.new_empty(batch, queries, heads, dtype=torch.float32)
    expected = {
        "k_rope": (k_rope, (pages, page_size, rope_width), c.dtype),
        "lengths": (lengths, (batch,), torch.int32),
        "block_table": (block_table, (batch, per_row), torch.int32),
        "scales": (scales, (pages, 2, page_size), torch.float32),
        "out": (out, (batch, queries, heads, c_width), q.dtype),
    }
    for name, (x, shape, dtype) in expected.items():
        if x is not None and (x.shape != shape or x.dtype != dtype):
            raise ValueError(f"{name} is {x.dtype} {tuple(x.shape)}, expected {dtype} {shape}")
    if (scales is None) == (c.dtype == torch.int8) or (block_table is None and pages != batch):
        raise ValueError(f"an int8 cache needs scales, others none; {pages} pages for {batch} rows need a block table")
    if any(x is not None and x.stride(-1) != 1 for x in (q, c, k_rope, lengths, block_table, out)):
        raise ValueError("the last axis of every tensor must be contiguous")

    names = (str(x.dtype).removeprefix("torch.") for x in (q, c))
    shape = DecodeShape(
        batch, queries, heads, c_width, rope_width, per_row, page_size, *names, paged=block_table is not None
    )
    axes = {"Q": (q, "BTH"), "C": (c, "PS"), "ROPE": (k_rope, "PS"), "OUT": (out, "BTH"), "LSE": (lse, "BTH")}
    strides = [(f"{name}_{axis}", x.stride(i)) for name, (x, axes) in axes.items() for i, axis in enumerate(axes)]
    strides.append(("TABLE_B", 0 if block_table is None else block_table.stride(0)))
    strides += [(f"SCALES_{axis}", 0 if scales is None else scales.stride(i)) for i, axis in enumerate("P2S")]
    config = _launch_config(shape, _gpu(q.device), tuple(strides), tiling)

    def run(kernel, launch: KernelLaunch, *arguments):
        kernel[launch.grid](*arguments, **launch.constants, num_warps=launch.warps, num_stages=launch.stages)

    partial = q.new_empty(config.splits, queries * heads, c_width, dtype=torch.float32)
    partial_lse = q.new_empty(config.splits, queries * heads, dtype=torch.float32)
    unused = lengths
    with torch.cuda.device_of(q):  # Triton launches on the current device
        run(
            split_kernel, config.split, q, c, k_rope, unused if scales is None else scales,
            unused if block_table is None else block_table, lengths, scale / math.log(2), batch, config.capacity,
            partial, partial_lse,
        )  # fmt: skip
        run(
            combine_kernel, config.combine, partial, partial_lse, lengths, batch, config.capacity, config.programs, out,
            lse,
        )  # fmt: skip
    return out, lse


@functools.lru_cache(1024)
def _launch_config(
    shape: DecodeShape, gpu: Gpu, strides: tuple[tuple[str, int], ...], tiling: Tiling | None
) -> LaunchConfig:
    reason = why_not(shape, gpu)
    if reason is not None:
        raise ValueError(reason)
    return launch_config(shape, gpu, dict(strides), tiling)


@functools.cache
def _gpu(device: torch.device) -> Gpu:
    if device.type == "cpu":  # in Triton's interpreter, for which the tiling of any GPU will do
        return make_gpu((9, 0), 1)
    properties = torch.cuda.get_device_properties(device)
    return make_gpu((properties.major, properties.minor), properties.multi_processor_count)
