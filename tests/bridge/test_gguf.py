"""GGUF files: what is in them, read back by the gguf package, what is refused, and that none is left half-written."""

import dataclasses
import json
import sys
import tracemalloc

import gguf
import jax
import numpy as np
import pytest
import tokenizers
from tokenizers import models, normalizers, pre_tokenizers

from chat_templates import CHATML, with_template
from mla_jax.bridge.gguf.export import check_representable, export_gguf
from mla_jax.bridge.hf.export import export
from mla_jax.bridge.hf.layout import tensors
from mla_jax.config import YarnConfig
from mla_jax.data.tokenizer import load_tokenizer
from mla_jax.errors import InputError, UsageError
from mla_jax.model.transformer import abstract_params, init_params
from tiny import MODEL
from tools import export_gguf as tool

TOKENIZER = load_tokenizer("needle-bpe")
# Rows of 32 where q8_0 needs them, but for q_b_proj.
CONFIG = dataclasses.replace(
    MODEL, q_lora_rank=24, kv_lora_rank=64, qk_nope_head_dim=32, v_head_dim=32, tie_word_embeddings=False
)
YARN = YarnConfig(factor=8.0, original_max_position_embeddings=64, mscale=1.0, mscale_all_dim=1.0)


@pytest.fixture(scope="module")
def params():
    return init_params(CONFIG, 0)


@pytest.fixture(scope="module")
def hf_dir(params, tmp_path_factory):
    return export(CONFIG, params, TOKENIZER, tmp_path_factory.mktemp("hf") / "model", dtype="bfloat16")


def exported(tmp_path, config, **changes):
    config = dataclasses.replace(config, **changes)
    params = jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), abstract_params(config))
    return export(config, params, TOKENIZER, tmp_path / "hf")


def read(path):
    """Metadata, and tensors as float32 with their types."""
    reader = gguf.GGUFReader(path)
    fields = {name: field.contents() for name, field in reader.fields.items()}
    stored = {
        t.name: (gguf.dequantize(t.data, t.tensor_type).reshape(t.shape[::-1]), t.tensor_type.name)
        for t in reader.tensors
    }
    return fields, stored


@pytest.mark.parametrize("type", ["f16", "bf16", "q8_0"])
def test_tensors_equal_the_source(type, params, hf_dir, tmp_path):
    _, stored = read(export_gguf(hf_dir, tmp_path / "out.gguf", type=type))
    source = {t.name: np.asarray(t.take(params).astype("bfloat16"), np.float32) for t in tensors(CONFIG)}
    heads, nope = CONFIG.num_attention_heads, CONFIG.qk_nope_head_dim
    expected = {
        "token_embd": source["model.embed_tokens.weight"],
        "output": source["lm_head.weight"],
        "output_norm": source["model.norm.weight"],
    }
    for i in range(CONFIG.num_hidden_layers):
        layer = {name: source[f"model.layers.{i}.{name}.weight"] for name in (
            "input_layernorm self_attn.q_a_proj self_attn.q_a_layernorm self_attn.q_b_proj "
            "self_attn.kv_a_proj_with_mqa self_attn.kv_a_layernorm self_attn.o_proj post_attention_layernorm "
            "mlp.gate_proj mlp.up_proj mlp.down_proj"
        ).split()}  # fmt: skip
        names = (
            "attn_norm attn_q_a attn_q_a_norm attn_q_b attn_kv_a_mqa attn_kv_a_norm attn_output ffn_norm ffn_gate "
            "ffn_up ffn_down"
        ).split()
        expected |= {f"blk.{i}.{name}": array for name, array in zip(names, layer.values(), strict=True)}
        kv_b = source[f"model.layers.{i}.self_attn.kv_b_proj.weight"]
        for head, rows in enumerate(np.split(kv_b, heads)):
            expected[f"blk.{i}.attn_k_b", head] = rows[:nope].T
            expected[f"blk.{i}.attn_v_b", head] = rows[nope:]
    found = {}
    for name, (array, kind) in stored.items():
        name = name.removesuffix(".weight")
        found |= {(name, h): (array[h], kind) for h in range(heads)} if name.endswith("_b") and "q_b" not in name else {
            name: (array, kind)
        }  # fmt: skip
    assert found.keys() == expected.keys()
    for name, (array, kind) in found.items():
        want = expected[name]
        vector, short = want.ndim == 1, want.shape[-1] % 32 != 0
        assert kind == ("F32" if vector else "F16" if type == "q8_0" and short else type.upper()), name
        if kind == "Q8_0":  # half a step of each block of 32; the step is rounded to a half float
            steps = np.abs(want.reshape(-1, 32)).max(1, keepdims=True) / 127
            assert (np.abs((array - want).reshape(-1, 32)) <= 0.57 * steps + 1e-7).all(), name
        else:
            tolerance = 1e-7 if kind == "F16" else 0  # subnormal halves
            np.testing.assert_allclose(array, want, rtol=0, atol=tolerance, err_msg=str(name))


def test_metadata(hf_dir, tmp_path):
    fields, _ = read(export_gguf(hf_dir, tmp_path / "out.gguf"))
    expected = {
        "general.architecture": "deepseek2",
        "general.name": "model",
        "general.file_type": 1,
        "deepseek2.block_count": 2,
        "deepseek2.context_length": 512,
        "deepseek2.attention.head_count": 2,
        "deepseek2.attention.head_count_kv": 1,
        "deepseek2.attention.q_lora_rank": 24,
        "deepseek2.attention.kv_lora_rank": 64,
        "deepseek2.attention.key_length": 72,
        "deepseek2.attention.value_length": 64,
        "deepseek2.attention.key_length_mla": 40,
        "deepseek2.attention.value_length_mla": 32,
        "deepseek2.rope.dimension_count": 8,
        "deepseek2.leading_dense_block_count": 2,
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "smollm",
        "tokenizer.ggml.bos_token_id": TOKENIZER.bos_id,
        "tokenizer.ggml.eos_token_id": TOKENIZER.eos_id,
        "tokenizer.ggml.padding_token_id": TOKENIZER.pad_id,
        "tokenizer.ggml.add_bos_token": True,
        "tokenizer.chat_template": TOKENIZER.chat_template,
        "tokenizer.ggml.eot_token_id": None,  # the eos token
    }
    assert {key: fields.get(key) for key in expected} == expected
    assert not any("scaling" in key for key in fields)
    tokens, types = fields["tokenizer.ggml.tokens"], fields["tokenizer.ggml.token_type"]
    assert len(tokens) == len(types) == CONFIG.vocab_size
    kinds = gguf.TokenType
    assert (tokens[TOKENIZER.eos_id], types[TOKENIZER.eos_id]) == ("<|eos|>", kinds.CONTROL)
    assert {types[i] for i in range(256)} == {kinds.NORMAL}
    assert {types[i] for i in range(TOKENIZER.vocab_size, CONFIG.vocab_size)} == {kinds.UNUSED}


def test_the_end_of_turn_is_told(params, tmp_path):
    tokenizer = with_template(CHATML, ("<|im_end|>",), "needle-bpe")
    fields, _ = read(export_gguf(export(CONFIG, params, tokenizer, tmp_path / "hf"), tmp_path / "out.gguf"))
    assert [fields["tokenizer.ggml.eot_token_id"]] == tokenizer.encode("<|im_end|>")
    assert fields["tokenizer.ggml.eos_token_id"] == tokenizer.eos_id


def test_yarn_as_deepseek_writes_it(tmp_path):
    fields, _ = read(export_gguf(exported(tmp_path, CONFIG, rope_scaling=YARN), tmp_path / "out.gguf"))
    scaling = {k.removeprefix("deepseek2.rope.scaling."): v for k, v in fields.items() if "rope.scaling" in k}
    assert scaling == {
        "type": "yarn",
        "factor": 8.0,
        "original_context_length": 64,
        "yarn_log_multiplier": pytest.approx(0.1),
        "attn_factor": pytest.approx(1.0),
    }


@pytest.mark.parametrize("tied", [False, True])
def test_queries_of_one_matrix_become_two(tied, tmp_path, capsys):
    """In float64, of any hidden state: the same queries, latents and RoPE keys."""
    config = dataclasses.replace(CONFIG, q_lora_rank=None, tie_word_embeddings=tied)
    rng = np.random.default_rng(0)
    params = jax.tree.map(
        lambda leaf: rng.normal(size=leaf.shape).astype("float16").astype(leaf.dtype), abstract_params(config)
    )
    fields, stored = read(export_gguf(export(config, params, TOKENIZER, tmp_path / "hf"), tmp_path / "out.gguf"))
    assert fields["deepseek2.attention.q_lora_rank"] == config.hidden_size
    said = capsys.readouterr().out
    assert said.count("\n") == 1 and f"written as {config.hidden_size}" in said
    assert ("output.weight" in stored) != tied

    def normed(h_ND):
        return h_ND / np.sqrt(np.square(h_ND).mean(-1, keepdims=True) + config.rms_norm_eps)

    h_ND = rng.normal(size=(50, config.hidden_size))
    for i in range(config.num_hidden_layers):
        layer = {
            name.split(".")[2]: array.astype(np.float64) for name, (array, _) in stored.items() if f"blk.{i}." in name
        }
        ours = jax.tree.map(lambda leaf, i=i: np.float64(leaf[i]), params["layers"])
        x_ND = normed(h_ND) * ours["input_layernorm"]
        y_ND = normed(h_ND) * layer["attn_norm"]
        queries_NX = (normed(y_ND @ layer["attn_q_a"].T) * layer["attn_q_a_norm"]) @ layer["attn_q_b"].T
        for got, weight in ((queries_NX, "q_proj"), (y_ND @ layer["attn_kv_a_mqa"].T, "kv_a_proj_with_mqa")):
            np.testing.assert_allclose(got, x_ND @ ours["self_attn"][weight], atol=0.02)  # half floats, of some 40
        np.testing.assert_array_equal(layer["attn_kv_a_norm"], ours["self_attn"]["kv_a_layernorm"])


def test_a_tied_head_is_written_once(tmp_path):
    _, stored = read(export_gguf(exported(tmp_path, CONFIG, tie_word_embeddings=True), tmp_path / "out.gguf"))
    assert "token_embd.weight" in stored and "output.weight" not in stored


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_hidden_layers": 27}, "takes a deepseek2 of 27 layers for a kind of"),
        ({"rope_scaling": dataclasses.replace(YARN, beta_slow=2.0)}, "beta_fast=32 and beta_slow=2, and its"),
    ],
)
def test_what_llama_cpp_cannot_represent(changes, message):
    with pytest.raises(InputError, match=message):
        check_representable(dataclasses.replace(CONFIG, **changes))


def test_a_refused_export_leaves_nothing(tmp_path):
    with pytest.raises(InputError, match="27 layers"):
        export_gguf(exported(tmp_path, CONFIG, num_hidden_layers=27), tmp_path / "out.gguf")
    assert [p.name for p in tmp_path.iterdir()] == ["hf"]


def tokenizer_json(change):
    backend = tokenizers.Tokenizer.from_str(TOKENIZER._backend.to_str())
    change(backend)
    return backend.to_str()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: setattr(t, "pre_tokenizer", pre_tokenizers.Whitespace()), "no name for the pre-tokenizer of this"),
        (lambda t: setattr(t, "pre_tokenizer", None), "no name for the pre-tokenizer of this"),
        (lambda t: setattr(t, "normalizer", normalizers.Lowercase()), r"does not normalize .*Lowercase"),
        (lambda t: setattr(t.model, "ignore_merges", True), "no name for the pre-tokenizer"),
        (lambda t: setattr(t, "model", models.WordLevel(t.get_vocab(), "<|pad|>")), "this one is WordLevel"),
    ],
)
def test_tokenizers_that_llama_cpp_has_not(change, message, tmp_path):
    folder = exported(tmp_path, CONFIG)
    (folder / "tokenizer.json").write_text(tokenizer_json(change))
    with pytest.raises(InputError, match=message):
        export_gguf(folder, tmp_path / "out.gguf")
    assert not (tmp_path / "out.gguf").exists()


def large(params, value):
    mlp = params["layers"]["mlp"]
    mlp = {**mlp, "up_proj": mlp["up_proj"].at[1, 2, 3].set(value)}
    return {**params, "layers": {**params["layers"], "mlp": mlp}}


@pytest.mark.parametrize(("value", "type"), [(-7e4, "f16"), (9e6, "q8_0")])
def test_values_that_do_not_fit(value, type, params, tmp_path):
    folder = export(CONFIG, large(params, value), TOKENIZER, tmp_path / "hf")
    with pytest.raises(
        InputError, match=rf"layers\.1\.mlp\.up_proj\.weight reaches {abs(value):.3g}".replace("+", r"\+")
    ):
        export_gguf(folder, tmp_path / "out.gguf", type=type)
    assert [p.name for p in tmp_path.iterdir()] == ["hf"]
    export_gguf(folder, tmp_path / "out.gguf", type="bf16")


def test_an_interrupted_export_keeps_the_old_file(hf_dir, tmp_path, monkeypatch):
    out = export_gguf(hf_dir, tmp_path / "out.gguf")
    before = out.read_bytes()

    def interrupt(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(gguf.GGUFWriter, "write_tensor_data", interrupt)
        with pytest.raises(KeyboardInterrupt):
            export_gguf(hf_dir, out, type="q8_0", overwrite=True)
    assert [p.name for p in tmp_path.iterdir()] == ["out.gguf"]
    assert out.read_bytes() == before
    (tmp_path / "out.gguf.partial").write_text("of a process that was killed")
    export_gguf(hf_dir, out, type="q8_0", overwrite=True)
    assert [p.name for p in tmp_path.iterdir()] == ["out.gguf"]
    assert out.read_bytes() != before


def test_existing_files(hf_dir, tmp_path):
    out = export_gguf(hf_dir, tmp_path / "out.gguf")
    with pytest.raises(InputError, match="exists; choose another file"):
        export_gguf(hf_dir, out)
    (tmp_path / "thesis").write_text("years of work")
    for other in (tmp_path, tmp_path / "thesis"):
        with pytest.raises(InputError, match="is not a GGUF file"):
            export_gguf(hf_dir, other, overwrite=True)


def test_one_tensor_at_a_time(tmp_path):
    folder = exported(tmp_path, CONFIG, num_hidden_layers=16, intermediate_size=2048, hidden_size=64)
    largest, total = 2048 * 64 * 4, 16 * 3 * 2048 * 64 * 4
    export_gguf(folder, tmp_path / "warm.gguf")
    tracemalloc.start()
    export_gguf(folder, tmp_path / "out.gguf", type="q8_0")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert largest < peak < 6 * largest < total / 7


def test_command_line(hf_dir, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["tool", str(hf_dir), str(tmp_path / "out.gguf"), "--type", "q8_0"])
    tool.main()
    assert "q8_0" in capsys.readouterr().out
    with pytest.raises(SystemExit) as stopped:
        tool.main()
    assert stopped.value.code == 1
    assert capsys.readouterr().err.count("\n") == 1
    assert json.loads((hf_dir / "config.json").read_text())  # the source is as it was


def test_without_the_package(hf_dir, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(UsageError, match=r'pip install "infinitecontext\[gguf\]"'):
        export_gguf(hf_dir, tmp_path / "out.gguf")
