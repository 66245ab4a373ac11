"""The report on a sweep: what differs is found, sorted and drawn."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from matplotlib.figure import Figure

from mla_jax.errors import InputError
from mla_jax.evals.sweep import SweptRun, markdown_table, plot_sweep, read_sweep, swept_keys
from mla_jax.training.loop import TrainResult
from mla_jax.training.summary import write_summary

ROOT = Path(__file__).resolve().parent.parent.parent


def run(rate: float, rank: int, loss: float | None, passkey: tuple[int, int] | None = None) -> SweptRun:
    name = f"rate={rate},rank={rank}"
    config = {"name": "s", "run_dir": name, "seed": 0, "train.rate": rate, "model.rank": rank}
    summary = None if loss is None else {"step": 9, "loss": loss, "answer_accuracy": 0.125, "tokens_per_second": 1234.5}
    return SweptRun(name, config, summary, {} if passkey is None else {"passkey": passkey})


RUNS = [run(0.01, 16, 2.0, (3, 4)), run(0.01, 32, 1.0), run(0.003, 16, None), run(0.003, 32, 1.5)]


def test_swept_keys_are_those_that_differ():
    assert swept_keys(RUNS) == ["train.rate", "model.rank"]
    assert swept_keys(RUNS[:2]) == ["model.rank"]


def test_table_has_the_lowest_loss_first_and_unfinished_runs_last():
    assert (
        markdown_table([run(0.003, 64, float("nan")), *RUNS])
        == """\
| train.rate | model.rank | step | loss | answers right | tokens/s | passkey correct |
| --- | --- | --- | --- | --- | --- | --- |
| 0.01 | 32 | 9 | 1.0000 | 12.5% | 1,234 |  |
| 0.003 | 32 | 9 | 1.5000 | 12.5% | 1,234 |  |
| 0.01 | 16 | 9 | 2.0000 | 12.5% | 1,234 | 3/4 |
| 0.003 | 64 | 9 | nan | 12.5% | 1,234 |  |
| 0.003 | 16 | not finished |  |  |  |  |
"""
    )


def test_plot_has_a_line_for_each_value_of_the_second_key(tmp_path, monkeypatch):
    figures, savefig = [], Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda self, *a, **k: (figures.append(self), savefig(self, *a, **k)))
    plot_sweep([*RUNS, run(0.03, 32, 3.0)], tmp_path / "sweep.png", title="s")
    loss, accuracy = figures[0].axes
    lines = {line.get_label(): (list(line.get_xdata()), list(line.get_ydata())) for line in loss.get_lines()}
    assert lines == {"model.rank 16": ([0.01], [2.0]), "model.rank 32": ([0.003, 0.01, 0.03], [1.5, 1.0, 3.0])}
    assert loss.get_xlabel() == "train.rate" and loss.get_xscale() == "log"
    assert list(accuracy.get_lines()[1].get_ydata()) == [12.5] * 3
    assert (tmp_path / "sweep.png").read_bytes().startswith(b"\x89PNG")


def test_the_accuracy_of_another_loss_is_reported_by_its_name(tmp_path, monkeypatch):
    figures, savefig = [], Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda self, *a, **k: (figures.append(self), savefig(self, *a, **k)))
    summary = {"step": 9, "accuracy_metric": "preferred", "loss": 0.5, "preferred": 0.75, "tokens_per_second": 10.0}
    runs = [SweptRun(str(beta), {"loss.beta": beta}, summary, {}) for beta in (0.1, 0.2)]
    assert markdown_table(runs).splitlines()[::2] == [
        "| loss.beta | step | loss | preferred | tokens/s |",
        "| 0.1 | 9 | 0.5000 | 75.0% | 10 |",
    ]
    plot_sweep(runs, tmp_path / "sweep.png", title="s")
    accuracy = figures[0].axes[1]
    assert accuracy.get_ylabel() == "preferred (%)"
    assert list(accuracy.get_lines()[0].get_ydata()) == [75.0] * 2


def test_words_are_drawn_at_even_places(tmp_path, monkeypatch):
    figures, savefig = [], Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda self, *a, **k: (figures.append(self), savefig(self, *a, **k)))
    runs = [SweptRun(name, {"optim.name": name}, RUNS[0].summary, {}) for name in ("muon", "adamw")]
    plot_sweep(runs, tmp_path / "sweep.png", title="s")
    (line,) = figures[0].axes[0].get_lines()
    assert list(line.get_xdata()) == [0, 1]
    assert [text.get_text() for text in figures[0].axes[0].get_xticklabels()] == ["adamw", "muon"]


def write(folder: Path, config: str, summary: dict | None) -> None:
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(config)
    if summary is not None:
        (folder / "summary.json").write_text(json.dumps(summary))


def test_runs_are_read_from_their_folders(tmp_path):
    summary = {"step": 1, "loss": 2.0, "answer_accuracy": 0.5, "tokens_per_second": 3.0}
    write(tmp_path / "seed=0", "{seed: 0, train: {stages: [{steps: 1}]}}", summary)
    write(tmp_path / "seed=1", "{seed: 1, train: {stages: [{steps: 1}]}}", None)
    (tmp_path / "seed=0" / "eval").mkdir()
    cells = [{"length": length, "depth": 0.5, "correct": correct, "n": 2} for length, correct in ((128, 1), (256, 2))]
    (tmp_path / "seed=0" / "eval" / "passkey.json").write_text(json.dumps({"model": {"step": 1}, "cells": cells}))
    first, second = read_sweep(tmp_path)
    assert first == SweptRun("seed=0", {"seed": 0, "train.stages.0.steps": 1}, summary, {"passkey": (3, 4)})
    assert second.name == "seed=1" and second.summary is None and second.evaluations == {}


def test_a_summary_names_the_accuracy_of_its_loss(tmp_path):
    metrics = {"loss": 0.5, "preferred": 0.75, "tokens_per_second": 10.0}
    for seed in range(2):
        write(tmp_path / str(seed), f"seed: {seed}", None)
        write_summary(TrainResult(tmp_path / str(seed), 9, True, False, metrics, "preferred"))
    assert [run.accuracy for run in read_sweep(tmp_path)] == 2 * [("preferred", 0.75)]


def test_a_run_whose_last_window_taught_nothing_has_a_summary_that_any_reader_takes(tmp_path):
    for seed, loss in enumerate((float("nan"), 0.5)):
        write(tmp_path / str(seed), f"seed: {seed}", None)
        metrics = {"loss": loss, "answer_accuracy": loss, "tokens_per_second": 10.0}
        write_summary(TrainResult(tmp_path / str(seed), 9, True, False, metrics, "answer_accuracy"))
    assert "NaN" not in (tmp_path / "0" / "summary.json").read_text()
    assert [row.split(" | ")[2:4] for row in markdown_table(read_sweep(tmp_path)).splitlines()[2:]] == [
        ["0.5000", "50.0%"], ["nan", "nan%"]
    ]  # fmt: skip


def test_what_is_no_sweep_is_named(tmp_path):
    with pytest.raises(InputError, match="holds 0 runs; a sweep has at least 2"):
        read_sweep(tmp_path)
    for seed in range(2):
        write(tmp_path / str(seed), f"seed: {seed}", None)
    with pytest.raises(InputError, match="no run in .* has finished yet"):
        read_sweep(tmp_path)
    (tmp_path / "0" / "summary.json").write_text("{")
    with pytest.raises(InputError, match=r"/0 cannot be read \("):
        read_sweep(tmp_path)
    (tmp_path / "0" / "summary.json").write_text('{"step": 1, "loss": 2.0, "accuracy_metric": "preferred"}')
    with pytest.raises(InputError, match=r"/0 cannot be read \(summary\.json lacks preferred, tokens_per_second\)"):
        read_sweep(tmp_path)


@pytest.mark.integration
def test_the_sweep_example_and_its_report(tmp_path):
    tiny = (
        "model.hidden_size=32 model.num_attention_heads=2 model.qk_nope_head_dim=8 model.qk_rope_head_dim=8 "
        "model.v_head_dim=8 model.intermediate_size=32 optim=adamw tracker=none train.log_every=2 "
        "train.stages.0.steps=4 train.stages.0.batch_size=8 train.stages.0.learning_rate=0.01,0.03 "
        "model.kv_lora_rank=8,16"
    ).split()
    environment = os.environ | {"XLA_FLAGS": os.environ["XLA_FLAGS"] + " --xla_force_host_platform_device_count=1"}
    commands = [
        ["experiments.sft", "-m", "experiment=sweep_lr", f"run_dir={tmp_path}/sweep", *tiny],
        ["tools.sweep_report", f"{tmp_path}/sweep"],
    ]
    for command in commands:
        ran = subprocess.run(
            [sys.executable, "-m", *command], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=1200
        )
        assert ran.returncode == 0, ran.stderr
    rows = (tmp_path / "sweep" / "sweep.md").read_text().splitlines()[2:]
    assert rows[0].startswith("| model.kv_lora_rank | train.stages.0.learning_rate | step |")
    assert sorted(row.split("|")[1:3] for row in rows[2:6]) == [
        [f" {rank} ", f" {rate} "] for rank in (16, 8) for rate in (0.01, 0.03)
    ]
    losses = [float(row.split("|")[4]) for row in rows[2:6]]
    assert losses == sorted(losses) and len(set(losses)) == 4
    assert (tmp_path / "sweep" / "sweep.png").read_bytes().startswith(b"\x89PNG")
