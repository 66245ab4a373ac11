"""Checkpoints that cannot be imported: the error names what is wrong, in one line."""

import dataclasses
import json
import shutil

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from mla_jax.bridge.hf import reader
from mla_jax.bridge.hf.export import export
from mla_jax.config import YarnConfig
from mla_jax.data.tokenizer import load_tokenizer
from mla_jax.errors import InputError, UsageError
from mla_jax.model.transformer import init_params
from tiny import MODEL

YARN = YarnConfig(factor=4.0, original_max_position_embeddings=128, mscale=1.0, mscale_all_dim=1.0)
PLAIN_YARN = dataclasses.replace(YARN, mscale=None, mscale_all_dim=None)


@pytest.fixture(scope="module")
def exports(tmp_path_factory):
    """The same model in one file and in shards."""
    folder = tmp_path_factory.mktemp("exports")
    params = init_params(MODEL, 0)
    for name, size in (("one", 10**9), ("shards", 20_000)):
        export(MODEL, params, load_tokenizer("bytes"), folder / name, max_shard_bytes=size)
    return folder


@pytest.fixture
def one(exports, tmp_path):
    return shutil.copytree(exports / "one", tmp_path / "one")


@pytest.fixture
def shards(exports, tmp_path):
    return shutil.copytree(exports / "shards", tmp_path / "shards")


def edit_config(folder, **changes):
    """None removes a key."""
    path = folder / "config.json"
    config = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({key: value for key, value in config.items() if value is not None}))


def edit_tensors(folder, change):
    path = folder / "model.safetensors"
    stored = load_file(path)
    change(stored)
    save_file(stored, path, metadata={"format": "pt"})


def refused(folder, message):
    with pytest.raises(InputError, match=message) as caught:
        reader.load(folder)
    assert not isinstance(caught.value, UsageError)  # the files are at fault: exit code 1
    assert "\n" not in str(caught.value)
    return str(caught.value)


yarn = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128, "rope_theta": 100.0}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "llama"}, "model_type is 'llama'; only deepseek_v2 and deepseek_v3"),
        ({"model_type": None}, "model_type is None"),
        ({"first_k_dense_replace": 1, "n_routed_experts": 64}, "layers 1 to 1 have experts"),
        ({"model_type": "deepseek_v2", "first_k_dense_replace": None}, "layers 0 to 1 have experts"),
        ({"attention_bias": True}, "attention_bias is True; only False"),
        ({"mlp_bias": True}, "mlp_bias is True"),
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu'; only 'silu'"),
        ({"rms_norm_eps": 1e-5}, "rms_norm_eps is 1e-05; only 1e-06"),
        ({"num_key_value_heads": 1}, "num_key_value_heads is 1; only 2"),
        ({"quantization_config": {"quant_method": "fp8"}}, "quantization_config is"),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, "rope_type is 'linear'; only default and yarn"),
        ({"rope_scaling": {**yarn, "attention_factor": 1.5}}, "YaRN with attention_factor=1.5"),
        ({"rope_scaling": {**yarn, "truncate": False}}, "YaRN with truncate=False"),
        ({"rope_scaling": {**yarn, "factor": 0.5}}, "factor must be at least 1"),
        ({"rope_scaling": {**yarn, "factor": "four"}}, "factor is 'four'; expected a number"),
        ({"rope_scaling": {**yarn, "factor": float("nan")}}, "factor is nan; expected a number"),
        ({"rope_parameters": [1]}, r"rope_parameters is \[1\]; expected an object"),
        ({"kv_lora_rank": None}, "kv_lora_rank is missing; expected an integer"),
        ({"q_lora_rank": 12.5}, "q_lora_rank is 12.5; expected an integer"),
        ({"hidden_size": "32"}, "hidden_size is '32'; expected an integer"),
        ({"qk_rope_head_dim": 7}, "qk_rope_head_dim must be even"),
        ({"num_hidden_layers": 0}, "num_hidden_layers must be at least 1"),
    ],
)
def test_configs_that_cannot_be_imported(changes, message, one):
    edit_config(one, **changes)
    assert "config.json: " in refused(one, message)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"rope_scaling": {**yarn, "type": "yarn", "mscale": 1.0, "mscale_all_dim": 1.0}}, YARN),
        ({"rope_parameters": {**yarn, "mscale": 1.0, "mscale_all_dim": 1.0}}, YARN),
        ({"rope_parameters": {**yarn, "beta_fast": None, "beta_slow": None, "factor": None}}, PLAIN_YARN),
        ({"rope_scaling": {"type": "yarn", "factor": 4.0}, "original_max_position_embeddings": 128}, PLAIN_YARN),
        ({"rope_parameters": None}, None),
        ({"rope_parameters": {"rope_type": "default"}}, None),
    ],
)  # fmt: skip
def test_spellings_of_yarn(changes, expected, one):
    edit_config(one, **{"rope_scaling": None, "rope_theta": 100.0, **changes})
    config, _, _ = reader.load(one)
    assert config.rope_scaling == expected
    assert config.rope_theta == 100.0


def test_dense_without_experts_in_the_config(one):
    """The original DeepSeek code reads null experts as a dense model."""
    path = one / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "n_routed_experts": None, "first_k_dense_replace": 0}))
    reader.load(one)


def test_missing_left_over_and_misshapen_tensors_are_named_together(one):
    def change(stored):
        del stored["model.layers.1.mlp.up_proj.weight"]
        stored["model.layers.0.self_attn.q_proj.bias"] = np.zeros(32, np.float32)
        stored["model.norm.weight"] = np.ones(31, np.float32)

    edit_tensors(one, change)
    message = refused(one, "do not fit its config.json")
    assert "missing: model.layers.1.mlp.up_proj.weight;" in message
    assert "left over: model.layers.0.self_attn.q_proj.bias;" in message
    assert "of the wrong shape: model.norm.weight [31] (expected [32])" in message


def test_many_missing_tensors_are_counted(one):
    def change(stored):
        for name in [name for name in stored if "layers.1" in name]:
            del stored[name]

    edit_tensors(one, change)
    refused(one, r"missing: (model\.layers\.1\.[\w.]+, ){4}model\.layers\.1\.[\w.]+ and 5 more")


def test_another_type(one):
    edit_tensors(one, lambda stored: stored.update({"model.norm.weight": np.ones(32, np.float64)}))
    refused(one, "of another type than F32, BF16, F16: model.norm.weight F64")


def test_prediction_layers(one):
    extra = {"model.layers.2.eh_proj.weight": np.zeros((32, 64), np.float32)}
    edit_tensors(one, lambda stored: stored.update(extra))
    refused(one, r"beyond num_hidden_layers=2 \(model.layers.2.eh_proj.weight\): multi-token prediction")


def test_the_head_decides_what_is_tied(one):
    """As in transformers: values, not the flag; the flag only where the head is missing."""
    assert reader.load(one)[0].tie_word_embeddings  # equal, though the flag says untied

    edit_tensors(one, lambda stored: stored.update({"lm_head.weight": stored["lm_head.weight"] + 1}))
    for flag in (False, True):
        edit_config(one, tie_word_embeddings=flag)
        config, params, _ = reader.load(one)
        assert not config.tie_word_embeddings
        np.testing.assert_array_equal(params["lm_head"].T, params["embed_tokens"] + 1)

    edit_tensors(one, lambda stored: stored.pop("lm_head.weight"))
    assert reader.load(one)[0].tie_word_embeddings
    edit_config(one, tie_word_embeddings=False)
    refused(one, "missing: lm_head.weight")


@pytest.mark.parametrize("content", [b"", b"{", b"\xff\xfe", b"[1]", b"null"])
def test_unreadable_json(content, one):
    (one / "config.json").write_bytes(content)
    refused(one, r"config.json (cannot be read|holds no JSON object)")


@pytest.mark.parametrize("keep", [0, 4, 100, -1])
def test_truncated_weights(keep, one):
    path = one / "model.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    refused(one, r"model.safetensors cannot be read \(.*\); it is damaged or was not copied whole")


def test_missing_files(one, shards, tmp_path):
    refused(tmp_path / "nowhere", "nowhere is not a folder")
    (one / "tokenizer.json").unlink()
    refused(one, "one has no tokenizer.json: copy")
    (one / "model.safetensors").rename(one / "pytorch_model.bin")
    refused(one, "neither model.safetensors nor model.safetensors.index.json")
    (one / "config.json").unlink()
    refused(one, "config.json is missing")
    next(shards.glob("model-00002-*")).unlink()
    refused(shards, "model-00002-of-.*safetensors is missing")


@pytest.mark.parametrize("content", ["{}", '{"weight_map": {"a": 1}}', "not JSON"])
def test_unreadable_index(content, shards):
    (shards / "model.safetensors.index.json").write_text(content)
    refused(shards, "index.json (has no weight_map|cannot be read)")


def test_a_tokenizer_with_more_tokens_than_the_model(one):
    def change(stored):
        for name in ("model.embed_tokens.weight", "lm_head.weight"):
            stored[name] = stored[name][:100]

    edit_tensors(one, change)
    edit_config(one, vocab_size=100)
    refused(one, "the tokenizer has 262 tokens but model.vocab_size is 100")
