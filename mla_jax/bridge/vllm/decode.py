"""An MLA decode backend for vLLM: `latent_attention`'s Triton kernel."""

# pyright: reportMissingImports=false, reportIncompatibleMethodOverride=false, reportAttributeAccessIssue=false

from typing import ClassVar

import torch
from vllm.model_executor.layers.attention.mla_attention import (
    MLACommonMetadata,
    MLACommonMetadataBuilder,
    QueryLenSupport,
)
from vllm.v1.attention.backend import AttentionCGSupport
from vllm.v1.attention.backends.mla.cpu_mla import CPUMLABackend, CPUMLAImpl
from vllm.v1.attention.backends.mla.triton_mla import TritonMLABackend, TritonMLAImpl

from latent_attention.call_shapes import DecodeShape
from latent_attention.decode import triton_torch
from latent_attention.decode.triton_heuristic import why_not
from latent_attention.gpu import make_gpu

_WIDTHS = sorted({c + r for c in range(64, 513, 64) for r in (32, 64)})


def _decode(self, q, kv_c_and_k_pe_cache, attn_metadata, layer):
    """vLLM's `forward_mqa`: queries [tokens, heads, C + R], as many of each sequence; cache [P, S, C + R]."""
    q = torch.cat(q, dim=-1) if isinstance(q, tuple) else q
    c = self.kv_lora_rank
    cache, lengths = kv_c_and_k_pe_cache, attn_metadata.decode.seq_lens.to(torch.int32)
    out, lse = triton_torch.decode(
        q.contiguous().view(lengths.shape[0], -1, *q.shape[1:]),
        cache[..., :c],
        cache[..., c:],
        lengths,
        scale=self.scale,
        block_table=attn_metadata.decode.block_table.to(torch.int32),
    )
    return out.view(*q.shape[:2], c), lse.view(q.shape[:2])


class Metadata(MLACommonMetadata):
    """vLLM's metadata, without its check of a list of widths."""

    def __post_init__(self):
        pass


class Builder(MLACommonMetadataBuilder):
    """Builder of `Metadata`; with speculative decoding there may be several query tokens of each sequence."""

    _cudagraph_support: ClassVar = AttentionCGSupport.UNIFORM_BATCH
    query_len_support: ClassVar = QueryLenSupport.UNIFORM

    def __init__(self, kv_cache_spec, layer_names, vllm_config, device):
        super().__init__(kv_cache_spec, layer_names, vllm_config, device, metadata_cls=Metadata)


class Impl(TritonMLAImpl):
    """Attention of a layer on a GPU."""

    supports_dcp: bool = False
    forward_mqa = _decode


class Backend(TritonMLABackend):
    """Capabilities of the kernel, by which vLLM selects a backend for a model on a GPU."""

    supported_kv_cache_dtypes: ClassVar = ["auto", "float16", "bfloat16"]

    @staticmethod
    def get_name() -> str:
        """The backend's name in vLLM's registry."""
        return "CUSTOM"

    @staticmethod
    def get_impl_cls():
        """The class of a layer's attention."""
        return Impl

    @staticmethod
    def get_builder_cls():
        """The class that builds its metadata."""
        return Builder

    @classmethod
    def get_supported_head_sizes(cls) -> list[int]:
        """Supported widths of the cache, C + R."""
        return _WIDTHS

    @classmethod
    def supports_batch_invariance(cls) -> bool:
        """False: the split-KV schedule depends on the lengths of the whole batch."""
        return False

    @classmethod
    def supports_non_causal(cls) -> bool:
        """False: the kernel masks query tokens causally."""
        return False

    @classmethod
    def supports_combination(
        cls, head_size, dtype, kv_cache_dtype, block_size, use_mla, has_sink, use_sparse, use_mm_prefix,
        device_capability,
    ) -> str | None:  # fmt: skip
        """The reason why the kernel cannot serve this cache on this GPU; None if it can."""
        rope = 64 if head_size % 64 == 0 else 32
        name = str(dtype).removeprefix("torch.")
        cache = name if kv_cache_dtype in (None, "auto") else kv_cache_dtype
        shape = DecodeShape(1, 1, 1, head_size - rope, rope, 1, block_size or 16, name, cache, paged=True)
        return why_not(shape, make_gpu((device_capability.major, device_capability.minor), 1))


class CpuImpl(CPUMLAImpl):
    """Attention of a layer on a CPU, in Triton's interpreter."""

    forward_mqa = _decode


class CpuBackend(CPUMLABackend):
    """vLLM's CPU_MLA for every width."""

    @staticmethod
    def get_impl_cls():
        """The class of a layer's attention."""
        return CpuImpl

    @staticmethod
    def get_builder_cls():
        """The class that builds its metadata."""
        return Builder

    @classmethod
    def get_supported_head_sizes(cls) -> list[int]:
        """Supported widths of the cache, C + R."""
        return _WIDTHS
