"""The two command lines."""

import json
import sys

import jax
import numpy as np
import pytest

from mla_jax.bridge.hf import reader, verify
from mla_jax.bridge.hf.export import export
from mla_jax.checkpoint.run_folder import load_run, save_imported
from mla_jax.data.tokenizer import load_tokenizer
from mla_jax.errors import UsageError
from mla_jax.model.transformer import init_params
from tiny import MODEL
from tools import export_hf, import_hf

TOKENIZER = load_tokenizer("bytes")


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory):
    return save_imported(tmp_path_factory.mktemp("runs") / "run", MODEL, init_params(MODEL, 0), TOKENIZER)


def test_export_import_export(call, run_dir, tmp_path):
    code, out, err = call(export_hf, run_dir, tmp_path / "first", "--max-shard-size", "20KB", "--verify")
    assert code == 0, err
    assert "prompts with the same 16 greedy tokens" in out
    assert len(list((tmp_path / "first").glob("model-*-of-*.safetensors"))) > 1

    code, out, err = call(import_hf, tmp_path / "first", tmp_path / "imported")
    assert code == 0, err
    assert f"{sum(x.size for x in jax.tree.leaves(load_run(run_dir).params)):,} parameters" in out

    code, _, err = call(export_hf, tmp_path / "imported", tmp_path / "second", "--max-shard-size", "20KB")
    assert code == 0, err
    for path in (tmp_path / "first").iterdir():
        if path.name != "README.md":
            assert path.read_bytes() == (tmp_path / "second" / path.name).read_bytes()


def test_the_card_takes_the_results_of_this_step(call, run_dir, tmp_path):
    (run_dir / "eval").mkdir()
    results = run_dir / "eval" / "passkey.json"
    cells = [{"length": 128, "depth": 0.5, "n": 10, "correct": 7}]
    try:
        results.write_text(json.dumps({"model": {"step": 0}, "cells": cells}))
        assert call(export_hf, run_dir, tmp_path / "this step")[0] == 0
        assert "| 128 | correct | 10 | 70.0 % |" in (tmp_path / "this step" / "README.md").read_text()

        results.write_text(json.dumps({"model": {"step": 5}, "cells": cells}))
        code, out, _ = call(export_hf, run_dir, tmp_path / "another step")
        assert code == 0
        assert "the passkey results are of step 5, not 0" in out
        assert "Not evaluated." in (tmp_path / "another step" / "README.md").read_text()

        for content in ("{", '{"cells": []}', '{"task": "passkey"}'):
            results.write_text(content)
            code, _, err = call(export_hf, run_dir, tmp_path / "unreadable")
            assert code == 1
            assert "passkey.json cannot be read" in err
    finally:
        results.unlink()


def test_a_disagreement_is_an_error(call, run_dir, tmp_path, monkeypatch):
    wrong = verify.Verification((2, 128), logit_difference=2e-4, prompts=3, same_ids=3, same_tokens=3)
    monkeypatch.setattr(verify, "verify", lambda *_, **__: wrong)
    code, out, err = call(export_hf, run_dir, tmp_path / "out", "--verify")
    assert code == 1
    assert "2.0e-04" in out
    assert "does not agree with transformers" in err


def test_scaled_queries_are_what_is_exported_and_verified(call, run_dir, tmp_path):
    code, out, err = call(export_hf, run_dir, tmp_path / "sharper", "--query-scale", "1.5", "--verify")
    assert code == 0, err
    assert "prompts with the same 16 greedy tokens" in out
    queries = reader.load(tmp_path / "sharper")[1]["layers"]["self_attn"]["q_proj"]
    np.testing.assert_allclose(queries, 1.5 * load_run(run_dir).params["layers"]["self_attn"]["q_proj"], rtol=1e-6)


@pytest.mark.parametrize("factor", ["0", "-1", "nan", "inf", "a"])
def test_factors_that_are_none(call, run_dir, tmp_path, factor):
    code, _, err = call(export_hf, run_dir, tmp_path / "out", f"--query-scale={factor}")
    assert code == 2
    assert "is no positive number" in err


def test_verify_without_transformers(call, run_dir, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(UsageError, match="hf"):
        verify.import_transformers()
    code, _, err = call(export_hf, run_dir, tmp_path / "out", "--verify")
    assert code == 2
    assert 'pip install "infinitecontext[hf]"' in err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("size", ["4XB", "", "-1GB", "0", "GB"])
def test_sizes_that_are_none(call, run_dir, tmp_path, size):
    code, _, err = call(export_hf, run_dir, tmp_path / "out", f"--max-shard-size={size}")
    assert code == 2
    assert "is no size" in err


@pytest.mark.parametrize(("text", "size"), [("4GB", 4 * 10**9), ("1.5 MiB", 3 * 2**19), ("500k", 500_000), ("7", 7)])
def test_sizes(text, size):
    assert export_hf.parse_size(text) == size


def one_error(code, err):
    return code == 1 and err.startswith("error: ") and err.count("\n") == 1


def test_errors_are_one_line(call, run_dir, tmp_path):
    assert one_error(*call(export_hf, tmp_path / "none", tmp_path / "out")[::2])
    assert one_error(*call(export_hf, run_dir, run_dir)[::2])
    assert one_error(*call(export_hf, run_dir, run_dir, "--overwrite")[::2])
    assert one_error(*call(import_hf, tmp_path / "none", tmp_path / "run")[::2])
    export(MODEL, init_params(MODEL, 0), TOKENIZER, tmp_path / "out")
    code, _, err = call(import_hf, tmp_path / "out", run_dir)
    assert one_error(code, err)
    assert "exists; choose another folder" in err
    load_run(run_dir)
