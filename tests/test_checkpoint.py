"""Run folders: what cannot be read is named, what was saved is never lost."""

import dataclasses
import shutil

import jax
import numpy as np
import pytest

from mla_jax.checkpoint import load_run, save_imported
from mla_jax.config import MeshConfig
from mla_jax.data.tokenizer import load_tokenizer
from mla_jax.errors import InputError
from mla_jax.mesh import make_mesh
from mla_jax.model.transformer import init_params
from mla_jax.train import train
from tiny import MODEL, make_config


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    run_dir = tmp_path_factory.mktemp("runs") / "run"
    train(make_config(run_dir, [{"seq_len": 96, "steps": 2}], checkpoint_every=1))
    return run_dir


@pytest.fixture
def run_dir(finished, tmp_path):
    return shutil.copytree(finished, tmp_path / "run")


def test_a_run_loads_alike_with_and_without_a_mesh(run_dir):
    plain = jax.device_get(load_run(run_dir).params)
    with jax.set_mesh(make_mesh(MeshConfig(data=2))):
        sharded = load_run(run_dir).params
    assert any(len(x.sharding.device_set) == 8 for x in jax.tree.leaves(sharded))
    jax.tree.map(np.testing.assert_array_equal, plain, jax.device_get(sharded))


def test_what_is_no_run_is_named(tmp_path):
    with pytest.raises(InputError, match="is not a run folder"):
        load_run(tmp_path / "nothing")


def test_a_run_without_a_checkpoint_is_named(run_dir):
    shutil.rmtree(run_dir / "checkpoints")
    with pytest.raises(InputError, match="no checkpoint"):
        load_run(run_dir)


def test_an_unfinished_save_is_not_a_checkpoint(run_dir):
    shutil.move(run_dir / "checkpoints" / "2", run_dir / "checkpoints" / "2.orbax-checkpoint-tmp")
    assert load_run(run_dir).step == 1


@pytest.mark.parametrize("damage", ["truncate", "delete"])
def test_a_damaged_checkpoint_is_named_and_the_way_back_given(run_dir, damage):
    newest = run_dir / "checkpoints" / "2"
    files = [p for p in newest.rglob("*") if p.is_file() and "state" in p.parts]
    for path in files:
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2]) if damage == "truncate" else path.unlink()
    with pytest.raises(InputError, match=r"checkpoints/2 cannot be read .* delete that folder to go on from step 1"):
        load_run(run_dir)
    with pytest.raises(InputError, match="cannot be read"):
        train(make_config(run_dir, [{"seq_len": 96, "steps": 2}], checkpoint_every=1))
    shutil.rmtree(newest)
    assert load_run(run_dir).step == 1


def test_a_foreign_tokenizer_is_named(run_dir):
    shutil.rmtree(run_dir / "tokenizer")
    load_tokenizer("bytes").save(run_dir / "tokenizer")
    with pytest.raises(InputError, match="not the tokenizer that checkpoint 2 was trained with"):
        load_run(run_dir)


def test_a_broken_config_is_named(run_dir):
    (run_dir / "config.yaml").write_text("model: [")
    with pytest.raises(InputError, match="config.yaml cannot be read"):
        load_run(run_dir)


def test_an_imported_model_is_a_run_to_evaluate_and_start_from_but_not_to_resume(tmp_path):
    params, tokenizer = init_params(MODEL, 0), load_tokenizer("needle-bpe")
    imported = save_imported(tmp_path / "imported", MODEL, params, tokenizer)
    run = load_run(imported)
    assert run.model == MODEL and run.step == 0 and run.trained_lengths == ()
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(run.params), jax.device_get(params))
    with pytest.raises(InputError, match="exists"):
        save_imported(imported, MODEL, params, tokenizer)
    with pytest.raises(InputError, match="init_from"):
        train(make_config(imported, [{"seq_len": 96, "steps": 1}]))
    assert train(make_config(tmp_path / "new", [{"seq_len": 96, "steps": 1}], init_from=str(imported))).finished


def test_a_tokenizer_larger_than_the_model_is_refused_and_leaves_nothing(tmp_path):
    small = dataclasses.replace(MODEL, vocab_size=100)
    with pytest.raises(InputError, match=r"set model.vocab_size="):
        save_imported(tmp_path / "run", small, init_params(small, 0), load_tokenizer("bytes"))
    assert list(tmp_path.iterdir()) == []
