"""The training loop on a tiny model: resuming, stages, stopping, failing."""

import dataclasses
import shutil
import signal
import subprocess
import sys
from collections import namedtuple
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mla_jax.checkpoint.manager import Checkpoints
from mla_jax.checkpoint.run_folder import load_run, save_imported
from mla_jax.config import OptimConfig, YarnConfig
from mla_jax.data.tokenizer import load_tokenizer
from mla_jax.errors import InputError, UsageError
from mla_jax.losses.cross_entropy import CrossEntropy
from mla_jax.model.transformer import init_params
from mla_jax.optim import make_optimizer
from mla_jax.state import init_state
from mla_jax.training.step import make_train_step
from tiny import DATA, MODEL, assert_equal, interrupt_at, make_config, params_of, train


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory) -> dict:
    run_dir = tmp_path_factory.mktemp("runs") / "whole"
    assert train(make_config(run_dir)).step == 11
    return params_of(run_dir)


@pytest.mark.parametrize("step", [5, *(pytest.param(n, marks=pytest.mark.integration) for n in (1, 3, 8, 10))])
def test_a_run_interrupted_and_resumed_equals_the_uninterrupted_one(step, uninterrupted, tmp_path, monkeypatch):
    config = make_config(tmp_path / "run")
    with monkeypatch.context() as patch:
        interrupt_at(patch, step)
        result = train(config)
    assert not result.finished and result.step == step
    assert load_run(tmp_path / "run").step == step
    assert train(config).finished
    assert_equal(params_of(tmp_path / "run"), uninterrupted)


def test_a_run_killed_between_checkpoints_goes_on_from_the_last(uninterrupted, tmp_path, monkeypatch):
    config = make_config(tmp_path / "run")
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
    with monkeypatch.context() as patch:
        interrupt_at(patch, 6)
        patch.setattr(signal, "signal", lambda *_: None)  # so SIGINT acts as a crash would
        with pytest.raises(KeyboardInterrupt):
            train(config)
    assert load_run(tmp_path / "run").step == 4
    assert train(config).finished
    assert_equal(params_of(tmp_path / "run"), uninterrupted)


def test_a_stage_ends_early_at_its_accuracy_and_resumes_alike(tmp_path, monkeypatch):
    stages = [{"seq_len": 96, "steps": 50, "accuracy": 0.0}, {"seq_len": 128, "steps": 4}]
    whole = train(make_config(tmp_path / "whole", stages))
    assert whole.step == 3 + 4  # the first window of log_every=3 steps reaches 0 %
    config = make_config(tmp_path / "run", stages)
    with monkeypatch.context() as patch:
        interrupt_at(patch, 2)
        train(config)
    assert train(config).step == 7
    assert_equal(params_of(tmp_path / "run"), params_of(tmp_path / "whole"))


def test_trained_lengths_are_those_of_the_stages_that_were_reached(tmp_path, monkeypatch):
    """Interrupted in the first stage, at its end (the second has begun without a step), and in the second."""
    stages = [{"seq_len": 96, "steps": 3}, {"seq_len": 128, "steps": 3}, {"seq_len": 160, "steps": 2}]
    config = make_config(tmp_path / "run", stages, keep_last=9)
    for served, step in ((2, 2), (1, 3), (1, 4)):
        with monkeypatch.context() as patch:
            interrupt_at(patch, served)
            assert train(config).step == step
    assert train(config).finished
    lengths = {step: load_run(tmp_path / "run", str(step)).trained_lengths for step in (2, 3, 4, 8)}
    assert lengths == {2: (96,), 3: (96,), 4: (96, 128), 8: (96, 128, 160)}


def test_a_finished_run_stays_as_it_is(tmp_path):
    config = make_config(tmp_path / "run", [{"seq_len": 96, "steps": 2}])
    train(config)
    before = params_of(tmp_path / "run")
    assert train(config).step == 2
    assert_equal(params_of(tmp_path / "run"), before)


def test_accumulated_steps_equal_whole_batches(tmp_path):
    stages = [{"seq_len": 96, "steps": 2, "batch_size": 16}]
    for parts in (1, 2):
        data = dataclasses.replace(DATA, lm_loss_weight=0.3)
        train(make_config(tmp_path / f"by-{parts}", stages, grad_accumulation=parts, data=data))
    one, two = params_of(tmp_path / "by-1"), params_of(tmp_path / "by-2")
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-5), one, two)


def test_muon_trains_on_sharded_weights(tmp_path):
    config = make_config(tmp_path / "run", [{"seq_len": 96, "steps": 2}], optim=OptimConfig(name="muon"))
    assert train(config).finished


def test_training_starts_from_another_runs_parameters(tmp_path):
    train(make_config(tmp_path / "first", [{"seq_len": 96, "steps": 1}]))
    second = make_config(
        tmp_path / "second", [{"seq_len": 96, "steps": 1, "learning_rate": 1e-12}], init_from=str(tmp_path / "first")
    )
    train(second)
    first, second = params_of(tmp_path / "first"), params_of(tmp_path / "second")
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), first, second)


def test_parameters_of_16_bits_are_refused_but_can_be_read_and_started_from(tmp_path):
    model, stages = dataclasses.replace(MODEL, param_dtype="bfloat16"), [{"seq_len": 96, "steps": 1}]
    with pytest.raises(UsageError, match=r"model.param_dtype=bfloat16 is for inference.* leave it at float32"):
        train(make_config(tmp_path / "refused", stages, model=model))
    assert not (tmp_path / "refused").exists()
    half = init_params(model, 0)
    save_imported(tmp_path / "half", model, half, load_tokenizer(DATA.tokenizer))
    assert_equal(params_of(tmp_path / "half"), jax.device_get(half))
    stages = [{"seq_len": 96, "steps": 3, "learning_rate": 3e-5}]
    optim = OptimConfig(name="adamw", schedule="constant")
    train(make_config(tmp_path / "run", stages, init_from=str(tmp_path / "half"), optim=optim))

    def moved(old, new):
        assert new.dtype == np.float32
        changed = new != np.asarray(old, np.float32)
        assert changed.mean() > 0.5 and np.abs(new - np.asarray(old, np.float32)).max() < 1e-3

    jax.tree.map(moved, jax.device_get(half), params_of(tmp_path / "run"))


def test_a_step_that_is_not_finite_is_skipped_if_asked():
    """Parameters and moments stay as they are; its sums are 0."""
    optimizer = make_optimizer(OptimConfig(name="adamw"))
    step = make_train_step(MODEL, optimizer, CrossEntropy(64), skip_nonfinite=True)
    rows = {name: np.ones((1, 2, 16), np.int32) for name in ("tokens", "targets", "positions")}
    rows["answers"] = np.ones((1, 2, 16), bool)
    good, bad = (rows | {"weights": np.full((1, 2, 16), weight, np.float32)} for weight in (1.0, np.nan))
    state, metrics = step(init_state(MODEL, optimizer, 0), good, jnp.float32(1e-2))
    before = jax.device_get(state)
    assert metrics["skipped"] == 0 and metrics["weight"] == 32 and metrics["loss"] > 0
    state, metrics = step(state, bad, jnp.float32(1e-2))
    assert_equal(state._replace(step=1), before)
    assert {name: float(x) for name, x in metrics.items()} == dict.fromkeys(metrics, 0.0) | {"skipped": 1.0}
    assert state.step == 2


def test_nothing_but_skipped_steps_ends_the_run(tmp_path):
    """A step at an absurd rate makes all parameters useless, so that no later step is finite."""
    stages = [{"seq_len": 96, "steps": 4}, {"seq_len": 96, "steps": 9, "learning_rate": 1e30}]
    with pytest.raises(InputError, match="all of the last 3 steps were skipped, .*; the last good checkpoint is step"):
        train(make_config(tmp_path / "run", stages, nonfinite="skip"))


def test_a_last_window_of_skipped_steps_reads_nan_and_is_not_the_best(tmp_path):
    """Step 5 makes all parameters useless; 7, a window of its own, is skipped."""
    stages = [{"seq_len": 96, "steps": 4}, {"seq_len": 96, "steps": 3, "learning_rate": 1e30}]
    optim = OptimConfig(name="adamw", schedule="constant")
    result = train(make_config(tmp_path / "run", stages, nonfinite="skip", optim=optim))
    assert result.finished and result.metrics is not None and result.metrics["skipped_steps"] == 1
    assert np.isnan(result.metrics["loss"]) and np.isnan(result.metrics["answer_accuracy"])
    assert load_run(tmp_path / "run").step == 7 and load_run(tmp_path / "run", "best").step == 4


def test_a_loss_that_is_not_finite_stops_and_names_step_and_checkpoint(tmp_path):
    stages = [{"seq_len": 96, "steps": 4}, {"seq_len": 96, "steps": 8, "learning_rate": 1e30}]
    with pytest.raises(InputError, match=r"at step [67]; the last good checkpoint is step 4 in .*checkpoints"):
        train(make_config(tmp_path / "run", stages, optim=OptimConfig(name="adamw", schedule="constant")))
    run = load_run(tmp_path / "run")
    assert run.step == 4 and all(np.isfinite(x).all() for x in jax.tree.leaves(jax.device_get(run.params)))


def test_another_model_in_the_same_run_folder_is_refused(tmp_path):
    train(make_config(tmp_path / "run", [{"seq_len": 96, "steps": 1}]))
    wider = dataclasses.replace(MODEL, intermediate_size=64)
    with pytest.raises(InputError, match="another model .*intermediate_size"):
        train(make_config(tmp_path / "run", [{"seq_len": 96, "steps": 1}], model=wider))


def test_a_context_is_extended_by_starting_from_a_run_with_other_positions(tmp_path):
    train(make_config(tmp_path / "short", [{"seq_len": 96, "steps": 2}]))
    longer = dataclasses.replace(
        MODEL,
        max_position_embeddings=4096,
        rope_theta=1e6,
        rope_scaling=YarnConfig(factor=8.0, original_max_position_embeddings=512),
    )
    stages = [{"seq_len": 640, "steps": 1, "learning_rate": 1e-12}]
    extended = make_config(tmp_path / "long", stages, model=longer, init_from=str(tmp_path / "short"))
    assert train(extended).finished
    for short, long in zip(
        *(jax.tree.leaves(load_run(tmp_path / run).params) for run in ("short", "long")), strict=True
    ):
        np.testing.assert_allclose(np.asarray(short), np.asarray(long), atol=1e-9)
    with pytest.raises(
        InputError, match=r"\(max_position_embeddings, .*rope_theta differ\); .* init_from=.*/short starts"
    ):
        train(make_config(tmp_path / "short", stages, model=longer))


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"num_hidden_layers": 1}, "num_hidden_layers"),
        ({"num_attention_heads": 4, "v_head_dim": 4}, "num_attention_heads, v_head_dim"),
        ({"q_lora_rank": 8}, "q_lora_rank"),
        ({"tie_word_embeddings": False}, "tie_word_embeddings"),
    ],
)
def test_a_start_from_other_weights_is_refused_and_leaves_nothing(tmp_path, short_run, changes, named):
    model = dataclasses.replace(MODEL, **changes)
    stages = [{"seq_len": 96, "steps": 1}]
    with pytest.raises(InputError, match=f"holds another model: {named} differ"):
        train(make_config(tmp_path / "run", stages, model=model, init_from=str(short_run)))
    assert not (tmp_path / "run").exists()
    assert train(make_config(tmp_path / "run", stages, init_from=str(short_run))).finished


@pytest.fixture(scope="module")
def short_run(tmp_path_factory):
    run_dir = tmp_path_factory.mktemp("runs") / "short"
    train(make_config(run_dir, [{"seq_len": 96, "steps": 1}]))
    return run_dir


def test_a_refused_command_leaves_the_config_of_a_run_as_it_was(tmp_path, short_run):
    run_dir = shutil.copytree(short_run, tmp_path / "run")
    before = {path: path.read_bytes() for path in run_dir.rglob("*") if path.is_file()}
    with pytest.raises(InputError, match="use the model, the optim"):
        train(make_config(run_dir, [{"seq_len": 96, "steps": 2}], optim=OptimConfig(name="muon")))
    assert {path: path.read_bytes() for path in run_dir.rglob("*") if path.is_file()} == before


@pytest.mark.integration
def test_what_computes_the_model_may_change_between_runs(tmp_path):
    stages = [{"seq_len": 96, "steps": 1}]
    train(make_config(tmp_path / "run", stages))
    config = dataclasses.replace(MODEL, decode="xla", attention="reference", remat="full")
    stages = [{"seq_len": 96, "steps": 1}, {"seq_len": 96, "steps": 1}]
    train(make_config(tmp_path / "run", stages, model=config))
    assert load_run(tmp_path / "run").step == 2
    train(make_config(tmp_path / "next", stages[:1], model=MODEL, init_from=str(tmp_path / "run")))


def test_another_tokenizer_in_the_same_run_folder_is_refused(tmp_path):
    train(make_config(tmp_path / "run", [{"seq_len": 96, "steps": 1}]))
    data = dataclasses.replace(DATA, tokenizer="bytes")
    with pytest.raises(InputError, match="another tokenizer"):
        train(make_config(tmp_path / "run", [{"seq_len": 400, "steps": 1}], data=data))


def test_a_batch_that_does_not_spread_over_the_devices_is_refused(tmp_path):
    with pytest.raises(UsageError, match="do not spread evenly over 8 devices"):
        train(make_config(tmp_path / "run", [{"seq_len": 96, "steps": 1, "batch_size": 6}]))


FULL_DISK = """
import resource, signal, sys
from pathlib import Path
sys.path.insert(0, "tests")
import conftest
from tiny import make_config, train
from mla_jax.checkpoint.manager import Checkpoints
from mla_jax.errors import one_line_errors
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
save = Checkpoints.save
def limited(self, step, *args):
    self.wait()
    if step > 4:  # no file may grow beyond 1,000 bytes any more: what a full disk does to a write
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
    save(self, step, *args)
Checkpoints.save = limited
with one_line_errors():
    train(make_config(Path(sys.argv[1])))
"""


def test_a_write_that_fails_while_saving_is_named_and_the_last_checkpoint_kept(tmp_path):
    command = [sys.executable, "-c", FULL_DISK, str(tmp_path / "run")]
    result = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parent.parent.parent)
    assert result.returncode == 1, result.stderr
    # Threads of the storage library print too, even in the middle of our line.
    assert "error: could not save a checkpoint" in result.stderr
    assert "the last complete checkpoint is step 4" in result.stderr
    assert load_run(tmp_path / "run").step == 4


def test_too_small_a_disk_is_noticed_before_writing(tmp_path, monkeypatch):
    def disk_usage(folder):
        full = any(p.name == "4" for p in Path(folder).iterdir())
        return namedtuple("usage", "free")(1000 if full else 10**12)

    monkeypatch.setattr(shutil, "disk_usage", disk_usage)
    with pytest.raises(InputError, match=r"MB are needed, 0 MB are free.* last complete checkpoint is step 4"):
        train(make_config(tmp_path / "run"))
    assert load_run(tmp_path / "run").step == 4


def test_the_loop_state_of_a_checkpoint_holds_the_data_position(tmp_path):
    train(make_config(tmp_path / "run", [{"seq_len": 96, "steps": 3}]))
    checkpoints = Checkpoints(tmp_path / "run")
    saved = checkpoints.restore_loop_state(3)
    checkpoints.close()
    assert saved["step"] == 3 and saved["data"]
