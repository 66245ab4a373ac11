"""A Triton kernel that only reads, to measure the read bandwidth."""

import torch  # pyright: ignore[reportMissingImports]
import triton  # pyright: ignore[reportMissingImports]
import triton.language as tl  # pyright: ignore[reportMissingImports]


@triton.jit
def _read_kernel(x_ptr, sums_ptr, size, BLOCK: tl.constexpr):
    first = tl.program_id(0) * BLOCK
    total = tl.zeros([BLOCK], tl.int32)
    for at in range(first, size, BLOCK * tl.num_programs(0)):
        total += tl.load(x_ptr + at + tl.arange(0, BLOCK))
    tl.store(sums_ptr + tl.program_id(0), tl.sum(total, 0))


def read(x: torch.Tensor, block: int, programs_per_sm: int) -> torch.Tensor:
    """Sums of int32 [size], one for each program; `size` is below 2^30 and a multiple of `block`."""
    programs = torch.cuda.get_device_properties(x.device).multi_processor_count * programs_per_sm
    sums = torch.empty(programs, dtype=torch.int32, device=x.device)
    _read_kernel[(programs,)](x, sums, x.numel(), BLOCK=block, num_warps=8)  # pyright: ignore[reportCallIssue]
    return sums
