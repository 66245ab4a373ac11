"""Rates of an evaluation in the trackers of the run, against what these wrote."""

import dataclasses
import re
import shutil
from pathlib import Path

import pytest
import wandb
from mlflow import MlflowClient
from omegaconf import OmegaConf
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import wandb_file
from mla_jax.config import TrackerConfig
from mla_jax.errors import InputError
from mla_jax.evals.cells import Cell
from mla_jax.evals.results import Results
from mla_jax.evals.tracking import metrics_of, track
from mla_jax.observability.trackers import Trackers
from mla_jax.observability.trackers.mlflow import mlflow_uri
from mla_jax.observability.trackers.tensorboard import add_metrics
from tiny import make_config

RESULTS = Results(
    task="passkey",
    title="",
    description="",
    model={"name": "run", "step": 6},
    provenance={},
    seconds=0.0,
    config={},
    cells=tuple(
        Cell.counted({"length": length, "depth": depth}, 4, correct)
        for length, depth, correct in ((64, 0.0, 4), (64, 0.25, 3), (128, 0.0, 1), (128, 0.25, 0))
    ),
    failures=(),
)
EXPECTED = {
    "eval/passkey/correct": 0.5,
    "eval/passkey/64/correct": 7 / 8,
    "eval/passkey/128/correct": 1 / 8,
    "eval/passkey/64/depth_0.0/correct": 1.0,
    "eval/passkey/64/depth_0.25/correct": 0.75,
    "eval/passkey/128/depth_0.0/correct": 0.25,
    "eval/passkey/128/depth_0.25/correct": 0.0,
}


@pytest.fixture(autouse=True)
def quiet(monkeypatch):
    monkeypatch.setenv("WANDB_SILENT", "true")
    for name in ("WANDB_MODE", "WANDB_API_KEY", "MLFLOW_TRACKING_URI"):
        monkeypatch.delenv(name, raising=False)


def trained(run_dir: Path, *names: str, finished: bool = True) -> Path:
    """A run folder that was trained for six steps with these trackers."""
    run_dir.mkdir()
    config = make_config(run_dir, tracker=TrackerConfig(names=list(names), wandb_mode="offline"))
    OmegaConf.save(OmegaConf.create(dataclasses.asdict(config)), run_dir / "config.yaml")
    trackers = Trackers(config, run_dir, 0)
    for step in (3, 6):
        trackers.log(step, {"train/loss": float(step)})
    trackers.close(finished)
    return run_dir


def test_every_cell_length_and_task_has_a_metric():
    assert metrics_of(RESULTS) == EXPECTED


def test_each_score_has_one_and_names_are_those_that_trackers_take():
    scores = {"correct": (1.0, 0.0), "near_miss": (0.0, 0.5)}
    cells = (Cell({"length": 64, "question": "is it = there?"}, scores), Cell({"length": 64, "question": "b"}, scores))
    found = metrics_of(dataclasses.replace(RESULTS, task="hallucination", cells=cells))
    assert found["eval/hallucination/64/question_is_it_there_/near_miss"] == 0.25
    assert len(found) == 8 and all(re.fullmatch(r"[\w./-]+", name) for name in found)


def test_mlflow_shows_them_under_the_run_whose_status_stays(tmp_path, capsys):
    run_dir = trained(tmp_path / "run", "mlflow", finished=False)
    track(run_dir, RESULTS)
    client = MlflowClient(tracking_uri=mlflow_uri(TrackerConfig(names=["mlflow"]), run_dir))
    (experiment,) = [e for e in client.search_experiments() if e.name == "infinitecontext"]
    (run,) = client.search_runs([experiment.experiment_id])
    assert run.data.metrics == {"train/loss": 6.0, **EXPECTED}
    assert [(m.step, m.value) for m in client.get_metric_history(run.info.run_id, "eval/passkey/correct")] == [(6, 0.5)]
    assert run.info.status == "KILLED"
    assert "Added to mlflow: eval/passkey/... at step 6" in capsys.readouterr().out


def test_wandb_shows_them_under_the_run_by_the_step_of_the_checkpoint(tmp_path):
    run_dir = trained(tmp_path / "run", "wandb")
    track(run_dir, RESULTS)
    wandb.teardown()  # `finish` returns before the file is whole
    first, second = sorted(run_dir.glob("wandb/offline-run-*/run-*.wandb"))
    assert wandb_file.run(first).run_id == wandb_file.run(second).run_id
    (row,) = wandb_file.history(second)
    assert {name: value for name, value in row.items() if name.startswith("eval/")} == {"eval/step": 6, **EXPECTED}
    metrics = [r.metric for r in wandb_file.records(second) if r.WhichOneof("record_type") == "metric"]
    assert [(metric.glob_name, metric.step_metric) for metric in metrics if metric.glob_name] == [
        ("eval/*", "eval/step")
    ]


def test_tensorboard_keeps_all_evaluations_of_one_second(tmp_path):
    for name in "abc":
        add_metrics(tmp_path, 6, {f"eval/{name}": 1.0})
    events = EventAccumulator(str(tmp_path / "tensorboard" / "eval")).Reload()
    assert set(events.Tags()["scalars"]) == {"eval/a", "eval/b", "eval/c"}


def test_tensorboard_shows_them_beside_training_which_goes_on(tmp_path):
    run_dir = trained(tmp_path / "run", "tensorboard")
    track(run_dir, RESULTS)
    more = Trackers(make_config(run_dir, tracker=TrackerConfig(names=["tensorboard"])), run_dir, 6)
    more.log(9, {"train/loss": 9.0})
    more.close(True)
    events = EventAccumulator(str(run_dir / "tensorboard" / "eval")).Reload()
    found = {name: [(e.step, e.value) for e in events.Scalars(name)] for name in events.Tags()["scalars"]}
    assert found == {name: [(6, value)] for name, value in EXPECTED.items()}
    training = EventAccumulator(str(run_dir / "tensorboard")).Reload()
    assert [(e.step, e.value) for e in training.Scalars("train/loss")] == [(3, 3.0), (6, 6.0), (9, 9.0)]


def test_a_tracker_that_fails_is_named_and_the_others_get_theirs(tmp_path, capsys):
    run_dir = trained(tmp_path / "run", "wandb", "tensorboard")
    (run_dir / "trackers.json").unlink()
    track(run_dir, RESULTS)
    out = capsys.readouterr().out
    assert re.search(r"tracker wandb did not take the metrics \(.*trackers\.json has no id of its run\)", out)
    assert "Added to tensorboard: eval/passkey" in out
    shutil.rmtree(run_dir / "tensorboard")
    (run_dir / "tensorboard").write_text("")
    track(run_dir, RESULTS)
    assert re.search(r"tracker tensorboard did not take the metrics \(.*tensorboard/eval", capsys.readouterr().out)


def test_what_has_no_trackers_gets_nothing(tmp_path, capsys):
    track(tmp_path, RESULTS)  # a Hugging Face folder
    (tmp_path / "config.yaml").write_text("name: imported\nmodel: {}\n")
    track(tmp_path, RESULTS)
    track(trained(tmp_path / "run"), RESULTS)
    assert capsys.readouterr().out == ""
    assert not (tmp_path / "run" / "tensorboard").exists()


def test_a_config_that_cannot_be_read_is_named(tmp_path):
    (tmp_path / "config.yaml").write_text("tracker: {names: [tensorbord]}")
    with pytest.raises(InputError, match=r"config\.yaml cannot be read \(tracker\.names must be one of"):
        track(tmp_path, RESULTS)
