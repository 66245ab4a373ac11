"""transformers computes what we compute: on our exports, and on checkpoints it made itself that we import."""

import dataclasses
import functools

import jax
import numpy as np
import pytest
import torch
import transformers

from mla_jax.bridge.hf import reader, verify
from mla_jax.bridge.hf.export import export
from mla_jax.config import ModelConfig, YarnConfig
from mla_jax.data.tokenizer import load_tokenizer
from mla_jax.model.transformer import bind
from tiny import MODEL, random_params

TOLERANCE = 1e-4
TOKENIZER = load_tokenizer("bytes")
# Large weights, so that attention is far from uniform and a wrong rotation or temperature shows.
PEAKY = dataclasses.replace(MODEL, num_hidden_layers=2, initializer_range=0.3, rope_theta=100.0)

yarn = functools.partial(YarnConfig, factor=8.0, original_max_position_embeddings=32)
YARNS = {
    "neither": yarn(),
    "mscale": yarn(mscale=0.7),
    "mscale_all_dim": yarn(mscale_all_dim=0.7),
    "both equal": yarn(mscale=1.0, mscale_all_dim=1.0),
    "both": yarn(mscale=1.3, mscale_all_dim=0.7, beta_fast=16.0, beta_slow=2.0),
}


def width(kv_lora_rank, nope, rope, v, **changes) -> ModelConfig:
    heads = {"qk_nope_head_dim": nope, "qk_rope_head_dim": rope, "v_head_dim": v}
    return dataclasses.replace(MODEL, kv_lora_rank=kv_lora_rank, initializer_range=0.1, **heads, **changes)


MODELS = {
    "nano": width(64, 32, 32, 32, num_attention_heads=4, hidden_size=64),
    "nano, q_lora, untied": width(64, 32, 32, 32, q_lora_rank=24, tie_word_embeddings=False),
    "512+64": width(512, 128, 64, 128, tie_word_embeddings=False),
    "512+64, q_lora, yarn": width(512, 128, 64, 128, q_lora_rank=48, rope_scaling=YARNS["both equal"]),
    "192+64": width(192, 64, 64, 64),
    "192+64, q_lora, untied, yarn": width(
        192, 64, 64, 64, q_lora_rank=48, tie_word_embeddings=False, rope_scaling=YARNS["both"]
    ),
    "256+64": width(256, 64, 64, 128, rope_scaling=YARNS["both equal"]),
    "256+64, q_lora": width(256, 64, 64, 128, q_lora_rank=48),
}


@functools.partial(jax.jit, static_argnums=0)
def logits(config, params, tokens):
    model = bind(config, params)
    return model.logits(model(tokens))


def random_tokens(config):
    return np.random.default_rng(1).integers(0, config.vocab_size, (2, 80))


def difference_from_hf(folder, config, params, dtype=torch.float32):
    """Largest difference of any logit, and transformers' logits."""
    tokens = random_tokens(config)
    hf_model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()
    with torch.inference_mode():
        theirs = hf_model(torch.from_numpy(tokens)).logits.float().numpy()
    return np.abs(np.asarray(logits(config, params, tokens)) - theirs).max(), theirs


@pytest.mark.parametrize("config", MODELS.values(), ids=MODELS)
def test_logits_of_exported_shapes(config, tmp_path):
    params = random_params(config)
    export(config, params, TOKENIZER, tmp_path / "out")
    assert difference_from_hf(tmp_path / "out", config, params)[0] < TOLERANCE


@pytest.mark.parametrize("scaling", YARNS.values(), ids=YARNS)
def test_logits_of_exported_yarn(scaling, tmp_path):
    config = dataclasses.replace(PEAKY, rope_scaling=scaling)
    params = random_params(config)
    export(config, params, TOKENIZER, tmp_path / "out")
    difference, theirs = difference_from_hf(tmp_path / "out", config, params)
    assert difference < TOLERANCE
    without_yarn = logits(PEAKY, params, random_tokens(config))
    assert np.abs(without_yarn - theirs).max() > 100 * TOLERANCE, "the test would not notice YaRN at all"


def test_a_bfloat16_export_holds_the_rounded_parameters(tmp_path):
    params = random_params(MODEL)
    export(MODEL, params, TOKENIZER, tmp_path / "out", dtype="bfloat16")
    rounded = jax.tree.map(lambda x: x.astype("bfloat16").astype("float32"), params)
    assert difference_from_hf(tmp_path / "out", MODEL, rounded)[0] < TOLERANCE
    config = transformers.AutoConfig.from_pretrained(tmp_path / "out")
    assert config.dtype == torch.bfloat16


def test_verify_compares_logits_tokens_and_ids(tmp_path):
    config = dataclasses.replace(PEAKY, rope_scaling=YARNS["both equal"], q_lora_rank=12)
    params = random_params(config)
    out = export(config, params, TOKENIZER, tmp_path / "out")
    verification = verify.verify(out, config, params, TOKENIZER)
    assert verification.passed
    assert verification.first_difference is None
    assert verification.same_tokens == len(verify.PROMPTS)

    verification = verify.verify(out, config, {**params, "norm": -params["norm"]}, TOKENIZER)
    assert not verification.passed
    assert verification.logit_difference > TOLERANCE
    assert verification.same_tokens == 0


def test_verify_tells_rounding_from_errors(tmp_path):
    """Logits of hundreds differ by more than the tolerance; norms that are wrong by a ten-thousandth still show."""
    config = dataclasses.replace(PEAKY, tie_word_embeddings=False, vocab_size=264)
    params = random_params(config)
    params = {**params, "lm_head": 100 * params["lm_head"]}
    out = export(config, params, TOKENIZER, tmp_path / "out")
    verification = verify.verify(out, config, params, TOKENIZER, prompts=["a"])
    assert verification.logit_difference > TOLERANCE
    assert verification.passed and verification.first_difference is None
    assert "or RMS error to float64" in str(verification)

    verification = verify.verify(out, config, {**params, "norm": 1.0001 * params["norm"]}, TOKENIZER, prompts=["a"])
    assert not verification.passed
    assert verification.first_difference == "model.norm or lm_head"


def changed(params, *path):
    if not path:
        return params.at[-1].multiply(1.5)
    return {**params, path[0]: changed(params[path[0]], *path[1:])}


@pytest.mark.parametrize(
    ("path", "part"),
    [
        (("embed_tokens",), "model.embed_tokens"),
        (("layers", "mlp", "down_proj"), "model.layers.1"),
        (("layers", "self_attn", "kv_a_proj_with_mqa"), "model.layers.1"),
        (("norm",), "model.norm or lm_head"),
        (("lm_head",), "model.norm or lm_head"),
    ],
)
def test_verify_names_the_first_part_that_differs(path, part, tmp_path):
    config = dataclasses.replace(PEAKY, tie_word_embeddings=False, num_hidden_layers=2, vocab_size=264)
    params = random_params(config)
    out = export(config, changed(params, *path), TOKENIZER, tmp_path / "out")
    verification = verify.verify(out, config, params, TOKENIZER, prompts=["a"])
    assert verification.first_difference == part
    assert f"the first module that differs: {part}" in str(verification)
    assert not verification.passed


HF_SMALL = {
    "vocab_size": 264,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 12,
    "v_head_dim": 10,
    "first_k_dense_replace": 2,
    "max_position_embeddings": 256,
    "initializer_range": 0.3,
}
HF_YARN = {"type": "yarn", "factor": 8.0, "original_max_position_embeddings": 32}
HF_MODELS = {
    "v3": ("v3", {"q_lora_rank": None, "rope_parameters": {"rope_type": "default", "rope_theta": 100.0}}),
    "v3 tied": ("v3", {"q_lora_rank": 12, "tie_word_embeddings": True}),
    "v3 rotating halves": ("v3", {"q_lora_rank": None, "rope_interleave": False}),
    "v3 rotating halves, q_lora": ("v3", {"q_lora_rank": 12, "rope_interleave": False}),
    "v3 yarn, old spelling": (
        "v3",
        {"rope_scaling": {**HF_YARN, "mscale": 1.0, "mscale_all_dim": 1.0}, "rope_theta": 50.0},
    ),
    "v3 yarn, mscale_all_dim alone": (
        "v3",
        {"rope_parameters": {**HF_YARN, "rope_theta": 50.0, "mscale_all_dim": 0.7}},
    ),
    "v2": ("v2", {"q_lora_rank": 12, "rope_theta": 100.0}),
    "v2 tied": ("v2", {"q_lora_rank": None, "tie_word_embeddings": True}),
    "v2 yarn": ("v2", {"rope_scaling": {**HF_YARN, "mscale": 0.707, "mscale_all_dim": 0.707}, "q_lora_rank": None}),
    "v2 yarn, no mscale": ("v2", {"rope_parameters": {**HF_YARN, "rope_type": "yarn", "rope_theta": 50.0}}),
}


def save_hf(folder, version, changes, **how):
    """A random checkpoint that transformers itself writes."""
    torch.manual_seed(0)
    make_config, make_model = {
        "v2": (transformers.DeepseekV2Config, transformers.DeepseekV2ForCausalLM),
        "v3": (transformers.DeepseekV3Config, transformers.DeepseekV3ForCausalLM),
    }[version]
    hf_model = make_model(make_config(**{**HF_SMALL, "q_lora_rank": 12, **changes}))
    for name, parameter in hf_model.named_parameters():
        if "norm" in name:
            torch.nn.init.uniform_(parameter, 0.5, 1.5)
    hf_model.save_pretrained(folder, **how)
    TOKENIZER.save(folder)


@pytest.mark.parametrize(("version", "changes"), HF_MODELS.values(), ids=HF_MODELS)
def test_logits_of_imported_checkpoints(version, changes, tmp_path):
    save_hf(tmp_path, version, changes)
    config, params, tokenizer = reader.load(tmp_path)
    assert config.tie_word_embeddings == changes.get("tie_word_embeddings", False)
    assert tokenizer.fingerprint == TOKENIZER.fingerprint
    assert difference_from_hf(tmp_path, config, params)[0] < TOLERANCE


def test_logits_of_an_imported_sharded_checkpoint(tmp_path):
    save_hf(tmp_path, "v3", {}, max_shard_size="20KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 1
    config, params, _ = reader.load(tmp_path)
    assert difference_from_hf(tmp_path, config, params)[0] < TOLERANCE


def test_an_imported_model_exports_to_the_same_logits(tmp_path):
    """V2, rotating interleaved pairs in complex numbers, leaves as V3."""
    save_hf(tmp_path / "v2", "v2", HF_MODELS["v2 yarn"][1])
    config, params, tokenizer = reader.load(tmp_path / "v2")
    export(config, params, tokenizer, tmp_path / "v3")
    _, before = difference_from_hf(tmp_path / "v2", config, params)
    _, after = difference_from_hf(tmp_path / "v3", config, params)
    assert np.abs(before - after).max() < TOLERANCE
