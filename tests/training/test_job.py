"""The end of a training job: exit code, requeueing, summary and what is printed."""

import json
from dataclasses import replace

import pytest

from mla_jax.config.data import JsonlDataConfig
from mla_jax.training import job
from mla_jax.training.loop import TrainResult
from tiny import make_config


@pytest.fixture
def end(tmp_path, monkeypatch):
    """Runs a job whose training ends with the given flags; the number of times that it was requeued."""

    def run(data=None, **flags) -> int:
        requeued = []
        result = TrainResult(run_dir=tmp_path, step=7, metrics={"loss": 0.5}, accuracy_metric="small", **flags)
        monkeypatch.setattr(job, "train", lambda config, *what: result if what == ("loss", "pipeline", None) else None)
        monkeypatch.setattr(job, "requeue", lambda: requeued.append(1))
        try:
            config = make_config(tmp_path) if data is None else replace(make_config(tmp_path), data=data)
            job.train_job(config, "loss", "pipeline")  # pyright: ignore[reportArgumentType]
        except SystemExit as e:
            assert e.code == 130 and not flags["finished"]
        else:
            assert flags["finished"]
        return len(requeued)

    return run


def test_a_finished_job_leaves_a_summary_and_says_what_is_next(end, tmp_path, capsys):
    assert end(finished=True, terminated=False) == 0
    assert json.loads((tmp_path / "summary.json").read_text()) == {"step": 7, "accuracy_metric": "small", "loss": 0.5}
    assert capsys.readouterr().out == f"Finished at step 7. Next: python -m experiments.evaluate run={tmp_path}\n"


def test_a_model_of_own_texts_is_asked_next(end, tmp_path, capsys):
    end(JsonlDataConfig(tokenizer="bytes", path="x.jsonl"), finished=True, terminated=False)
    assert capsys.readouterr().out == f"Finished at step 7. Next: python -m tools.generate {tmp_path}\n"


@pytest.mark.parametrize("terminated", [False, True])
def test_an_interrupted_job_is_requeued_if_it_was_terminated(end, tmp_path, capsys, terminated):
    assert end(finished=False, terminated=terminated) == terminated
    assert not (tmp_path / "summary.json").exists()
    assert "Interrupted: step 7 is saved" in capsys.readouterr().out
