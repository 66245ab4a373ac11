"""The exported folder: its files, what is refused, and that nothing half-written stays."""

import dataclasses
import json
import math
import resource
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
import transformers
from safetensors import safe_open

from chat_templates import chat_tokenizer
from mla_jax import mesh
from mla_jax.bridge.hf import export as hf_export
from mla_jax.bridge.hf import reader
from mla_jax.bridge.hf.config import to_hf
from mla_jax.bridge.hf.export import export
from mla_jax.bridge.hf.layout import count_parameters, tensors
from mla_jax.config import MeshConfig, YarnConfig
from mla_jax.data.tokenizer import load_tokenizer
from mla_jax.errors import InputError
from mla_jax.evals.results import Results
from mla_jax.model.transformer import abstract_params, init_params
from tiny import MODEL

TOKENIZER = load_tokenizer("bytes")
UNTIED = dataclasses.replace(MODEL, tie_word_embeddings=False, q_lora_rank=12)
SHARD = 20_000


@pytest.fixture(scope="module")
def params():
    return init_params(MODEL, 0)


def contents(folder):
    return {p.relative_to(folder): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def equal(left, right):
    return jax.tree.all(jax.tree.map(lambda a, b: a.dtype == b.dtype and bool((a == b).all()), left, right))


@pytest.mark.parametrize("config", [MODEL, UNTIED], ids=["tied", "untied"])
@pytest.mark.parametrize("max_shard_bytes", [10**9, SHARD], ids=["one file", "shards"])
def test_round_trip_is_bitwise(config, max_shard_bytes, tmp_path):
    params = init_params(config, 0)
    out = export(config, params, TOKENIZER, tmp_path / "out", max_shard_bytes=max_shard_bytes)
    imported_config, imported, tokenizer = reader.load(out)
    assert dataclasses.replace(imported_config, remat=config.remat) == config
    assert jax.tree.structure(imported) == jax.tree.structure(params)
    assert equal(imported, params)
    assert tokenizer.fingerprint == TOKENIZER.fingerprint


def test_shards_are_within_the_limit_and_indexed(params, tmp_path):
    out = export(MODEL, params, TOKENIZER, tmp_path / "out", max_shard_bytes=SHARD)
    index = json.loads((out / "model.safetensors.index.json").read_text())
    in_files, sizes = {}, {}
    for path in out.glob("*.safetensors"):
        with safe_open(path, "numpy") as file:
            sizes[path.name] = [file.get_tensor(name).nbytes for name in file.keys()]  # noqa: SIM118
            in_files |= dict.fromkeys(file.keys(), path.name)
    assert in_files == index["weight_map"]
    assert len(sizes) > 2
    assert all(sum(s) <= SHARD or len(s) == 1 for s in sizes.values())
    assert index["metadata"]["total_size"] == sum(map(sum, sizes.values()))


@pytest.mark.parametrize("max_shard_bytes", [10**9, SHARD], ids=["one file", "shards"])
def test_all_files_are_for_the_same_readers(max_shard_bytes, params, tmp_path):
    """A server runs as another user than who exported."""
    out = export(MODEL, params, TOKENIZER, tmp_path / "out", max_shard_bytes=max_shard_bytes)
    (tmp_path / "any").touch()
    assert {file.stat().st_mode for file in out.iterdir()} == {(tmp_path / "any").stat().st_mode}


def test_tied_models_are_written_untied(params, tmp_path):
    out = export(MODEL, params, TOKENIZER, tmp_path / "out")
    assert json.loads((out / "config.json").read_text())["tie_word_embeddings"] is False
    with safe_open(out / "model.safetensors", "numpy") as file:
        assert np.array_equal(file.get_tensor("lm_head.weight"), file.get_tensor("model.embed_tokens.weight"))


def test_transformers_finds_every_tensor_and_no_other(params, tmp_path):
    out = export(MODEL, params, TOKENIZER, tmp_path / "out")
    loaded: Any = transformers.AutoModelForCausalLM.from_pretrained(out, output_loading_info=True)
    _, info = loaded
    assert not any(info.values()), info


def test_the_tokenizer_loads_and_cuts_alike(params, tmp_path):
    out = export(MODEL, params, load_tokenizer("needle-bpe"), tmp_path / "out")
    theirs, ours = transformers.AutoTokenizer.from_pretrained(out), load_tokenizer("needle-bpe")
    for text in ("The pass key is 71432.\n", "żółć 🌍", "<|user|>hi<|eos|>", ""):
        ids = theirs.encode(text, add_special_tokens=False)
        assert ids == ours.encode(text)
        assert theirs.decode(ids, skip_special_tokens=True) == ours.decode(ids)
    generation = transformers.GenerationConfig.from_pretrained(out)
    assert (theirs.bos_token_id, theirs.eos_token_id) == (ours.bos_id, ours.eos_id)
    assert (generation.bos_token_id, generation.eos_token_id) == (ours.bos_id, ours.eos_id)


def test_transformers_stops_at_the_end_of_turn(params, tmp_path):
    tokenizer = chat_tokenizer("chatml")
    out = export(MODEL, params, tokenizer, tmp_path / "out")
    generation = transformers.GenerationConfig.from_pretrained(out)
    assert generation.eos_token_id == [tokenizer.eos_id, *tokenizer.encode("<|im_end|>")]
    assert json.loads((out / "config.json").read_text())["eos_token_id"] == tokenizer.eos_id
    plain = export(MODEL, params, TOKENIZER, tmp_path / "plain")
    assert json.loads((plain / "generation_config.json").read_text())["eos_token_id"] == TOKENIZER.eos_id


def test_the_layout_covers_the_parameter_tree():
    for config in (MODEL, UNTIED):
        leaves = {
            tuple(key.key for key in path): leaf
            for path, leaf in jax.tree_util.tree_leaves_with_path(abstract_params(config))
        }
        assert {t.path for t in tensors(config)} == leaves.keys()
        assert count_parameters(config) == sum(math.prod(leaf.shape) for leaf in leaves.values())


def test_parameters_on_a_mesh(params, tmp_path):
    single = contents(export(MODEL, params, TOKENIZER, tmp_path / "single" / "out"))
    with jax.set_mesh(mesh.make_mesh(MeshConfig())):
        sharded = jax.device_put(
            params, jax.tree.map(lambda x: x.sharding, mesh.with_concrete_shardings(abstract_params(MODEL)))
        )
        out = export(MODEL, sharded, TOKENIZER, tmp_path / "mesh" / "out")
        _, imported, _ = reader.load(out)
    assert contents(out) == single
    assert all(
        x.sharding == y.sharding for x, y in zip(jax.tree.leaves(imported), jax.tree.leaves(sharded), strict=True)
    )


@pytest.mark.parametrize(
    "yarn",
    [
        YarnConfig(factor=8.0, original_max_position_embeddings=64, mscale=mscale, mscale_all_dim=mscale_all_dim)
        for mscale in (None, 0.7, 1.0)
        for mscale_all_dim in (None, 0.7, 1.0)
    ],
    ids=lambda yarn: f"{yarn.mscale}-{yarn.mscale_all_dim}",
)
def test_yarn_means_the_same_to_deepseek_and_transformers(yarn):
    """Their readings of a lone mscale key differ, so none is written."""
    written = to_hf(dataclasses.replace(MODEL, rope_scaling=yarn), dtype="float32", special_ids={})["rope_parameters"]

    def m(scale):
        return 0.1 * scale * math.log(yarn.factor) + 1

    deepseek = m(written.get("mscale", 1)) / m(written.get("mscale_all_dim", 0))
    both = yarn.mscale and yarn.mscale_all_dim
    transformers_on_ours = m(yarn.mscale) / m(yarn.mscale_all_dim) if both else m(1)
    assert deepseek == pytest.approx(transformers_on_ours)
    assert written.get("mscale_all_dim") == yarn.mscale_all_dim
    assert ("mscale" in written) == ("mscale_all_dim" in written)


RESULTS = {
    "version": 1,
    "task": "passkey",
    "title": "Passkey retrieval",
    "description": "the key hidden; exact match",
    "model": {"step": 1200, "trained_lengths": [96, 256]},
    "provenance": {"date": "2025-01-01T00:00:00+00:00", "hardware": "2 CPU cores (x86_64)", "command": "evaluate me"},
    "cells": [{"length": 256, "depth": d, "n": 50, "correct": c} for d, c in ((0.0, 50), (1.0, 45))],
}


def test_the_card_states_what_was_measured(params, tmp_path):
    card = (
        export(MODEL, params, TOKENIZER, tmp_path / "out", results=[Results.from_json(RESULTS)]) / "README.md"
    ).read_text()
    assert "| 256 | correct | 100 | 95.0 % | 88.8 to 97.8 % |" in card
    assert "Trained at lengths up to 256.\nMeasured at step 1,200.\nMeasured on 2 CPU cores" in card
    assert "Command: `evaluate me`." in card
    assert "Not evaluated" not in card
    assert "rounded" not in card
    out = export(MODEL, params, TOKENIZER, tmp_path / "half", results=[Results.from_json(RESULTS)], dtype="bfloat16")
    assert "before the weights were rounded to bfloat16" in (out / "README.md").read_text()


def test_the_card_states_each_score_of_each_task_and_length(params, tmp_path):
    def cell(length, question, correct, other):
        scores = {"correct": correct, other: [1 - x for x in correct]}
        counts = {"n": len(correct), "correct": sum(correct), "scores": scores, "haystacks": [1, 1, 2, 2]}
        return {"length": length, "question": question, **counts}

    cells = [
        cell(1024, "absent", [1, 0, 1, 1], "hallucination"),
        cell(1024, "present", [0, 0, 0, 0], "false_refusal"),
        cell(2048, "absent", [1, 1, 1, 1], "hallucination"),
        cell(2048, "present", [1, 0, 1, 0], "false_refusal"),
    ]
    named = {"task": "hallucination", "title": "Hallucination", "description": "keys that are there", "cells": cells}
    both = [Results.from_json(RESULTS | named | {"version": 3, "config": {"cache_dtype": "int8"}})]
    both.append(Results.from_json(RESULTS))
    card = (export(MODEL, params, TOKENIZER, tmp_path / "out", results=both) / "README.md").read_text()
    assert card.index("### Hallucination\n") < card.index("### Passkey retrieval\n")
    rows = [line.split(" | ")[:4] for line in card.splitlines() if line.startswith("| ") and line.endswith(" % |")]
    assert rows[:-1] == [
        ["| 1,024", "correct", "8", "37.5 %"],
        ["| 1,024", "hallucination", "4", "25.0 %"],
        ["| 1,024", "false refusal", "4", "100 %"],
        ["| 2,048", "correct", "8", "75.0 %"],
        ["| 2,048", "hallucination", "4", "0 %"],
        ["| 2,048", "false refusal", "4", "50.0 %"],
        ["| all", "correct", "16", "56.2 %"],
        ["| all", "hallucination", "8", "12.5 %"],
        ["| all", "false refusal", "8", "75.0 %"],
    ]
    assert card.count("Measured with a KV cache of int8.") == 1


def test_the_card_invents_nothing(params, tmp_path):
    card = (export(MODEL, params, TOKENIZER, tmp_path / "out") / "README.md").read_text()
    assert "Not evaluated." in card
    assert "%" not in card


def broken(params, value):
    layers = dict(params["layers"])
    layers["mlp"] = {**layers["mlp"], "up_proj": layers["mlp"]["up_proj"].at[1, 2, 3].set(value)}
    return {**params, "layers": layers}


@pytest.mark.parametrize(
    ("value", "dtype", "message"),
    [
        (1e5, "float16", r"model\.layers\.1\.mlp\.up_proj\.weight reaches 1e\+05, too large for float16"),
        (-7e4, "float16", r"model\.layers\.1\.mlp\.up_proj\.weight reaches 7e\+04"),
        (3.4e38, "bfloat16", r"model\.layers\.1\.mlp\.up_proj\.weight reaches 3.4e\+38, too large for bfloat16"),
        (np.nan, "float32", r"model\.layers\.1\.mlp\.up_proj\.weight has values that are NaN"),
        (np.inf, "float32", r"model\.layers\.1\.mlp\.up_proj\.weight has values that are NaN or infinite"),
    ],
)
def test_values_that_do_not_fit(value, dtype, message, params, tmp_path):
    with pytest.raises(InputError, match=message):
        export(MODEL, broken(params, value), TOKENIZER, tmp_path / "out", dtype=dtype)
    assert not list(tmp_path.iterdir())


def test_what_hugging_face_cannot_express(params, tmp_path):
    with pytest.raises(InputError, match=r"rms_norm_eps=1e-05"):
        export(dataclasses.replace(MODEL, rms_norm_eps=1e-5), params, TOKENIZER, tmp_path / "out")
    with pytest.raises(InputError, match="tokens but model.vocab_size is 200"):
        export(dataclasses.replace(MODEL, vocab_size=200), params, TOKENIZER, tmp_path / "out")
    with pytest.raises(InputError, match="dtype must be one of"):
        export(MODEL, params, TOKENIZER, tmp_path / "out", dtype="int8")
    assert not list(tmp_path.iterdir())


def interrupt_second_shard(monkeypatch):
    def save_file(shard, path, **kwargs):
        if "00002" in path.name:
            raise KeyboardInterrupt
        path.write_bytes(b"half")

    monkeypatch.setattr(hf_export, "save_file", save_file)


def test_interrupted_export_leaves_nothing(params, tmp_path, monkeypatch):
    interrupt_second_shard(monkeypatch)
    with pytest.raises(KeyboardInterrupt):
        export(MODEL, params, TOKENIZER, tmp_path / "out", max_shard_bytes=SHARD)
    assert not list(tmp_path.iterdir())


def test_interrupted_overwrite_keeps_the_old_export(params, tmp_path, monkeypatch):
    out = export(MODEL, params, TOKENIZER, tmp_path / "out")
    before = contents(tmp_path)
    interrupt_second_shard(monkeypatch)
    with pytest.raises(KeyboardInterrupt):
        export(MODEL, params, TOKENIZER, out, max_shard_bytes=SHARD, overwrite=True)
    assert contents(tmp_path) == before


def test_full_disk_leaves_nothing(params, tmp_path):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (SHARD, hard))
    try:
        with pytest.raises(InputError, match="could not write .*out .*nothing was left behind"):
            export(MODEL, params, TOKENIZER, tmp_path / "out")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert not list(tmp_path.iterdir())


def test_existing_folders(params, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    export(MODEL, params, TOKENIZER, out)  # an empty folder is free
    before = contents(out)
    with pytest.raises(InputError, match="out exists; .* --overwrite"):
        export(MODEL, params, TOKENIZER, out)
    assert contents(out) == before
    export(MODEL, params, TOKENIZER, out, dtype="float16", overwrite=True)
    assert json.loads((out / "config.json").read_text())["dtype"] == "float16"
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_only_exports_are_overwritten(params, tmp_path):
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "thesis.tex").write_text("years of work")
    (tmp_path / "file").write_text("")
    for name in ("home", "file"):
        with pytest.raises(InputError, match="is not an export"):
            export(MODEL, params, TOKENIZER, tmp_path / name, overwrite=True)
    assert (tmp_path / "home" / "thesis.tex").read_text() == "years of work"


def test_a_stale_partial_folder_is_in_nobodys_way(params, tmp_path):
    (tmp_path / "out.partial").mkdir()
    (tmp_path / "out.partial" / "junk").write_text("")
    out = export(MODEL, params, TOKENIZER, tmp_path / "out")
    assert not (out / "junk").exists()
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_a_parent_that_cannot_be_made(params, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="could not write"):
        export(MODEL, params, TOKENIZER, tmp_path / "file" / "out")


def test_a_killed_export_leaves_nothing_that_looks_complete(tmp_path):
    """SIGKILL while the second shard is written: no folder of that name; the same call then works."""
    script = f"""
import os, signal, sys
sys.path.insert(0, {str(Path(__file__).parents[1])!r})
import numpy as np
from mla_jax.bridge.hf import export as hf_export
from mla_jax.data.tokenizer import load_tokenizer
from tiny import MODEL

def save_file(shard, path, **kwargs):
    if "00002" in path.name:
        os.kill(os.getpid(), signal.SIGKILL)
    path.write_bytes(b"half")

hf_export.save_file = save_file
hf_export._convert = lambda tensor, params, dtype, converted: None
hf_export.export(MODEL, {{}}, load_tokenizer("bytes"), {str(tmp_path / "out")!r}, max_shard_bytes={SHARD})
"""
    killed = subprocess.run([sys.executable, "-c", script], check=False)
    assert killed.returncode == -signal.SIGKILL
    assert [p.name for p in tmp_path.iterdir()] == ["out.partial"]
    export(MODEL, init_params(MODEL, 0), TOKENIZER, tmp_path / "out")
    assert [p.name for p in tmp_path.iterdir()] == ["out"]
    reader.load(tmp_path / "out")
