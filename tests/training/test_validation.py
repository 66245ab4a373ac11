"""Validation on held-out data: what is held out, what ranks checkpoints by it, and when it ends a stage."""

import json

import jax
import numpy as np
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from mla_jax.checkpoint.manager import Checkpoints
from mla_jax.checkpoint.run_folder import load_run
from mla_jax.config import JsonlDataConfig, NeedleDataConfig, OptimConfig, StageConfig, TrackerConfig, TrainConfig
from mla_jax.config.data import ValidationConfig
from mla_jax.data.jsonl_batches import held_out
from mla_jax.data.pipeline import make_pipeline
from mla_jax.data.tokenizer import load_tokenizer
from mla_jax.errors import InputError, UsageError
from mla_jax.losses.cross_entropy import CrossEntropy
from mla_jax.mesh import make_mesh, place_batch
from mla_jax.state import TrainState
from mla_jax.training import loop
from mla_jax.training.step import make_forward_step
from other_loss import MeanSquare, sevens
from tiny import DATA, MODEL, assert_equal, interrupt_at, make_config, params_of, train

TOKENIZER = load_tokenizer("needle-bpe")
VALIDATED = {"log_every": 2, "validate_every": 2, "checkpoint_every": 2, "validation_batches": 2}


def examples(data, *, validation: bool, seed: int = 0, batches: int = 30, stage: StageConfig | None = None) -> set:
    stage = stage or StageConfig(seq_len=96, batch_size=4, steps=1, learning_rate=1)
    tokenizer = load_tokenizer(data.tokenizer)
    pipeline = make_pipeline(data, tokenizer, [stage], 0, seed, validation=validation)
    rows = [row.tobytes() for _, batch in zip(range(batches), pipeline, strict=False) for row in batch["tokens"]]
    pipeline.close()
    return set(rows)


def test_needles_of_validation_are_never_trained_on_and_do_not_depend_on_the_seed():
    data = NeedleDataConfig(tokenizer="needle-bpe", tasks={"single": 1.0}, haystacks={"words": 1.0})
    validation = examples(data, validation=True)
    assert len(validation) == 120 and validation == examples(data, validation=True, seed=5)
    for seed in (0, 5):
        assert not validation & examples(data, validation=False, seed=seed)


def test_needles_of_validation_are_of_the_stages_length_without_skips():
    stages = [StageConfig(seq_len=96, batch_size=4, steps=1, learning_rate=1)]
    mixing = {"previous_fraction": 0.5, "position_skip_fraction": 1.0, "position_skip_max": 100}
    stages.append(StageConfig(seq_len=128, batch_size=2, steps=1, learning_rate=1, **mixing))
    pipeline = make_pipeline(DATA, TOKENIZER, stages, 1, 0, validation=True)
    for _ in range(10):
        batch = next(pipeline)
        assert batch["tokens"].shape == (2, 128) and (batch["positions"] == np.arange(128)).all()
    pipeline.close()


def write_lines(path, count: int, start: int = 0) -> str:
    lines = (json.dumps({"prompt": f"question {i}", "completion": f"{i * i}"}) for i in range(start, start + count))
    path.write_text("".join(line + "\n" for line in lines))
    return str(path)


def documents_of(data, *, validation: bool, **kwargs) -> list[bytes]:
    stage = StageConfig(seq_len=64, batch_size=4, steps=1, learning_rate=1)
    pipeline = make_pipeline(data, load_tokenizer("bytes"), [stage], 0, validation=validation, **{"seed": 0} | kwargs)
    found = []
    for _, batch in zip(range(40), pipeline, strict=False):
        for tokens, segments in zip(batch["tokens"], batch["segments"], strict=True):
            found += [tokens[segments == number].tobytes() for number in range(1, segments.max() + 1)]
    pipeline.close()
    return found


def test_a_fraction_of_the_lines_is_held_out_whatever_the_seed(tmp_path):
    path = write_lines(tmp_path / "data.jsonl", 200)
    data = JsonlDataConfig(tokenizer="bytes", path=path, validation=ValidationConfig(fraction=0.1))
    validation = documents_of(data, validation=True)
    assert 10 <= len(validation) <= 30 and len(set(validation)) == len(validation)  # each once, and then it ends
    assert validation == documents_of(data, validation=True, seed=3)
    trained = set(documents_of(data, validation=False)) | set(documents_of(data, validation=False, seed=3))
    assert not trained & set(validation) and len(trained) + len(validation) == 200
    everything = JsonlDataConfig(tokenizer="bytes", path=path)
    assert set(documents_of(everything, validation=False)) == trained | set(validation)


def test_lines_that_are_held_out_stay_so_when_others_are_appended():
    few, more = held_out(100, 0.2), held_out(1000, 0.2)
    np.testing.assert_array_equal(few, more[:100])
    assert 150 < more.sum() < 250
    assert held_out(3, 1e-9).sum() == 1 and held_out(0, 0.5).shape == (0,)


def test_a_file_to_validate_on_is_read_whole_and_only_then(tmp_path):
    path, other = write_lines(tmp_path / "data.jsonl", 20), write_lines(tmp_path / "other.jsonl", 7, start=50)
    data = JsonlDataConfig(tokenizer="bytes", path=path, validation=ValidationConfig(path=other))
    assert len(documents_of(data, validation=True)) == 7
    assert len(set(documents_of(data, validation=False))) == 20
    assert not set(documents_of(data, validation=True)) & set(documents_of(data, validation=False))


def test_nothing_to_validate_on_or_to_train_on_is_an_error(tmp_path):
    path = write_lines(tmp_path / "data.jsonl", 1)
    with pytest.raises(UsageError, match=r"set data\.validation\.path=FILE or data\.validation\.fraction"):
        documents_of(JsonlDataConfig(tokenizer="bytes", path=path), validation=True)
    data = JsonlDataConfig(tokenizer="bytes", path=path, validation=ValidationConfig(fraction=0.5))
    with pytest.raises(InputError, match="of 1 lines leaves none"):
        documents_of(data, validation=False)
    with pytest.raises(UsageError, match="data.validation is never evaluated"):
        make_config(tmp_path / "run", data=data)


@pytest.mark.parametrize(
    ("keys", "named"),
    [
        ({"early_stopping": 2}, "train.early_stopping needs train.validate_every"),
        ({"log_every": 3, "validate_every": 4}, "validate_every=4 must be a multiple of train.log_every=3"),
        ({"log_every": 2, "validate_every": 4, "checkpoint_every": 6}, "must be a multiple of the other"),
    ],
)
def test_keys_that_do_not_go_together_are_refused(keys, named):
    stage = StageConfig(seq_len=8, batch_size=1, steps=1, learning_rate=1)
    with pytest.raises(UsageError, match=named):
        TrainConfig(stages=[stage], **keys)


def test_what_is_validated_is_the_loss_of_the_held_out_batches(tmp_path):
    """Compared with the sums over the same batches one after the other; it is in trackers, summary and checkpoint."""
    config = make_config(
        tmp_path / "run", [{"seq_len": 96, "steps": 4}], tracker=TrackerConfig(names=["tensorboard"]), **VALIDATED
    )
    result = train(config)
    stage, loss = config.train.stages[0], CrossEntropy(config.train.loss_chunk)
    pipeline = make_pipeline(DATA, TOKENIZER, [stage], 0, 0, validation=True)
    with jax.set_mesh(make_mesh(config.mesh)):
        params = load_run(tmp_path / "run").params
        sums = [make_forward_step(MODEL, loss)(params, place_batch(next(pipeline), 1)) for _ in range(2)]
        sums = {name: float(sum(s[name] for s in sums)) for name in sums[0]}
    pipeline.close()
    assert result.metrics is not None and result.accuracy_metric == "validation/answer_accuracy"
    logged = EventAccumulator(str(tmp_path / "run" / "tensorboard"))
    logged.Reload()
    saved = json.loads((tmp_path / "run" / "checkpoints" / "4" / "metrics" / "metrics").read_text())
    for name, value in loss.means(sums).items():
        name = f"validation/{name}"
        assert result.metrics[name] == pytest.approx(value, rel=1e-5)
        assert [event.step for event in logged.Scalars(name)] == [2, 4]
        assert logged.Scalars(name)[-1].value == pytest.approx(value, rel=1e-5)
        assert saved[name] == result.metrics[name] != saved[name.removeprefix("validation/")]


def test_validation_changes_no_parameter_and_a_resumed_run_validates_alike(tmp_path, monkeypatch):
    stages = [{"seq_len": 96, "steps": 4}, {"seq_len": 128, "steps": 4, "batch_size": 16}]
    keys = VALIDATED | {"grad_accumulation": 2, "best_metric": "loss", "keep_last": 9}
    stages[0]["batch_size"] = 16
    plain = train(make_config(tmp_path / "plain", stages, **keys | {"validate_every": 0}))
    whole = train(make_config(tmp_path / "whole", stages, **keys))
    assert_equal(params_of(tmp_path / "plain"), params_of(tmp_path / "whole"))
    config = make_config(tmp_path / "run", stages, **keys)
    with monkeypatch.context() as patch:
        interrupt_at(patch, 5)
        assert train(config).step == 5
    resumed = train(config)
    assert plain.metrics is not None and whole.metrics is not None and resumed.metrics is not None
    speed = {"tokens_per_second": 0.0}
    assert whole.metrics | speed == resumed.metrics | speed and plain.metrics.keys() < whole.metrics.keys()
    for step in (6, 8):
        one, other = (
            json.loads((tmp_path / name / "checkpoints" / str(step) / "metrics" / "metrics").read_text())
            for name in ("whole", "run")
        )
        assert one == other and "validation/loss" in one


def test_best_is_the_best_on_held_out_data(tmp_path):
    """Checkpoints whose training metrics rank the other way round, one of them without validation."""
    train_config = TrainConfig(
        stages=[StageConfig(seq_len=8, batch_size=1, steps=1, learning_rate=1)], best_metric="loss", keep_last=9
    )
    config = make_config(tmp_path / "run", [{"seq_len": 96, "steps": 1}])
    train(config)
    checkpoints = Checkpoints(tmp_path / "run", train_config)
    run = load_run(tmp_path / "run")
    for step, (loss, held) in enumerate([(3.0, 1.0), (2.0, 2.0), (1.0, None), (0.5, float("nan"))], 2):
        metrics = {"stage": 0, "loss": loss} | ({} if held is None else {"validation/loss": held})
        state = TrainState(jax.numpy.int32(step), run.params, ())
        checkpoints.save(step, state, {"tokenizer": TOKENIZER.fingerprint, "stage": 0, "stage_step": 1}, metrics)
    checkpoints.wait()
    assert checkpoints.choose("best", "loss") == 2
    checkpoints.close()


def test_early_stopping_ends_the_stage_and_stays_ended(tmp_path, capsys):
    """A rate so small that nothing improves: the first validation is the best, the two after it are no better."""
    stages = [
        {"seq_len": 96, "steps": 40, "learning_rate": 1e-30},
        {"seq_len": 128, "steps": 30, "learning_rate": 1e-30},
    ]
    optim = OptimConfig(name="adamw", schedule="constant")
    config = make_config(tmp_path / "run", stages, optim=optim, early_stopping=2, **VALIDATED)
    result = train(config)
    assert result.finished and result.step == 6 + 6
    assert (
        "Stage 2 ends at step 12: validation/answer_accuracy was no better in 2 validations" in capsys.readouterr().out
    )
    assert train(config).step == 12  # a resumed run knows
    assert load_run(tmp_path / "run").trained_lengths == (96, 128)


def test_any_loss_and_pipeline_can_be_validated(tmp_path, capsys):
    """A loss that falls from one validation to the next, on batches of a pipeline that makes no difference."""
    stages = [{"seq_len": 96, "steps": 6, "batch_size": 16}]
    config = make_config(tmp_path / "run", stages, best_metric="loss", early_stopping=1, **VALIDATED)
    result = loop.train(config, MeanSquare(), sevens)
    assert result.finished and result.step == 6 and result.metrics is not None
    assert result.accuracy_metric == "validation/small"
    assert result.metrics["validation/loss"] < result.metrics["loss"]
    assert "validation: squared " in capsys.readouterr().out
