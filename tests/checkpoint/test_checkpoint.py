"""Run folders: what cannot be read is named, what was saved is never lost."""

import dataclasses
import errno
import json
import math
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from omegaconf import OmegaConf

from mla_jax.checkpoint import manager
from mla_jax.checkpoint.manager import Checkpoints
from mla_jax.checkpoint.manifest import find_corruption
from mla_jax.checkpoint.run_folder import load_run, save_imported
from mla_jax.config import MeshConfig, OptimConfig, StageConfig, TrainConfig
from mla_jax.data.tokenizer import load_tokenizer
from mla_jax.errors import InputError
from mla_jax.mesh import make_mesh
from mla_jax.model.transformer import init_params
from mla_jax.state import TrainState
from mla_jax.training import loop
from tiny import MODEL, make_config, train


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


@pytest.mark.parametrize("name", ["br[1]", "a*b", "a?b", "back\\slash", "no\udcffutf8"])
def test_a_path_that_the_storage_library_misreads_is_refused_before_the_first_step(tmp_path, name):
    with pytest.raises(InputError, match="checkpoints cannot be kept in"):
        train(make_config(tmp_path / name / "run", [{"seq_len": 96, "steps": 1}]))
    with pytest.raises(InputError, match="checkpoints cannot be kept in"):
        save_imported(tmp_path / name, MODEL, init_params(MODEL, 0), load_tokenizer("needle-bpe"))
    assert list(tmp_path.iterdir()) == []


def test_any_other_path_works(tmp_path):
    config = make_config(tmp_path / "ü {x}] = 'a',\"b\" #%20$HOME;~!&()<>|\n\u3000", [{"seq_len": 96, "steps": 1}])
    assert train(config).step == 1 and load_run(config.run_dir).step == 1
    assert train(make_config(Path(config.run_dir), [{"seq_len": 96, "steps": 2}])).step == 2


def test_a_run_that_was_moved_to_such_a_path_can_be_read(run_dir, tmp_path, finished):
    moved = run_dir.rename(tmp_path / "br[1]")
    jax.tree.map(np.testing.assert_array_equal, *(jax.device_get(load_run(r).params) for r in (moved, finished)))


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
    assert steps_in(run_dir) == ["1", "2.orbax-checkpoint-tmp"]  # it may be under way


def flip(path: Path, at: int = 0) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)


CORRUPTIONS = {
    "a flipped byte": (lambda path: flip(path, path.stat().st_size // 2), "is not what was written"),
    "half a file": (lambda path: path.write_bytes(path.read_bytes()[: path.stat().st_size // 2]), "bytes instead of"),
    "no file": (lambda path: path.unlink(), "is missing"),
}


def largest(step: Path, item: str) -> Path:
    return max((p for p in (step / item).rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)


@pytest.mark.parametrize("kind", CORRUPTIONS)
def test_reading_passes_over_a_corrupt_checkpoint_and_leaves_it(run_dir, kind, capsys):
    harm, reason = CORRUPTIONS[kind]
    harm(largest(run_dir / "checkpoints" / "2", "params"))
    assert load_run(run_dir).step == 1
    warnings = capsys.readouterr().err.splitlines()
    assert len(warnings) == 1 and warnings[0].startswith("warning: checkpoint")
    assert "checkpoints/2 is corrupt" in warnings[0] and reason in warnings[0] and "using step 1" in warnings[0]
    assert steps_in(run_dir) == ["1", "2"]
    with pytest.raises(InputError, match=r"none to use instead \(step 2: .* ask for another step"):
        load_run(run_dir, "2")


def test_training_quarantines_corrupt_checkpoints_and_makes_them_again(run_dir, finished, capsys):
    config = make_config(run_dir, [{"seq_len": 96, "steps": 2}], checkpoint_every=1)
    for quarantined in ("2.corrupt", "2.corrupt.1"):
        flip(largest(run_dir / "checkpoints" / "2", "optimizer"))
        assert train(config).step == 2
        assert f"now {quarantined}; using step 1" in capsys.readouterr().err
        jax.tree.map(np.testing.assert_array_equal, *(jax.device_get(load_run(r).params) for r in (run_dir, finished)))
    assert steps_in(run_dir) == ["1", "2", "2.corrupt", "2.corrupt.1"]


def test_no_usable_checkpoint_is_an_error_that_names_all_and_renames_none(run_dir):
    (run_dir / "checkpoints" / "1" / "manifest.json").unlink()
    flip(run_dir / "checkpoints" / "2" / "position" / "metadata")
    for use in (load_run, lambda path: train(make_config(path, [{"seq_len": 96, "steps": 2}]))):
        with pytest.raises(InputError, match=r"\(step 1: manifest.json is missing; step 2: position/metadata is not"):
            use(run_dir)
    assert steps_in(run_dir) == ["1", "2"]


def test_an_older_checkpoint_with_broken_metrics_does_not_stop_training(run_dir, capsys):
    (run_dir / "checkpoints" / "1" / "metrics" / "metrics").write_text("{")
    assert train(make_config(run_dir, [{"seq_len": 96, "steps": 2}])).finished
    assert "checkpoints/1 is corrupt (metrics/metrics has 1 bytes" in capsys.readouterr().err
    assert steps_in(run_dir) == ["1.corrupt", "2"]


def test_nothing_of_the_optimizer_is_read_for_the_parameters(run_dir, finished):
    shutil.rmtree(run_dir / "checkpoints" / "2" / "optimizer")
    run = load_run(run_dir)
    assert run.step == 2
    jax.tree.map(np.testing.assert_array_equal, *(jax.device_get(r.params) for r in (run, load_run(finished))))


def test_another_optimizer_is_not_taken_for_corruption(run_dir):
    config = make_config(run_dir, [{"seq_len": 96, "steps": 3}], optim=OptimConfig(name="muon"))
    with pytest.raises(InputError, match=r"checkpoints/2 cannot be read .* use the model, the optim"):
        train(config)
    assert steps_in(run_dir) == ["1", "2"]


def test_a_step_can_be_chosen(run_dir):
    assert load_run(run_dir, "1").step == 1
    metrics = [run_dir / "checkpoints" / step / "metrics" / "metrics" for step in "12"]
    one, two = (json.loads(path.read_bytes())["answer_accuracy"] for path in metrics)
    assert load_run(run_dir, "best").step == (1 if one > two else 2)
    with pytest.raises(InputError, match="has no checkpoint 7, but 1, 2"):
        load_run(run_dir, "7")


def steps_in(run_dir: Path) -> list[str]:
    return sorted(p.name for p in (run_dir / "checkpoints").iterdir())


def save_with_metrics(run_dir: Path, values: dict[int, tuple[int, float, float]], **keep) -> list[str]:
    """Saves a step for each (stage, answer_accuracy, loss); returns the steps that were kept."""
    checkpoints = Checkpoints(run_dir, TrainConfig(stages=STAGES, **keep))
    state = TrainState(jnp.int32(0), {"w": jnp.arange(8.0)}, ())
    for step, (stage, accuracy, loss) in values.items():
        metrics = {"stage": stage, "answer_accuracy": accuracy, "loss": loss}
        checkpoints.save(step, state, {"tokenizer": ""}, metrics)
    checkpoints.wait()
    checkpoints.close()
    return steps_in(run_dir)


STAGES = [StageConfig(seq_len=96, batch_size=8, steps=1, learning_rate=1.0)]
MEASURED = {1: (0, 0.9, 3.0), 2: (0, 0.5, 1.0), 3: (0, 0.8, 2.0), 4: (0, 0.1, 9.0)}


@pytest.mark.parametrize(
    ("keep", "kept", "best"),
    [
        ({"keep_last": 1, "keep_best": 0}, ["4"], 4),
        ({"keep_last": 1, "keep_best": 1}, ["1", "4"], 1),
        ({"keep_last": 2, "keep_best": 2}, ["1", "3", "4"], 1),
        ({"keep_last": 1, "keep_best": 1, "best_metric": "loss"}, ["2", "4"], 2),
    ],
)
def test_the_newest_and_the_best_are_kept(tmp_path, keep, kept, best):
    assert save_with_metrics(tmp_path, MEASURED, **keep) == kept
    checkpoints = Checkpoints(tmp_path)
    assert checkpoints.choose("best", keep.get("best_metric", "answer_accuracy")) == best
    assert checkpoints.choose("latest", "loss") == 4
    checkpoints.close()


@pytest.mark.parametrize("metric", ["answer_accuracy", "loss"])
def test_a_checkpoint_of_a_window_in_which_nothing_was_learned_is_never_the_best(tmp_path, metric):
    measured = {1: (0, 0.5, 3.0), 2: (0, 0.4, 4.0), 3: (0, math.nan, math.nan), 4: (1, math.nan, math.nan)}
    assert save_with_metrics(tmp_path, measured, keep_last=1, best_metric=metric) == ["1", "4"]
    checkpoints = Checkpoints(tmp_path)
    assert checkpoints.choose("best", metric) == 1
    checkpoints.close()


def test_a_manifest_that_cannot_be_written_fails_the_save(tmp_path, monkeypatch):
    def full(folder, known):
        raise OSError(errno.ENOSPC, "No space left on device")

    save_with_metrics(tmp_path, {1: MEASURED[1]})
    monkeypatch.setattr(manager, "write_manifest", full)
    with pytest.raises(InputError, match=r"No space left on device.*the last complete checkpoint is step 1"):
        save_with_metrics(tmp_path, {2: MEASURED[2]})
    monkeypatch.undo()
    assert save_with_metrics(tmp_path, {2: MEASURED[2]}) == ["1", "2"]


def test_the_best_survives_reopening_and_gives_way_to_a_later_stage(tmp_path):
    keep = {"keep_last": 1, "keep_best": 1}
    save_with_metrics(tmp_path, MEASURED, **keep)
    assert save_with_metrics(tmp_path, {5: (0, 0.2, 1.0)}, **keep) == ["1", "5"]
    assert save_with_metrics(tmp_path, {6: (1, 0.3, 1.0), 7: (1, 0.1, 1.0)}, **keep) == ["6", "7"]


def test_a_corrupt_best_gives_way_to_the_next_best(tmp_path, capsys):
    save_with_metrics(tmp_path, MEASURED, keep_last=4)
    flip(tmp_path / "checkpoints" / "1" / "position" / "metadata")
    checkpoints = Checkpoints(tmp_path)
    assert checkpoints.choose("best", "answer_accuracy") == 3
    checkpoints.close()
    assert "checkpoints/1 is corrupt" in capsys.readouterr().err


def test_other_meshes_go_on_with_equal_numbers_and_losses(tmp_path, monkeypatch):
    whole = train_in_parts(tmp_path / "whole", [{"data": 2, "fsdp": 4}] * 4, monkeypatch, parts=[4])
    meshes = [{"data": 2, "fsdp": 4}, {"data": 4, "fsdp": 2}, {"data": 1, "fsdp": 8}, {"data": 1, "fsdp": 1}]
    parts = train_in_parts(tmp_path / "parts", meshes, monkeypatch, parts=[1, 2, 3, 4])
    assert len(set(whole)) == 4
    np.testing.assert_allclose(parts, whole, rtol=1e-5)


def train_in_parts(run_dir: Path, meshes: list[dict], monkeypatch, parts: list[int]) -> list[float]:
    """Trains until each number of steps on the next mesh; returns the loss of every step."""
    optim = OptimConfig(name="adamw", schedule="constant")
    keep = {"checkpoint_every": 1, "log_every": 1, "keep_last": 9, "optim": optim}
    restored = []
    restore_state = Checkpoints.restore_state

    def spied(self, step, abstract):
        state, position = restore_state(self, step, abstract)
        for array, wanted in zip(jax.tree.leaves(state), jax.tree.leaves(abstract), strict=True):
            assert array.sharding == wanted.sharding and array.dtype == wanted.dtype
        restored.append(jax.device_get(state))
        return state, position

    monkeypatch.setattr(Checkpoints, "restore_state", spied)
    for steps, sizes in zip(parts, meshes, strict=False):
        devices = jax.devices()[: sizes["data"] * sizes["fsdp"]]
        monkeypatch.setattr(loop, "make_mesh", lambda _, s=sizes, d=devices: make_mesh(MeshConfig(**s), d))
        before = jax.device_get(load_run(run_dir).params) if restored or steps > parts[0] else None
        train(make_config(run_dir, [{"seq_len": 96, "steps": steps}], **keep))
        if before is not None:
            jax.tree.map(np.testing.assert_array_equal, restored[-1].params, before)
    metrics = [run_dir / "checkpoints" / str(step) / "metrics" / "metrics" for step in range(1, parts[-1] + 1)]
    return [json.loads(path.read_bytes())["loss"] for path in metrics]


def test_a_run_is_ranked_by_its_last_whole_window(run_dir):
    """log_every=3 and 2 steps: the stage's end closes the window, so step 2 has both steps, step 1 only its own."""
    steps = run_dir / "checkpoints"
    one, two = (json.loads((steps / step / "metrics" / "metrics").read_bytes()) for step in "12")
    assert one["stage"] == two["stage"] == 0 and two["loss"] < one["loss"] < 7
    assert json.loads((steps / "2" / "position" / "metadata").read_bytes())["reported"] == two


@pytest.mark.parametrize("kind", CORRUPTIONS)
def test_corruption_of_any_file_of_a_checkpoint_is_noticed(finished, tmp_path, kind):
    whole = finished / "checkpoints" / "2"
    assert find_corruption(whole) is None
    beside = ("_CHECKPOINT_METADATA", "commit_success.txt", "manifest.json")
    names = [p.relative_to(whole) for p in whole.rglob("*") if p.is_file() and p.name not in beside]
    assert len(names) > 10
    harm, reason = CORRUPTIONS[kind]
    for name in names:
        copy = shutil.copytree(whole, tmp_path / "2")
        harm(copy / name)
        assert f"{name} " in (find_corruption(copy) or "") and reason in (find_corruption(copy) or ""), name
        shutil.rmtree(copy)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (None, "manifest.json is missing"),
        (b"", "manifest.json cannot be read"),
        (b"[]", "manifest.json cannot be read"),
        (b'{"files": {"a": 1}}', "manifest.json cannot be read"),
        (b"\xff", "manifest.json cannot be read"),
    ],
)
def test_a_checkpoint_without_its_manifest_is_not_trusted(run_dir, content, reason):
    path = run_dir / "checkpoints" / "2" / "manifest.json"
    path.unlink() if content is None else path.write_bytes(content)
    assert reason in (find_corruption(path.parent) or "")


def test_what_orbax_keeps_beside_the_items_does_not_matter(run_dir, finished):
    (run_dir / "checkpoints" / "2" / "_CHECKPOINT_METADATA").write_bytes(b"{")
    (run_dir / "checkpoints" / "2" / "commit_success.txt").unlink()
    run = load_run(run_dir)
    assert run.step == 2
    jax.tree.map(np.testing.assert_array_equal, *(jax.device_get(r.params) for r in (run, load_run(finished))))


def test_a_foreign_tokenizer_is_named(run_dir):
    shutil.rmtree(run_dir / "tokenizer")
    load_tokenizer("bytes").save(run_dir / "tokenizer")
    with pytest.raises(InputError, match="not the tokenizer that checkpoint 2 was trained with"):
        load_run(run_dir)


def test_a_config_with_a_key_of_an_earlier_version_loads_and_resumes(run_dir):
    """Configs had `optim.muon_momentum` up to b748e46."""
    path = run_dir / "config.yaml"
    config = OmegaConf.load(path)
    config.optim["muon_momentum"] = 0.95
    OmegaConf.save(config, path)
    assert load_run(run_dir).step == 2
    assert train(make_config(run_dir, [{"seq_len": 96, "steps": 3}], checkpoint_every=1)).step == 3
    assert "muon_momentum" not in OmegaConf.load(path).optim


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
