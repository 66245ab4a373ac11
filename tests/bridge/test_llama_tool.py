"""`tools.import_hf` on a Llama: a run like any other, a report, and one line for what goes wrong."""

import json

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf

from mla_jax.bridge.llama import convert
from mla_jax.bridge.llama.calibration import read_calibration
from mla_jax.bridge.llama.config import Ranks, target_config
from mla_jax.bridge.llama.source import LlamaCheckpoint
from mla_jax.checkpoint.run_folder import load_run
from mla_jax.config import ModelConfig
from mla_jax.data.tokenizer import load_tokenizer
from mla_jax.errors import InputError
from tiny_llama import save_llama, stories
from tools import export_hf, import_hf

YARN = {"rope_type": "yarn", "rope_theta": 100.0, "factor": 4.0, "original_max_position_embeddings": 64}


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    folder = tmp_path_factory.mktemp("llama")
    save_llama(folder, num_key_value_heads=2, rope_parameters=YARN, rms_norm_eps=1e-5)
    (folder / "texts.txt").write_text(stories(0, 60))
    return folder


def test_convert_then_export_and_compare_with_transformers(call, llama, tmp_path):
    options = (
        "--kv-lora-rank 24 --rope-dim 8 --q-lora-rank 48 --calibration-tokens 2048 --calibration-length 64".split()
    )
    code, out, err = call(import_hf, llama, tmp_path / "run", *options, "--calibration", llama / "texts.txt")
    assert code == 0, err
    assert "64 before, 32 after (50.0%)" in out

    report = json.loads((tmp_path / "run" / "conversion.json").read_text())
    assert (report["kv_lora_rank"], report["qk_rope_head_dim"], report["q_lora_rank"]) == (24, 8, 48)
    assert (report["fitted_tokens"], report["held_out_tokens"]) == (1792, 256)
    assert set(report["perplexity"]) == {"source", "converted"}
    for errors in report["layers"]:
        assert 0 < errors["query_error"] < 1
        assert 0 < errors["key_error"] < 1
        assert 0 < errors["value_error"] < 1
        assert 0 < errors["rotary_share"] < 1
        assert 0 < errors["hidden_error"] < 1

    run = load_run(tmp_path / "run")
    model_file = OmegaConf.load(tmp_path / "run" / "conf" / "model" / "imported.yaml")
    del model_file["defaults"]
    assert OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(ModelConfig), model_file)) == run.model
    code, out, err = call(export_hf, tmp_path / "run", tmp_path / "exported", "--verify")
    assert code == 0, out + err


def test_errors_are_one_line(call, llama, tmp_path):
    texts = ("--calibration", llama / "texts.txt")
    for arguments, expected, message in (
        (texts, 2, "needs --kv-lora-rank WIDTH and --calibration TEXT_FILE"),
        (("--kv-lora-rank", 8), 2, "needs --kv-lora-rank WIDTH and --calibration TEXT_FILE"),
        (("--kv-lora-rank", 8, "--rope-dim", 5, *texts), 2, "--rope-dim 5"),
        (("--kv-lora-rank", 8, "--calibration", tmp_path / "none"), 1, "none cannot be read"),
        (("--kv-lora-rank", 8, "--calibration-tokens", 100, *texts), 1, "at least 2 are needed"),
    ):
        code, _, err = call(import_hf, llama, tmp_path / "run", *arguments)
        assert code == expected
        assert message in err
        assert err.count("\n") == 1
        assert not (tmp_path / "run").exists()


def converting(call, folder, run, texts):
    """The one line of an error, with nothing written."""
    code, _, err = call(import_hf, folder, run, "--kv-lora-rank", 8, "--calibration", texts)
    assert code == 1
    assert err.count("\n") == 1
    assert not run.exists()
    return err


def test_texts_shorter_than_the_model_is_wide(call, llama, tmp_path):
    (tmp_path / "short.txt").write_text(stories(0, 1))
    options = ("--kv-lora-rank", 8, "--calibration-length", 16, "--calibration-tokens", 48)
    code, _, err = call(import_hf, llama, tmp_path / "run", *options, "--calibration", tmp_path / "short.txt")
    assert code == 1
    assert "gives 32 tokens to fit; at least hidden_size=64 are needed" in err
    assert not (tmp_path / "run").exists()


def test_too_little_memory(call, llama, tmp_path, monkeypatch):
    monkeypatch.setattr(convert, "available_host_memory", lambda: 2**20)
    assert "GiB of memory, and 0.0 are left" in converting(call, llama, tmp_path / "run", llama / "texts.txt")


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_weights_that_are_no_numbers_are_named(value, call, llama, tmp_path):
    model = save_llama(tmp_path / "llama", num_key_value_heads=2)
    with torch.no_grad():
        model.model.layers[1].self_attn.v_proj.weight[3, 4] = value
    model.save_pretrained(tmp_path / "llama")
    err = converting(call, tmp_path / "llama", tmp_path / "run", llama / "texts.txt")
    assert "model.layers.1.self_attn.v_proj.weight" in err and "holds NaN or infinity" in err


def test_other_formats_say_what_to_do(call, llama, tmp_path):
    for name, advice in (("pytorch_model.bin", "from_pretrained("), ("model.gguf", "gguf_file='model.gguf'")):
        folder = tmp_path / name
        save_llama(folder, num_key_value_heads=2)
        (folder / "model.safetensors").rename(folder / name)
        err = converting(call, folder, tmp_path / "run", llama / "texts.txt")
        assert f"transformers converts {name}" in err and advice in err


def test_a_folder_without_a_tokenizer_says_what_to_do(call, llama, tmp_path):
    save_llama(tmp_path / "llama", num_key_value_heads=2)
    (tmp_path / "llama" / "tokenizer.json").unlink()
    err = converting(call, tmp_path / "llama", tmp_path / "run", llama / "texts.txt")
    assert "has no tokenizer.json: copy the model's into it" in err


def test_foreign_architectures_hear_what_can_be_imported(call, llama, tmp_path):
    save_llama(tmp_path / "llama")
    config = json.loads((tmp_path / "llama" / "config.json").read_text())
    (tmp_path / "llama" / "config.json").write_text(json.dumps({**config, "model_type": "gemma3_text"}))
    err = converting(call, tmp_path / "llama", tmp_path / "run", llama / "texts.txt")
    assert "'gemma3_text'" in err and "llama, mistral and qwen2 converted" in err


def test_biases_of_zero_are_taken(tmp_path):
    model = save_llama(tmp_path, num_key_value_heads=2, attention_bias=True)
    with pytest.raises(InputError, match="has biases"):
        LlamaCheckpoint(tmp_path)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.zero_()
    model.save_pretrained(tmp_path)
    source = LlamaCheckpoint(tmp_path)
    source.check(target_config(source.hf, source.config, Ranks(32), tied=source.tied, dtype="float32"))


def test_missing_and_damaged_tensors(call, llama, tmp_path):
    save_llama(tmp_path / "whole", num_key_value_heads=2)
    weights = tmp_path / "whole" / "model.safetensors"
    config = json.loads((tmp_path / "whole" / "config.json").read_text())
    (tmp_path / "whole" / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 3}))
    arguments = (tmp_path / "whole", tmp_path / "run", "--kv-lora-rank", 8, "--calibration", llama / "texts.txt")
    code, _, err = call(import_hf, *arguments)
    assert code == 1
    assert "do not fit its config.json; missing: model.layers.2.input_layernorm.weight" in err
    weights.write_bytes(weights.read_bytes()[:1000])
    code, _, err = call(import_hf, *arguments)
    assert code == 1
    assert "model.safetensors cannot be read" in err


def test_calibration_texts_are_cut_into_rows(tmp_path):
    tokenizer = load_tokenizer("bytes")
    path = tmp_path / "texts.txt"
    text = "".join(chr(ord("a") + i % 26) for i in range(100))
    path.write_text(text)
    calibration = read_calibration(path, tokenizer, 1000, 11)
    assert calibration.tokens_BT.shape == (10, 11)
    assert (calibration.tokens_BT[:, 0] == tokenizer.bos_id).all()
    assert tokenizer.decode(calibration.tokens_BT[:, 1:].ravel()) == text
    assert (calibration.fitted, calibration.held_out) == (8, 2)
    np.testing.assert_array_equal(read_calibration(path, tokenizer, 33, 11).tokens_BT, calibration.tokens_BT[:3])
    for content in (b"", b"abc", b"\xff\xfe"):
        path.write_bytes(content)
        with pytest.raises(InputError, match="texts.txt"):
            read_calibration(path, tokenizer, 1000, 11)
