"""Attention over packed ragged sequences, with PyTorch's kernel for every CUDA GPU from Maxwell on."""

import torch


def attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    q_starts: torch.Tensor,
    k_starts: torch.Tensor,
    *,
    q_longest: int,
    k_longest: int,
    scale: float,
    causal: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention of each sequence's queries to its own keys.

    PyTorch's memory-efficient kernel (from xFormers, built for sm_50 and newer) runs on CUDA devices: it takes
    sequences of any lengths in one launch, without a device-to-host sync. Elsewhere sequences are computed one by one.

    Args:
        q: queries [T, H, K], sequences packed one after the other.
        k: keys [S, H, K].
        v: values [S, H, V].
        q_starts: cumulative query lengths of the sequences (cu_seqlens), int32 [N + 1].
        k_starts: cumulative key lengths, int32 [N + 1].
        q_longest: largest number of queries of a sequence.
        k_longest: largest number of keys of a sequence.
        scale: softmax scale.
        causal: query i sees keys 0 to i; there are then as many keys as queries.

    Returns:
        out [T, H, V] in the type of v and the log-sum-exp float32 [H, T]; 0 and -inf where there are no keys.
    """
    if q.is_cuda:
        return _efficient(q, k, v, q_starts, k_starts, q_longest, k_longest, scale, causal)
    return _one_by_one(q, k, v, q_starts, k_starts, scale, causal)


def _efficient(q, k, v, q_starts, k_starts, q_longest, k_longest, scale, causal):
    tokens = q.shape[0]
    out, lse_NHT, *_ = torch.ops.aten._efficient_attention_forward(
        q[None], k[None], v[None], None, q_starts, k_starts, q_longest, k_longest, 0.0, int(causal), True, scale=scale
    )  # fmt: skip
    token = torch.arange(tokens, device=q.device, dtype=q_starts.dtype)
    sequence = torch.searchsorted(q_starts[1:], token, right=True)
    lse_TH = lse_NHT[sequence, :, token - q_starts[sequence]]
    # The output of the kernel for a sequence without keys is not documented.
    unseen = (k_starts[1:] == k_starts[:-1])[sequence]
    out = out[0].masked_fill(unseen[:, None, None], 0)
    return out, lse_TH.masked_fill(unseen[:, None], -torch.inf).T.contiguous()


def _one_by_one(q, k, v, q_starts, k_starts, scale, causal):
    out = v.new_zeros(q.shape[0], q.shape[1], v.shape[2])
    lse = q.new_full((q.shape[1], q.shape[0]), -torch.inf, dtype=torch.float32)
    ends = zip(q_starts.tolist(), q_starts[1:].tolist(), k_starts.tolist(), k_starts[1:].tolist(), strict=False)
    for q0, q1, k0, k1 in ends:
        if q0 < q1 and k0 < k1:
            scores = torch.einsum("thk,shk->hts", q[q0:q1].float(), k[k0:k1].float()) * scale
            if causal:
                scores.masked_fill_(torch.ones_like(scores[0], dtype=torch.bool).triu(1), -torch.inf)
            lse[:, q0:q1] = scores.logsumexp(-1)
            out[q0:q1] = torch.einsum("hts,shv->thv", scores.softmax(-1), v[k0:k1].float()).to(v.dtype)
    return out, lse
