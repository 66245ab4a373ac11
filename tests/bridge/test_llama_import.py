"""Llama-style checkpoints as latent attention: what must be exact is, and what cannot be represented is refused."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from mla_jax.bridge.llama.config import WIDEST_ROPE, Ranks, frequency_error, read_config, target_config
from mla_jax.bridge.llama.convert import choose_theta, convert
from mla_jax.bridge.llama.source import LlamaCheckpoint
from mla_jax.config import ModelConfig
from mla_jax.errors import InputError, UsageError
from mla_jax.model.rope import inv_freq
from mla_jax.model.transformer import bind
from tiny_llama import SIZES, leave_positions_out, save_llama, stories

LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 10_000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}  # fmt: skip
YARN = {"rope_type": "yarn", "rope_theta": 100.0, "factor": 4.0, "original_max_position_embeddings": 64}


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    path = tmp_path_factory.mktemp("texts") / "calibration.txt"
    path.write_text(stories(0, 60))
    return path


@pytest.fixture
def positions_left_out(monkeypatch):
    leave_positions_out(monkeypatch)


def small(folder, texts, ranks, **how):
    return convert(folder, ranks, texts, **{"tokens": 2048, "length": 64, **how})


def largest_difference(model, config: ModelConfig, params, *, positions: bool):
    """Of any logit, with the real positions or with all of them 0, and the spread of logits."""
    tokens = np.random.default_rng(1).integers(0, 256, (2, 80))
    where = np.tile(np.arange(80), (2, 1)) if positions else np.zeros((2, 80), np.int64)
    with jax.default_matmul_precision("highest"), torch.inference_mode():
        ours_model = bind(config, params)
        ours = np.asarray(ours_model.logits(ours_model(jnp.asarray(tokens), jnp.asarray(where))))
        theirs = model(torch.from_numpy(tokens), position_ids=torch.from_numpy(where)).logits.numpy()
    return np.abs(ours - theirs).max(), theirs.std()


FULL_RANK = {
    "multi-head, half of the frequencies": ({"num_key_value_heads": 4}, Ranks(64, 8)),
    "untied, another epsilon": (
        {"num_key_value_heads": 2, "tie_word_embeddings": False, "rms_norm_eps": 1e-5},
        Ranks(64),
    ),
    "queries too": ({"num_key_value_heads": 2}, Ranks(64, 16, 64)),
    "wider than its rank": ({"num_key_value_heads": 1, "head_dim": 8}, Ranks(64, 4)),
    "head_dim of its own": ({"num_key_value_heads": 2, "head_dim": 24}, Ranks(64, 24)),
}


@pytest.mark.parametrize(("changes", "ranks"), FULL_RANK.values(), ids=FULL_RANK)
def test_factors_of_full_rank_are_exact_with_positions_left_out(changes, ranks, texts, positions_left_out, tmp_path):
    model = save_llama(tmp_path, **changes)
    config, params, _, report = small(tmp_path, texts, ranks)
    assert config.tie_word_embeddings == changes.get("tie_word_embeddings", False)
    difference, spread = largest_difference(model, config, params, positions=False)
    # A norm of what was normed does not see the first one's epsilon.
    assert difference < 30 * max(model.config.rms_norm_eps, 1e-6) * spread
    assert all(errors["key_error"] < 1e-9 and errors["value_error"] < 1e-9 for errors in report.layers)
    assert largest_difference(model, config, params, positions=True)[0] > 0.01 * spread, "positions do not matter"


ONE_KEY_HEAD = {
    "plain": ({}, 3e-5),
    "another epsilon": ({"rms_norm_eps": 1e-5}, 3e-4),
    "yarn": ({"rope_parameters": YARN}, 3e-5),
}


@pytest.mark.parametrize(("changes", "tolerance"), ONE_KEY_HEAD.values(), ids=ONE_KEY_HEAD)
def test_one_key_head_keeps_its_positions(changes, tolerance, texts, tmp_path):
    """The rotary key of one head is that head's key: nothing is lost, with all positions in."""
    model = save_llama(tmp_path, num_key_value_heads=1, **changes)
    config, params, _, report = small(tmp_path, texts, Ranks(64))
    difference, spread = largest_difference(model, config, params, positions=True)
    assert difference < tolerance * spread
    assert [errors["rotary_share"] for errors in report.layers] == pytest.approx([1, 1])
    assert report.perplexity["converted"] == pytest.approx(report.perplexity["source"], rel=1e-4)


def test_mistral_and_qwen_without_biases(texts, positions_left_out, tmp_path):
    model = save_llama(tmp_path / "mistral", "mistral", num_key_value_heads=2, sliding_window=None)
    config, params, _, _ = small(tmp_path / "mistral", texts, Ranks(64))
    difference, spread = largest_difference(model, config, params, positions=False)
    assert difference < 3e-5 * spread

    model = save_llama(tmp_path / "qwen2", "qwen2", num_key_value_heads=2)
    with pytest.raises(InputError, match=r"has biases \(model.layers.0.self_attn.k_proj.bias\)"):
        small(tmp_path / "qwen2", texts, Ranks(64))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.zero_()
    model.save_pretrained(tmp_path / "qwen2")
    source = LlamaCheckpoint(tmp_path / "qwen2")
    source.check(target_config(source.hf, source.config, Ranks(64), tied=source.tied, dtype="float32"))


def test_qwen3_is_refused(texts, tmp_path):
    save_llama(tmp_path, "qwen3", num_key_value_heads=2, head_dim=16)
    with pytest.raises(InputError, match="normalises its queries and keys .*cannot be converted"):
        small(tmp_path, texts, Ranks(64))


@pytest.mark.parametrize("rope", [LLAMA3, YARN, {"rope_type": "default", "rope_theta": 500.0}])
def test_frequencies_are_those_of_transformers(rope):
    config = LlamaConfig(**SIZES, head_dim=64, rope_parameters=rope)
    source = read_config(json.loads(config.to_json_string(use_diff=False)))
    if rope["rope_type"] == "default":
        expected, amplitude = 500.0 ** -(np.arange(0, 64, 2) / 64), 1.0
    else:
        expected, amplitude = ROPE_INIT_FUNCTIONS[rope["rope_type"]](config, "cpu")
    np.testing.assert_allclose(source.inv_freq, np.asarray(expected), rtol=1e-5)
    assert source.softmax_scale == pytest.approx(64**-0.5 * amplitude**2)


def test_the_scaling_of_llama_3_is_near_a_yarn():
    """That of Llama 3.2 1B: frequencies agree but for those between the two bounds, and the report says by how much."""
    hf = {
        **SIZES, "model_type": "llama", "hidden_size": 2048, "num_attention_heads": 32, "num_key_value_heads": 8,
        "max_position_embeddings": 131_072, "rope_theta": 500_000.0,
        "rope_scaling": {**LLAMA3, "rope_theta": None, "factor": 32.0, "original_max_position_embeddings": 8192},
    }  # fmt: skip
    source = read_config(hf)
    target = target_config(hf, source, Ranks(512, rope_theta=500_000.0), tied=True, dtype="bfloat16")
    assert (target.qk_nope_head_dim, target.qk_rope_head_dim, target.v_head_dim) == (64, 64, 64)
    kept = inv_freq(target)
    different = np.abs(kept / source.inv_freq - 1) > 1e-6
    assert 0 < different.sum() <= 5
    assert frequency_error(source, target) < 0.9
    assert frequency_error(source, target) == pytest.approx(np.abs(kept / source.inv_freq - 1).max())


def test_the_base_of_the_rotary_key():
    """The source's base keeps its scaling, another is plain."""
    hf = {**SIZES, "model_type": "llama", "num_key_value_heads": 2, "rope_theta": 400.0}
    for scaling, ranks, theta, scaled in (
        ({}, Ranks(32), 400, False), ({"rope_scaling": {**YARN, "rope_theta": None}}, Ranks(32), 400, True),
        ({"rope_scaling": {**YARN, "rope_theta": None}}, Ranks(32, rope_theta=50.0), 50, False),
    ):  # fmt: skip
        source = read_config({**hf, **scaling})
        target = target_config({**hf, **scaling}, source, ranks, tied=True, dtype="float32")
        assert (target.rope_theta, target.rope_scaling is not None) == (theta, scaled)
        assert frequency_error(source, target) == pytest.approx(0, abs=1e-9)


@pytest.mark.parametrize(("theta", "kv_heads", "chosen"), [(1e6, 4, 1e3), (4.0, 4, 4.0), (1e6, 1, 1e6)])
def test_the_base_is_chosen(theta, kv_heads, chosen, tmp_path):
    """The root where half of the frequencies hardly turn; the source's own where they do, and where it is exact."""
    save_llama(tmp_path, num_key_value_heads=kv_heads, rope_parameters={"rope_type": "default", "rope_theta": theta})
    assert choose_theta(LlamaCheckpoint(tmp_path), Ranks(32), 64).rope_theta == pytest.approx(chosen)


HF = {**SIZES, "model_type": "llama", "num_key_value_heads": 2}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_key_value_heads": 3}, "num_key_value_heads=3 does not divide num_attention_heads=4"),
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu'; only 'silu'"),
        ({"head_dim": 7}, "head_dim is 7"),
        ({"sliding_window": 100}, "sliding_window is 100"),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, "rope_type is 'linear'; only default, llama3 and yarn"),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 2.0}}, "llama3 needs low_freq_factor"),
        ({"rope_scaling": {**YARN, "mscale": 1.0}}, "yarn with mscale=1.0"),
        ({"rope_scaling": 3}, "rope_parameters is 3; expected an object"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor is 0.5"),
        ({"rope_parameters": {"rope_theta": 5.0, "partial_rotary_factor": 0.5}}, "with partial_rotary_factor=0.5"),
        ({"quantization_config": {"quant_method": "fp8"}}, "quantization_config is"),
        ({"num_attention_heads": "4"}, "num_attention_heads is '4'; expected a positive integer"),
    ],
)
def test_configs_that_cannot_be_converted(changes, message):
    with pytest.raises(InputError, match=message):
        hf = {**HF, **changes}
        target_config(hf, read_config(hf), Ranks(32), tied=True, dtype="float32")


@pytest.mark.parametrize(
    ("ranks", "message"),
    [
        (Ranks(32, 6), "--rope-dim 6 cannot hold every s-th frequency of heads 16 wide; possible are 2, 4, 8, 16"),
        (Ranks(32, 32), "--rope-dim 32"),
        (Ranks(65), "--kv-lora-rank 65 must be from 1 to hidden_size=64"),
        (Ranks(0), "--kv-lora-rank 0"),
        (Ranks(32, 16, 100), "--q-lora-rank 100"),
        (Ranks(32, rope_theta=1.0), "--rope-theta 1.0 must be above 1"),
    ],
)
def test_ranks_that_are_impossible(ranks, message):
    with pytest.raises(UsageError, match=message):
        target_config(HF, read_config(HF), ranks, tied=True, dtype="float32")


def test_a_sliding_window_that_is_off_or_as_long_as_the_context():
    for window in ({"sliding_window": 256}, {"sliding_window": 32, "use_sliding_window": False}):
        read_config({**HF, **window})


def test_the_default_rotary_width():
    wide = {**HF, "head_dim": 128}
    assert target_config(wide, read_config(wide), Ranks(32), tied=True, dtype="float32").qk_rope_head_dim == 64
    assert WIDEST_ROPE == 64
