"""The training loop with another loss and another pipeline, and the loop state that earlier versions saved."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mla_jax.checkpoint.manifest import write_manifest
from mla_jax.checkpoint.run_folder import load_run
from mla_jax.config import MeshConfig, OptimConfig
from mla_jax.errors import UsageError
from mla_jax.losses.cross_entropy import CrossEntropy
from mla_jax.model.branches import branch_region
from mla_jax.observability.metrics import Window
from mla_jax.training import loop
from other_loss import MeanSquare, sevens
from tiny import DATA, make_config, train


def test_a_run_may_have_a_loss_and_a_pipeline_of_its_own(tmp_path, capsys):
    stages = [{"steps": 30, "accuracy": 0.99}, {"steps": 3}]
    stages = [{"seq_len": 96, "batch_size": 16} | stage for stage in stages]
    results = {}
    for parts in (1, 2):
        config = make_config(tmp_path / f"by-{parts}", stages, data=DATA, grad_accumulation=parts, best_metric="loss")
        results[parts] = loop.train(config, MeanSquare(), sevens)
    one = results[1]
    assert one.finished and 3 + 3 <= one.step < 30 + 3  # the first stage ended at its threshold
    assert one.metrics is not None and list(one.metrics)[:5] == ["loss", "small", "seen", "grad_norm", "skipped_steps"]
    assert one.accuracy_metric == "small" and one.metrics["small"] == 1 and one.metrics["loss"] < 0.9
    assert results[2].metrics is not None and abs(results[2].metrics["loss"] - one.metrics["loss"]) < 1e-3
    out = capsys.readouterr().out
    assert "squared " in out and "answers" not in out
    # A total goes on over windows and stages; a warning is printed once, until a window gives no reason for it.
    assert one.metrics["seen"] == 16 * one.step
    assert out.count("it falls") == 2 and "warning: step 6: it falls" in out  # in two runs


class LastPositions(MeanSquare):
    """`seen` is the sum of the positions in the branch region."""

    branch_tokens = 8

    def sums(self, transformer, rows):
        last = branch_region(rows["positions"], self.branch_tokens)
        return super().sums(transformer, rows) | {"seen": jnp.sum(last, dtype=jnp.float32)}


def test_the_branch_region_of_a_loss_is_the_end_of_each_row_on_every_mesh(tmp_path):
    """Eight rows of the positions 0 to 95, of which the last 8 belong to branches."""
    on_mesh = MeshConfig(data=1, fsdp=4, context=2)
    options = {"best_metric": "loss", "checkpoint_every": 10, "log_every": 1}
    config = make_config(tmp_path / "run", [{"seq_len": 96, "steps": 1}], **options)
    result = loop.train(dataclasses.replace(config, mesh=on_mesh), LastPositions(), sevens)
    assert result.metrics is not None and result.metrics["seen"] == 8 * sum(range(88, 96))
    config = make_config(tmp_path / "odd", [{"seq_len": 95, "steps": 1}], **options)
    loss = LastPositions()
    loss.branch_tokens = 7
    with pytest.raises(UsageError, match=r"data\.branch_tokens 7 is no multiple of mesh\.context=2"):
        loop.train(dataclasses.replace(config, mesh=on_mesh), loss, sevens)


def test_the_best_metric_must_be_one_of_the_loss(tmp_path):
    with pytest.raises(UsageError, match=r"train\.best_metric must be one of loss, small, seen; got 'answer_accuracy'"):
        loop.train(make_config(tmp_path / "run"), MeanSquare(), sevens)
    assert not (tmp_path / "run").exists()


SAVED = json.loads(
    '{"step": 4, "stage": 0, "stage_step": 4, "window": {"steps": 1, "loss": 123.5, "weight": 20.25, "correct": 1.0, '
    '"answers": 16.0, "grad_norm": 3.25, "skipped": 0.0}, "reported": {"stage": 0, "loss": 5.5, "answer_accuracy": '
    '0.0125, "grad_norm": 3.5, "skipped_steps": 0.0}, "data": {"next_batch": 4}, "tokenizer": "5805f2"}'
)
"""A file `position/metadata` as version b748e46 wrote it."""


def test_the_loop_state_of_an_earlier_version_is_read():
    state = loop.LoopState.from_json(SAVED)
    assert (state.step, state.stage, state.stage_step) == (4, 0, 4) and state.reported == SAVED["reported"]
    assert state.window.steps == 1 and state.window.sums["answers"] == 16.0
    expected = {"loss": 123.5 / 20.25, "answer_accuracy": 1 / 16, "grad_norm": 3.25, "skipped_steps": 0.0}
    assert state.window.means(CrossEntropy(64)) == expected
    assert (state.best, state.waited) == (None, 0)
    kept = {key: SAVED[key] for key in ("step", "stage", "stage_step", "window", "reported")}
    assert state.to_json() == kept | {"best": None, "waited": 0}


def test_means_of_a_window_in_which_nothing_was_learned_are_nan():
    """Without steps, with skipped steps only, with steps but no learned token."""
    zeros = dict.fromkeys(("loss", "weight", "correct", "answers", "grad_norm", "skipped"), 0.0)
    for window in (Window(), Window.from_json({"steps": 0, **zeros}), Window.from_json(Window().to_json())):
        means = window.means(CrossEntropy(64))
        assert means.pop("skipped_steps") == 0 and np.isnan(list(means.values())).all()
    means = Window.from_json({"steps": 2, **zeros, "skipped": 2.0}).means(CrossEntropy(64))
    assert means.pop("skipped_steps") == 2 and np.isnan(list(means.values())).all()
    means = Window.from_json({"steps": 2, **zeros}).means(CrossEntropy(64))
    assert means["grad_norm"] == 0 and np.isnan([means["loss"], means["answer_accuracy"]]).all()
    assert CrossEntropy(64).progress(means) == "loss nan  answers nan%"


def test_a_run_of_an_earlier_version_goes_on(tmp_path):
    """Steps 1 to 4 of 6, with the state of step 4 rewritten as b748e46 wrote it, zero sums spelled out."""
    optim = OptimConfig(name="adamw", schedule="constant")
    whole, first, run = (
        make_config(tmp_path / name, [{"seq_len": 96, "steps": steps}], optim=optim)
        for name, steps in (("whole", 6), ("run", 4), ("run", 6))
    )
    train(whole)
    train(first)
    folder = tmp_path / "run" / "checkpoints" / "4"
    saved = json.loads((folder / "position" / "metadata").read_text())
    assert saved.pop("best") is None and saved.pop("waited") == 0  # validation came later
    assert saved.pop("data_settings") and saved["data"].pop("order") == {}  # and what the batches depend on
    assert saved["data"] == SAVED["data"]
    assert saved.keys() == SAVED.keys() and saved["window"].keys() <= SAVED["window"].keys()
    zeros = {name: 0.0 for name in SAVED["window"]}
    saved["window"] = zeros | saved["window"]
    (folder / "position" / "metadata").write_text(json.dumps(saved))
    (folder / "manifest.json").unlink()
    write_manifest(folder)
    assert train(run).step == 6
    params = (jax.device_get(load_run(tmp_path / name).params) for name in ("whole", "run"))
    jax.tree.map(np.testing.assert_array_equal, *params)
