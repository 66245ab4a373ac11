"""Decode kernels of other projects, loaded from files outside of this repository.

A folder of peers holds, of the wheel of vllm 0.22.0: `_flashmla_C.abi3.so`, `flash_mla_interface.py` (FlashMLA),
`_vllm_fa3_C.abi3.so`, `flash_attn_interface.py` (FlashAttention-3, which vLLM prefers for MLA on Hopper) and
`triton_decode_attention.py` (vLLM's Triton MLA); and of FlashInfer a library for each width, made of its wheel as
docs/benchmarks.md says. Each is used if its files are there.
"""

import atexit
import functools
import importlib
import math
import shutil
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

from tools.bench.timing import Timing, time_torch

FILES = {
    "FlashMLA": ("_flashmla_C.abi3.so", "flash_mla_interface.py"),
    "FlashAttention-3": ("_vllm_fa3_C.abi3.so", "flash_attn_interface.py"),
    "vLLM Triton": ("triton_decode_attention.py",),
    "FlashInfer": ("flashinfer_mla_{c_width}.so",),
}
# What the files import of vLLM.
_STUBS = {
    "__init__.py": "",
    "platforms.py": "class current_platform:\n    is_rocm = staticmethod(lambda: False)\n",
    "triton_utils.py": "import triton\nimport triton.language as tl\n",
}
_MOST_SPLITS = 256


class PeerMissing(Exception):
    """Files of the peer are not there."""


def load(peer: str, folder: Path | None, c_width: int) -> Any:
    """The peer's module; PeerMissing if its files are not there, ImportError if they cannot be loaded."""
    names = [name.format(c_width=c_width) for name in FILES[peer]]
    missing = [name for name in names if folder is None or not (folder / name).exists()]
    if folder is None or missing:
        raise PeerMissing(f"no {', '.join(missing)} in the folder of peers ({folder})")
    if peer == "FlashInfer":
        import tvm_ffi  # pyright: ignore[reportMissingImports]

        return tvm_ffi.load_module(folder / names[0])
    package = stub_package()
    for name in names:
        if not (package / name).exists():
            shutil.copy(folder / name, package / name)
    importlib.invalidate_caches()
    return importlib.import_module(f"vllm.{Path(names[-1]).stem}")


@functools.cache
def stub_package() -> Path:
    """An importable package `vllm` that has only what the files need."""
    parent = tempfile.mkdtemp(prefix="peers-")
    atexit.register(shutil.rmtree, parent, ignore_errors=True)
    package = Path(parent, "vllm")
    package.mkdir()
    for name, text in _STUBS.items():
        (package / name).write_text(text)
    sys.path.insert(0, parent)
    return package


def flashmla_step(module: ModuleType, q_BTHW, kv_PSW, lengths_B, *, c_width: int, scale: float) -> Callable:
    """`step(block_table_BN)` -> out_BTHC. Its schedule is made in the first call and kept."""
    schedule, _ = module.get_mla_metadata()

    def step(block_table_BN):
        return module.flash_mla_with_kvcache(
            q_BTHW, kv_PSW[:, :, None], block_table_BN, lengths_B, c_width, schedule, softmax_scale=scale, causal=True
        )[0]

    return step


def flashinfer_step(module: Any, q_BTHW, kv_PSW, lengths_B, *, c_width: int, scale: float) -> Callable:
    """`step(block_table_BN)` -> out_BHC, of one query token (T = 1), by a schedule made here.

    Rows of the block table must be as long as the longest sequence needs.
    """
    import torch

    device, (batch, _, heads, _), page_size = q_BTHW.device, q_BTHW.shape, kv_PSW.shape[1]
    pages = -(-int(lengths_B.max()) // page_size)
    # Sizes as FlashInfer has them.
    partials, schedule = (torch.empty(size, dtype=torch.uint8, device=device) for size in (2**27, 2**23))
    staging = torch.empty(schedule.shape, dtype=torch.uint8, pin_memory=device.type == "cuda")
    queries = torch.arange(batch + 1, dtype=torch.int32)
    plan, size = module.plan(
        partials, schedule, staging, queries, queries * pages, lengths_B.cpu(), heads, c_width, False
    )
    schedule[:size].copy_(staging[:size])
    q_BHW = q_BTHW[:, 0]
    arrays = q_BHW[..., :c_width], q_BHW[..., c_width:], kv_PSW[..., :c_width], kv_PSW[..., c_width:]

    def step(block_table_BN):
        out_BHC = torch.empty(batch, heads, c_width, dtype=q_BTHW.dtype, device=device)
        module.run(
            partials, schedule, plan, *arrays, block_table_BN.flatten(), out_BHC, None, 0, heads, page_size, scale,
            False, 1.0, 1.0, None,
        )  # fmt: skip
        return out_BHC

    return step


def flash_attention_3_step(
    module: ModuleType, q_BTHW, kv_PSW, lengths_B, *, c_width: int, scale: float, splits: int
) -> Callable:
    """`step(block_table_BN)` -> out_BHC, of one query token (T = 1), by a schedule made here; 0 splits: as it chooses.

    Raises:
        ImportError: its library cannot be loaded.
    """
    import torch

    if not module.FA3_AVAILABLE:
        raise ImportError(module.FA3_UNAVAILABLE_REASON)
    (batch, _, heads, width), longest = q_BTHW.shape, int(lengths_B.max())
    starts = torch.arange(batch + 1, dtype=torch.int32, device=q_BTHW.device)
    schedule = module.get_scheduler_metadata(
        batch, 1, longest, heads, 1, width - c_width, lengths_B, qkv_dtype=q_BTHW.dtype, headdim_v=c_width,
        cu_seqlens_q=starts, page_size=kv_PSW.shape[1], causal=True, num_splits=splits,
    )  # fmt: skip
    q_BHW, kv_PS1W = q_BTHW[:, 0], kv_PSW[:, :, None]

    def step(block_table_BN):
        return module.flash_attn_varlen_func(
            q_BHW[..., c_width:], kv_PS1W[..., c_width:], kv_PS1W[..., :c_width], q_v=q_BHW[..., :c_width],
            max_seqlen_q=1, cu_seqlens_q=starts, max_seqlen_k=longest, seqused_k=lengths_B, block_table=block_table_BN,
            softmax_scale=scale, causal=True, fa_version=3, scheduler_metadata=schedule, num_splits=splits,
        )  # fmt: skip

    return step


def vllm_triton_step(module: ModuleType, q_BTHW, kv_PSW, lengths_B, *, c_width: int, scale: float, splits: int):
    """`step(block_table_BN)` -> out_BHC, of one query token (T = 1)."""
    import torch

    batch, _, heads, _ = q_BTHW.shape
    partials = torch.empty(batch, heads, splits, c_width + 1, dtype=torch.float32, device=q_BTHW.device)
    lse_BH = torch.empty(batch, heads, dtype=torch.float32, device=q_BTHW.device)
    one = torch.ones((), dtype=torch.float32, device=q_BTHW.device)
    kv_PS1W = kv_PSW[:, :, None]

    def step(block_table_BN):
        out_BHC = torch.empty(batch, heads, c_width, dtype=q_BTHW.dtype, device=q_BTHW.device)
        module.decode_attention_fwd(
            q_BTHW[:, 0], kv_PS1W, kv_PS1W[..., :c_width], out_BHC, lse_BH, block_table_BN, lengths_B, partials, splits,
            scale, kv_PSW.shape[1], k_scale=one, v_scale=one, is_mla=True,
        )  # fmt: skip
        return out_BHC

    return step


SCHEDULED = {"FlashMLA": flashmla_step, "FlashInfer": flashinfer_step}
"""Peers that choose how to split the cache."""
SPLIT = {"FlashAttention-3": (flash_attention_3_step, (0,)), "vLLM Triton": (vllm_triton_step, ())}
"""Peers that are told the number of splits, and what else than a number they take."""


def likely_splits(batch: int, heads: int) -> int:
    """A power of two of splits that gives every SM of a large GPU about two CTAs of 16 heads."""
    return 2 ** max(round(math.log2(256 / (batch * math.ceil(heads / 16)))), 0)


def best_splits(step_of: Callable[[int], Callable], turns, start: int, others: Sequence[int] = ()):
    """(result, timing, splits) of the fastest power of two of splits, climbing from `start`, or of `others`."""
    tried: dict[int, tuple[object, Timing]] = {}

    def seconds(splits: int) -> float:
        if splits not in tried:
            tried[splits] = time_torch(step_of(splits), turns)
        return tried[splits][1].seconds

    best = min(start, _MOST_SPLITS)
    while True:
        fastest = min((n for n in (best, 2 * best, best // 2) if 1 <= n <= _MOST_SPLITS), key=seconds)
        if fastest == best:
            break
        best = fastest
    best = min((best, *others), key=seconds)
    return *tried[best], best
