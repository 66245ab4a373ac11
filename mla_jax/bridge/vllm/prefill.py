"""An MLA prefill backend for vLLM, on GPUs that have no FlashAttention."""

# pyright: reportMissingImports=false

import torch
from vllm.v1.attention.backends.mla.prefill.base import MLAPrefillBackend

from mla_jax.bridge.vllm import ragged


class Prefill(MLAPrefillBackend):
    """Expanded attention among new tokens, and of new tokens to chunks of the cache, which vLLM merges."""

    @staticmethod
    def get_name() -> str:
        """The backend's name in vLLM's log."""
        return "INFINITECONTEXT"

    def run_prefill_new_tokens(self, q, k, v, return_softmax_lse, out=None, output_scale=None):
        """Causal attention of each sequence's new tokens among themselves."""
        if output_scale is not None:
            raise ValueError("8-bit output of prefill is not supported")
        starts, longest = self._prefill_metadata.query_start_loc, self._prefill_metadata.max_query_len
        result, lse = ragged.attention(
            q, k, v, starts, starts, q_longest=longest, k_longest=longest, scale=self.scale, causal=True
        )
        if out is not None:
            result = out.copy_(result)
        return (result, lse) if return_softmax_lse else result

    def run_prefill_context_chunk(self, chunk, q, k, v, out=None) -> tuple[torch.Tensor, torch.Tensor]:
        """Attention of new tokens to a chunk of the cache before them."""
        result, lse = ragged.attention(
            q, k, v, chunk.query_start_loc, chunk.cu_seq_lens,
            q_longest=chunk.max_query_len, k_longest=chunk.max_seq_len, scale=self.scale, causal=False,
        )  # fmt: skip
        return (result if out is None else out.copy_(result)), lse
