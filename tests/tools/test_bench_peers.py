"""Kernels of other projects as the decode benchmark calls them: their files, their arguments, their best splits."""

import sys
from types import SimpleNamespace

import jax.numpy as jnp
import numpy as np
import pytest

from kernels_oracle import DecodeCase
from tools.bench import peers
from tools.bench.timing import Timing


def test_the_best_splits_are_found_by_climbing(monkeypatch):
    tried = []

    def time_torch(splits, turns):
        tried.append(splits)
        return f"result of {splits}", Timing(abs(splits - 64) + 1.0, 0.0)

    monkeypatch.setattr(peers, "time_torch", time_torch)
    assert peers.best_splits(lambda splits: splits, [], start=8) == ("result of 64", Timing(1.0, 0.0), 64)
    assert len(tried) == len(set(tried)) and max(tried) == 128
    assert peers.best_splits(lambda splits: splits, [], start=1024)[2] == 64
    tried.clear()
    assert peers.best_splits(lambda splits: splits or 62, [], start=1, others=[0])[2] == 64  # 0 is not in its way
    assert peers.best_splits(lambda splits: splits or 64.5, [], start=8, others=[0])[2] == 64
    assert peers.best_splits(lambda splits: splits + 20 if splits else 64, [], start=8, others=[0])[2] == 0
    assert tried.count(62) == tried.count(64.5) == 1


@pytest.mark.parametrize(("batch", "heads", "splits"), [(1, 16, 256), (1, 32, 128), (32, 16, 8), (128, 128, 1)])
def test_splits_start_from_what_fills_a_large_gpu(batch, heads, splits):
    assert peers.likely_splits(batch, heads) == splits


def test_peers_are_loaded_from_a_folder(tmp_path, monkeypatch):
    with pytest.raises(peers.PeerMissing, match=r"no triton_decode_attention\.py in the folder of peers \(None\)"):
        peers.load("vLLM Triton", None, 512)
    with pytest.raises(peers.PeerMissing, match=r"no _flashmla_C\.abi3\.so, flash_mla_interface\.py in"):
        peers.load("FlashMLA", tmp_path, 512)
    (tmp_path / "flash_attn_interface.py").touch()
    with pytest.raises(peers.PeerMissing, match=r"no _vllm_fa3_C\.abi3\.so in the folder"):
        peers.load("FlashAttention-3", tmp_path, 512)
    with pytest.raises(peers.PeerMissing, match=r"no flashinfer_mla_192\.so in the folder"):
        peers.load("FlashInfer", tmp_path, 192)
    (tmp_path / "triton_decode_attention.py").write_text(
        "from vllm.platforms import current_platform\nis_hip = current_platform.is_rocm()\n"
    )
    monkeypatch.setattr(sys, "path", [*sys.path])
    before = set(sys.modules)
    try:
        assert peers.load("vLLM Triton", tmp_path, 512).is_hip is False
    finally:
        for name in set(sys.modules) - before:
            del sys.modules[name]
        peers.stub_package.cache_clear()


def flash_attention_3_stand_in(torch):
    """vLLM's interface of FlashAttention-3 as its arguments are documented, for a query token a sequence."""

    def get_scheduler_metadata(
        batch_size, max_seqlen_q, max_seqlen_k, num_heads_q, num_heads_kv, headdim, cache_seqlens, qkv_dtype, headdim_v,
        cu_seqlens_q, page_size, causal, num_splits,
    ):  # fmt: skip
        assert max_seqlen_k >= cache_seqlens.max() and (max_seqlen_q, num_heads_kv, causal) == (1, 1, True)
        assert cu_seqlens_q.tolist() == list(range(batch_size + 1)) and cu_seqlens_q.dtype == torch.int32
        return batch_size, num_heads_q, headdim, headdim_v, qkv_dtype, page_size, num_splits

    def flash_attn_varlen_func(
        q, k, v, max_seqlen_q, cu_seqlens_q, max_seqlen_k, seqused_k, q_v, softmax_scale, causal, block_table,
        fa_version, scheduler_metadata, num_splits,
    ):  # fmt: skip
        assert (max_seqlen_q, causal, fa_version) == (1, True, 3) and max_seqlen_k >= seqused_k.max()
        schedule = *q.shape, v.shape[-1], q.dtype, k.shape[1], num_splits
        assert scheduler_metadata == schedule and k.shape[2:] == (1, q.shape[-1]) and v.shape[:3] == k.shape[:3]
        out = []
        for row, length in enumerate(seqused_k.tolist()):
            used = block_table[row, : -(-length // k.shape[1])].long()
            keys, values = (x[used].flatten(0, 2)[:length] for x in (k, v))
            out.append((softmax_scale * (q[row] @ keys.T + q_v[row] @ values.T)).softmax(-1) @ values)
        return torch.stack(out)

    return SimpleNamespace(
        FA3_AVAILABLE=True, **{f.__name__: f for f in (get_scheduler_metadata, flash_attn_varlen_func)}
    )


class FlashInferStandIn:
    """FlashInfer's library of one width, for one query token a sequence."""

    def plan(self, partials, schedule, staging, q_starts, page_starts, lengths, heads, c_width, causal):
        self.planned = q_starts.tolist(), page_starts.tolist(), lengths.tolist(), heads, c_width
        assert not causal and len(schedule) == len(staging) and q_starts.dtype == page_starts.dtype == lengths.dtype
        staging[:3] = staging.new_tensor([7, 8, 9])
        return "a plan", 3

    def run(
        self, partials, schedule, plan, q_nope, q_rope, c, k_rope, pages, out, lse, mask, heads, page_size, scale,
        lse_in_base_e, c_scale, k_rope_scale, scales,
    ):  # fmt: skip
        assert (plan, lse, mask, lse_in_base_e, c_scale, k_rope_scale, scales) == ("a plan", None, 0, False, 1, 1, None)
        q_starts, page_starts, lengths, planned_heads, c_width = self.planned
        assert schedule[:3].tolist() == [7, 8, 9] and q_starts == list(range(len(lengths) + 1))
        assert q_nope.shape == (len(lengths), heads, c_width) and (planned_heads, page_size) == (heads, c.shape[1])
        for row, length in enumerate(lengths):
            used = pages[page_starts[row] :][: -(-length // page_size)].long()
            keys, values = (x[used].flatten(0, 1)[:length] for x in (k_rope, c))
            out[row] = (scale * (q_rope[row] @ keys.T + q_nope[row] @ values.T)).softmax(-1) @ values


@pytest.mark.parametrize("splits", [None, 0, 4], ids=["FlashInfer", "FlashAttention-3", "FlashAttention-3, 4 splits"])
def test_peers_get_what_the_oracle_gets(splits):
    torch = pytest.importorskip("torch")
    case = DecodeCase((33, 80), heads=3, page_size=16, pages_per_row=5)
    (q, c, k_rope, lengths), keywords = case.draw()
    kv = jnp.concatenate([c, k_rope], axis=-1)
    *arrays, table = (torch.from_numpy(np.array(x)) for x in (q, kv, lengths, keywords["block_table_BN"]))
    options = {"c_width": c.shape[-1], "scale": keywords["scale"]}
    if splits is None:
        step = peers.flashinfer_step(FlashInferStandIn(), *arrays, **options)
    else:
        step = peers.flash_attention_3_step(flash_attention_3_stand_in(torch), *arrays, **options, splits=splits)
    np.testing.assert_allclose(step(table), case.expected()[0][:, 0], atol=1e-5)


def test_flash_attention_3_says_why_it_does_not_load():
    pytest.importorskip("torch")
    module = SimpleNamespace(FA3_AVAILABLE=False, FA3_UNAVAILABLE_REASON="libcudart.so.13: cannot open")
    with pytest.raises(ImportError, match=r"libcudart\.so\.13"):
        peers.flash_attention_3_step(module, None, None, None, c_width=4, scale=1.0, splits=0)
