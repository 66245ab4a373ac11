"""Attention of ragged sequences, as the vLLM plugin's prefill computes it, against float64."""

import numpy as np
import pytest
import torch

from mla_jax.bridge.vllm import ragged

WITHOUT_GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU that PyTorch sees")
DEVICES = ["cpu", pytest.param("cuda", marks=[pytest.mark.gpu, WITHOUT_GPU])]
TOLERANCE = {torch.float32: 1e-5, torch.float16: 3e-3}


def oracle(q, k, v, q_starts, k_starts, scale, causal):
    """out [T, H, V] and lse [H, T] in float64."""
    out, lse = np.zeros((*q.shape[:2], v.shape[2])), np.full(q.shape[1::-1], -np.inf)
    for q0, q1, k0, k1 in zip(q_starts, q_starts[1:], k_starts, k_starts[1:], strict=False):
        scores = np.einsum("thk,shk->hts", q[q0:q1], k[k0:k1]) * scale
        if causal:
            scores = np.where(np.tri(q1 - q0, k1 - k0, dtype=bool), scores, -np.inf)
        if q0 < q1 and k0 < k1:
            peak = scores.max(-1, keepdims=True)
            weights = np.exp(scores - peak)
            lse[:, q0:q1] = (peak + np.log(weights.sum(-1, keepdims=True)))[..., 0]
            out[q0:q1] = np.einsum("hts,shv->thv", weights / weights.sum(-1, keepdims=True), v[k0:k1])
    return out, lse


def check(q_lengths, k_lengths, *, causal, device, dtype=torch.float32, heads=3, qk=128, v_width=64):
    torch.manual_seed(0)
    q_starts, k_starts = (np.cumsum([0, *lengths]) for lengths in (q_lengths, k_lengths))
    # As vLLM hands them over: keys and values are parts of larger tensors.
    q = torch.randn(q_starts[-1], heads, qk).to(dtype)
    kv = torch.randn(k_starts[-1], heads, qk + v_width).to(dtype)
    k, v = kv.split([qk, v_width], dim=-1)
    starts = [torch.tensor(s, dtype=torch.int32, device=device) for s in (q_starts, k_starts)]
    out, lse = ragged.attention(
        q.to(device), k.to(device).contiguous(), kv.to(device)[..., qk:], *starts,
        q_longest=max(q_lengths), k_longest=max(k_lengths), scale=0.1, causal=causal,
    )  # fmt: skip
    assert out.dtype == dtype and lse.dtype == torch.float32 and lse.is_contiguous()
    expected = oracle(*(x.double().numpy() for x in (q, k, v)), q_starts, k_starts, 0.1, causal)
    for ours, theirs in zip((out, lse), expected, strict=True):
        np.testing.assert_allclose(ours.float().cpu(), theirs, atol=TOLERANCE[dtype], rtol=TOLERANCE[dtype])


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize(("qk", "v_width"), [(128, 128), (128, 64), (192, 128), (96, 40)])
def test_new_tokens(device, dtype, qk, v_width):
    lengths = (1, 70, 33, 128, 5)
    check(lengths, lengths, causal=True, device=device, dtype=dtype, qk=qk, v_width=v_width)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_new_tokens_to_cached_ones(device, dtype):
    """One of them has nothing cached, which merges as nothing."""
    check((1, 40, 3, 65), (200, 7, 0, 64), causal=False, device=device, dtype=dtype)


@pytest.mark.parametrize("device", DEVICES)
def test_chunks_merge_to_the_whole(device):
    """What vLLM does with the log-sum-exp."""
    torch.manual_seed(0)
    q, k, v = (torch.randn(n, 2, 64, device=device) for n in (9, 50, 50))

    def part(k, v):
        starts = [torch.tensor([0, n], dtype=torch.int32, device=device) for n in (9, len(k))]
        return ragged.attention(q, k, v, *starts, q_longest=9, k_longest=len(k), scale=0.2, causal=False)

    (out1, lse1), (out2, lse2), (whole, whole_lse) = part(k[:20], v[:20]), part(k[20:], v[20:]), part(k, v)
    share = torch.sigmoid(lse1 - lse2).T[..., None]
    torch.testing.assert_close(share * out1 + (1 - share) * out2, whole, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(torch.logaddexp(lse1, lse2), whole_lse, atol=1e-5, rtol=1e-5)
