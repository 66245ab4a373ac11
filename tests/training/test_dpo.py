"""Preference optimisation from end to end: the reference and its file, resuming, what users get wrong."""

import dataclasses
import json
import os
import signal
from pathlib import Path

import jax
import numpy as np
import pytest

from mla_jax.checkpoint.run_folder import load_run, save_imported
from mla_jax.config import DpoConfig, NeedlePairsConfig, OptimConfig, PreferenceJsonlConfig, PreferenceLossConfig
from mla_jax.config.data import ValidationConfig
from mla_jax.data.preference.pipeline import PreferenceBatches
from mla_jax.data.tokenizer import load_tokenizer
from mla_jax.distributed.preemption import StopRequest
from mla_jax.errors import InputError, UsageError
from mla_jax.evals.mining import mine_pairs
from mla_jax.losses.preference import PreferenceLoss
from mla_jax.training import loop, reference
from mla_jax.training.reference import ReferencePipelines
from tiny import MODEL, make_config, random_params, train

DATA = NeedlePairsConfig(
    tokenizer="needle-bpe",
    tasks={"multi_key": 1.0, "absent_key": 1.0},
    haystacks={"words": 1.0},
    rejected={"near_key": 1.0, "absent_key": 1.0, "random_value": 1.0},
    branch_tokens=128,
    pairs_per_row=2,
)
LOSS = PreferenceLossConfig(name="sigmoid", beta=0.1)


@pytest.fixture(scope="module")
def start(tmp_path_factory) -> Path:
    run_dir = tmp_path_factory.mktemp("runs") / "sft"
    train(make_config(run_dir, [{"seq_len": 96, "steps": 2}]))
    return run_dir


def make_dpo(run_dir: Path, start: Path | None, steps: int = 7, **changes) -> DpoConfig:
    stages = [{"seq_len": 256, "steps": steps}]
    options = {"data": DATA, "best_metric": "rewards/accuracies", "init_from": start and str(start)} | changes
    optim = OptimConfig(name="adamw", schedule="constant", weight_decay=0.0)
    loss, reference = options.pop("loss", LOSS), options.pop("reference", None)
    sft = make_config(run_dir, options.pop("stages", stages), optim=optim, make=dict, **options)
    return DpoConfig(**sft, loss=loss, reference=reference)


def prefer(config: DpoConfig, stop: StopRequest | None = None) -> loop.TrainResult:
    """Trains as experiments.dpo does."""
    data, stop = config.data, stop or StopRequest()
    loss = PreferenceLoss(config.loss, data.branch_tokens, data.pairs_per_row, data.packed, config.train.loss_chunk)
    return loop.train(config, loss, ReferencePipelines(config, loss, stop, mine_pairs), stop)


def files(run_dir: Path) -> list[Path]:
    return sorted((run_dir / "reference").glob("*.bin"))


def params_of(run_dir: Path) -> dict:
    return jax.device_get(load_run(run_dir).params)


def assert_equal(a: dict, b: dict) -> None:
    jax.tree.map(np.testing.assert_array_equal, a, b)


@pytest.fixture(scope="module")
def whole(start, tmp_path_factory) -> Path:
    run_dir = tmp_path_factory.mktemp("runs") / "whole"
    assert prefer(make_dpo(run_dir, start)).finished
    return run_dir


def test_the_first_loss_is_ln_2(start, tmp_path):
    """With and without accumulation, on eight devices; the rate is so small that nothing is learned."""
    for parts in (1, 2):
        stages = [{"seq_len": 256, "steps": 3, "learning_rate": 1e-12, "batch_size": 16}]
        config = make_dpo(tmp_path / f"by-{parts}", start, stages=stages, grad_accumulation=parts)
        metrics = prefer(config).metrics
        assert metrics is not None and metrics["loss"] == pytest.approx(np.log(2), abs=1e-3)
        assert metrics["rewards/margins"] == pytest.approx(0, abs=1e-3)
        assert metrics["num_tokens"] > 3 * 16 * 128 and metrics["logps/chosen"] < -5


@pytest.mark.parametrize("interrupt", [3, pytest.param(9, marks=pytest.mark.integration)])
def test_a_run_killed_or_stopped_resumes_bit_for_bit_and_computes_nothing_twice(
    interrupt, start, whole, tmp_path, capsys
):
    """Batch 3 is one that the reference reads, 9 the second that is trained on, of 7."""
    read, served = [], 0

    class Stopping(StopRequest):
        def reached(self, what):
            nonlocal served
            served += 1
            if served == interrupt:
                os.kill(os.getpid(), signal.SIGINT)
            read.append(what)
            return super().reached(what)

    signal.signal(signal.SIGINT, signal.default_int_handler)
    config = make_dpo(tmp_path / "run", start)
    result = prefer(config, Stopping())
    assert not result.finished
    size = files(tmp_path / "run")[0].stat().st_size
    assert size == files(whole)[0].stat().st_size // 7 * min(interrupt - 2, 7)
    with files(tmp_path / "run")[0].open("ab") as file:
        file.write(b"a part of a record")  # as a process that was killed leaves it
    capsys.readouterr()
    served = -100
    read.clear()
    assert prefer(config, Stopping()).finished
    asked = [what for what in read if "reference" in what]
    assert asked == [f"batch {i} of the reference" for i in range(min(interrupt - 2, 7), 7)]
    assert "damaged" not in capsys.readouterr().out
    assert_equal(params_of(tmp_path / "run"), params_of(whole))
    assert files(tmp_path / "run")[0].read_bytes() == files(whole)[0].read_bytes()


def test_validation_has_a_file_of_its_own_and_the_same_first_loss(start, tmp_path):
    config = make_dpo(tmp_path / "run", start, steps=3, validate_every=3, checkpoint_every=3, validation_batches=2)
    stages = [dataclasses.replace(config.train.stages[0], learning_rate=1e-12)]
    metrics = prefer(dataclasses.replace(config, train=dataclasses.replace(config.train, stages=stages))).metrics
    assert metrics is not None and metrics["validation/loss"] == pytest.approx(np.log(2), abs=1e-3)
    sizes = sorted(file.stat().st_size for file in files(tmp_path / "run"))
    assert len(sizes) == 2 and sizes[0] * 3 == sizes[1] * 2


def test_pairs_of_a_file_that_are_held_out_are_validated_on(start, tmp_path):
    """The validation reads each of its three batches once, the last of which has a row."""
    lines = [{"prompt": f"the fox {i} is", "chosen": " big", "rejected": " old"} for i in range(8)]
    for name, part in (("trained", lines), ("held-out", [*lines, *lines, lines[0]])):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in part))
    data = PreferenceJsonlConfig(
        tokenizer="needle-bpe", path=str(tmp_path / "trained.jsonl"), cache_dir=str(tmp_path), branch_tokens=64,
        validation=ValidationConfig(path=str(tmp_path / "held-out.jsonl")),
    )  # fmt: skip
    stages = [{"seq_len": 128, "steps": 2, "batch_size": 8, "learning_rate": 1e-12}]
    options = {"data": data, "stages": stages, "validate_every": 1, "checkpoint_every": 9, "log_every": 1}
    metrics = prefer(make_dpo(tmp_path / "run", start, **options)).metrics
    assert metrics is not None and metrics["validation/loss"] == pytest.approx(np.log(2), abs=1e-3)
    sizes = sorted(file.stat().st_size for file in files(tmp_path / "run"))
    assert len(sizes) == 2 and sizes[0] * 3 == sizes[1] * 2, "two batches to train on, three to validate on"


def test_a_later_epoch_of_pairs_of_a_file_computes_nothing_again(start, tmp_path, monkeypatch):
    """Seven pairs, one a row, in batches of eight: all rows are in batch 0, and what follows is taken from there."""
    lines = [{"prompt": f"the {word} fox is", "chosen": " big", "rejected": " old"} for word in "abcdefg"]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    data = PreferenceJsonlConfig(
        tokenizer="needle-bpe", path=str(tmp_path / "pairs.jsonl"), cache_dir=str(tmp_path), branch_tokens=64
    )
    computed, place_batch = [], reference.place_batch
    monkeypatch.setattr(reference, "place_batch", lambda *a: computed.append(1) or place_batch(*a))

    def records(name: str) -> bytes:
        computed.clear()
        prefer(make_dpo(tmp_path / name, start, data=data, stages=[{"seq_len": 128, "steps": 5, "batch_size": 8}]))
        (file,) = files(tmp_path / name)
        return file.read_bytes()

    reusing = records("reusing")
    assert len(computed) == 1, "the first batch has all seven rows"
    monkeypatch.setattr(PreferenceBatches, "row_numbers", lambda self, index: [None] * 8)
    anew = records("anew")
    assert len(computed) == 5
    record = np.dtype([("row", "<u4"), ("log_probs", "<f4", (8, 64)), ("crc", "<u4")])
    one, other = np.frombuffer(reusing, record), np.frombuffer(anew, record)
    np.testing.assert_array_equal(one["row"], other["row"])
    np.testing.assert_allclose(one["log_probs"], other["log_probs"], atol=1e-5)
    assert len(set(one["row"])) > 1 and np.abs(one["log_probs"]).max() > 1


def test_a_damaged_file_is_noticed_and_mended(start, whole, tmp_path, capsys):
    config = make_dpo(tmp_path / "run", start)
    prefer(config)
    (file,) = files(tmp_path / "run")
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    longer = make_dpo(tmp_path / "run", start, steps=9)
    assert prefer(longer).finished
    assert f"{file} is damaged at batch 3; it is computed again from there" in capsys.readouterr().out
    assert file.read_bytes().startswith(files(whole)[0].read_bytes())


@pytest.mark.integration
def test_other_weights_or_data_have_a_file_of_their_own(start, whole, tmp_path):
    train(make_config(tmp_path / "other", [{"seq_len": 96, "steps": 1}], seed=1))
    base = make_dpo(tmp_path / "run", start, steps=1)
    runs = [
        base,
        dataclasses.replace(base, reference=str(tmp_path / "other"), name="b", run_dir=str(tmp_path / "b")),
        dataclasses.replace(base, data=dataclasses.replace(DATA, pairs_per_row=1), run_dir=str(tmp_path / "c")),
        dataclasses.replace(base, seed=7, run_dir=str(tmp_path / "d")),
        dataclasses.replace(base, data=dataclasses.replace(DATA, workers=1), run_dir=str(tmp_path / "e")),
    ]
    names = []
    for config in runs:
        prefer(config)
        (file,) = files(Path(config.run_dir))
        names.append(file.name)
    assert names[4] == names[0] == files(whole)[0].name and len(set(names)) == 4


def test_what_is_wrong_is_named_in_one_line(start, tmp_path):
    with pytest.raises(UsageError, match="init_from is not set: preference optimisation starts from a run"):
        make_dpo(tmp_path / "run", None)
    with pytest.raises(InputError, match=r"init_from=.* has another tokenizer; set data\.tokenizer="):
        data = dataclasses.replace(DATA, tokenizer="bytes")
        prefer(make_dpo(tmp_path / "run", start, data=data, stages=[{"seq_len": 512, "steps": 1}]))
    with pytest.raises(InputError, match="absent is not a run folder"):
        prefer(make_dpo(tmp_path / "run", start, reference=str(tmp_path / "absent")))
    other = tmp_path / "other"
    wider = dataclasses.replace(MODEL, intermediate_size=48)
    save_imported(other, wider, random_params(wider), load_tokenizer("needle-bpe"))
    with pytest.raises(InputError, match=r"reference=.*other holds another model: intermediate_size differ"):
        prefer(make_dpo(tmp_path / "run", start, reference=str(other)))
    assert not (tmp_path / "run" / "config.yaml").exists(), "noticed before anything is in the run's folder"
    with pytest.raises(UsageError, match=r"seq_len 1024, beyond model.max_position_embeddings 512"):
        make_dpo(tmp_path / "run", start, stages=[{"seq_len": 1024, "steps": 1}])


def test_a_file_of_other_data_is_refused(start, whole, tmp_path):
    """A file with the right key whose batches are others, as after a change of the code that makes them."""
    prefer(make_dpo(tmp_path / "other", start, seed=5))
    (tmp_path / "run" / "reference").mkdir(parents=True)
    files(tmp_path / "other")[0].rename(tmp_path / "run" / "reference" / files(whole)[0].name)
    with pytest.raises(InputError, match="log-probabilities of other data .batch 0 of stage 1 differs.: delete"):
        prefer(make_dpo(tmp_path / "run", start))


def test_a_reference_that_is_not_finite_is_named(start, tmp_path, monkeypatch):
    statistics = PreferenceLoss.statistics
    monkeypatch.setattr(
        PreferenceLoss, "statistics",
        lambda self, *a: (found := statistics(self, *a))._replace(log_probs_BR=found.log_probs_BR * np.nan),
    )  # fmt: skip
    with pytest.raises(InputError, match="gives batch 0 log-probabilities that are not finite"):
        prefer(make_dpo(tmp_path / "run", start))


def test_a_loss_that_is_not_finite_stops_and_names_the_step(start, tmp_path):
    stages = [{"seq_len": 256, "steps": 9, "learning_rate": 1e30}]
    with pytest.raises(InputError, match=r"loss is .*nan.* at step [23]; no checkpoint was saved before"):
        prefer(make_dpo(tmp_path / "run", start, stages=stages, checkpoint_every=100))
    assert files(tmp_path / "run"), "what was computed is kept"
