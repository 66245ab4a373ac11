"""What Prometheus is told of training: the exporter's own text, parsed by Prometheus' client library."""

import dataclasses
import json
import socket
import time
import urllib.error
import urllib.request
from pathlib import Path

import jax
import pytest
from prometheus_client.parser import text_string_to_metric_families

from mla_jax.config import TrackerConfig
from mla_jax.errors import InputError
from mla_jax.observability.trackers import FILE, Trackers, add_metrics
from mla_jax.observability.trackers.prometheus import PrometheusTracker
from processes import held_port
from tiny import make_config, train

Samples = dict[str, dict[str, float]]


def scrape(url: str) -> Samples:
    """Values by name and by the label beside `run` ('' without one)."""
    with urllib.request.urlopen(url, timeout=10) as response:
        text = response.read().decode()
    found: Samples = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            labels = {key: value for key, value in sample.labels.items() if key != "run"}
            assert len(labels) < 2 and "run" in sample.labels and sample.name.startswith("mla_jax_")
            found.setdefault(sample.name, {})["".join(labels.values())] = sample.value
    return found


def config(run_dir: Path, **tracker):
    run_dir.mkdir(parents=True, exist_ok=True)
    return make_config(run_dir, tracker=TrackerConfig(names=["prometheus"], **tracker))


def url_of(run_dir: Path) -> str:
    return json.loads((run_dir / FILE).read_text())["prometheus"]["url"]


def test_each_metric_is_shown_with_its_unit(tmp_path):
    tracked = Trackers(config(tmp_path / "run"), tmp_path / "run", 0)
    before = time.time()
    tracked.log(7, {"train/loss": 2.5, "validation/answer_accuracy": 0.25, "memory/peak_gib": 2.0, "time/data": 0.125,
                    "time/step_seconds": 0.5, "time/since_checkpoint_seconds": 60.0})  # fmt: skip
    found = scrape(url_of(tmp_path / "run"))
    tracked.log(8, {"train/loss": float("nan")})
    later = scrape(url_of(tmp_path / "run"))
    tracked.close(finished=True)
    assert found["mla_jax_step"] == {"": 7} and found["mla_jax_train_loss"] == {"": 2.5}
    assert found["mla_jax_validation_answer_accuracy"] == {"": 0.25}
    assert found["mla_jax_memory_peak_bytes"] == {"": 2 * 2**30}
    assert found["mla_jax_time_ratio"] == {"data": 0.125} and found["mla_jax_time_step_seconds"] == {"": 0.5}
    (updated,) = found["mla_jax_updated_timestamp_seconds"].values()
    assert before <= updated <= time.time()
    assert found["mla_jax_checkpoint_timestamp_seconds"][""] == pytest.approx(updated - 60)
    assert later["mla_jax_step"] == {"": 8} and later["mla_jax_train_loss"][""] != later["mla_jax_train_loss"][""]
    assert later["mla_jax_validation_answer_accuracy"] == {"": 0.25}, "it is what was measured last"


class Killed(BaseException):
    """As if the process ended."""


def test_goodput_and_badput_add_up_to_the_wall_time_over_a_restart(tmp_path, monkeypatch):
    from mla_jax.training.loop import _Trainer

    seen: list[Samples] = []
    log, step = PrometheusTracker.log, _Trainer._step

    def log_and_scrape(self, *args):
        log(self, *args)
        seen.append(scrape(url_of(run_dir)))

    def killed(self):
        if self.loop.step == 6:
            raise Killed
        step(self)

    run_dir = tmp_path / "run"
    stages = [{"seq_len": 96, "steps": 8}]
    tracker = TrackerConfig(names=["prometheus"])
    whole = make_config(run_dir, stages, tracker=tracker, log_every=1, checkpoint_every=4)
    monkeypatch.setattr(PrometheusTracker, "log", log_and_scrape)
    monkeypatch.setattr(_Trainer, "_step", killed)
    begin = time.time()
    with pytest.raises(Killed):
        train(whole)
    monkeypatch.setattr(_Trainer, "_step", step)
    assert train(whole).finished
    elapsed = time.time() - begin

    assert [samples["mla_jax_step"][""] for samples in seen] == [1, 2, 3, 4, 5, 6, 5, 6, 7, 8]
    for samples in seen:
        good, bad = samples["mla_jax_goodput_seconds"][""], samples["mla_jax_badput_seconds"]
        assert good + sum(bad.values()) == pytest.approx(samples["mla_jax_time_run_seconds"][""])
        assert set(bad) == {"data", "compile", "checkpoint", "other", "lost", "restart"}
    last = seen[-1]
    assert 0 < last["mla_jax_time_run_seconds"][""] <= elapsed
    assert seen[5]["mla_jax_badput_seconds"]["lost"] == 0 < last["mla_jax_badput_seconds"]["lost"]
    assert last["mla_jax_badput_seconds"]["restart"] > 0


def test_a_file_tells_prometheus_of_a_run_until_it_is_finished(tmp_path):
    run_dir = tmp_path / "run"
    target = tmp_path / "prometheus_targets" / "run.json"
    tracked = Trackers(config(run_dir), run_dir, 0)
    (group,) = json.loads(target.read_text())
    assert f"http://{group['targets'][0]}/metrics" == url_of(run_dir) and group["labels"] == {"run": "run"}
    tracked.close(finished=False)
    assert target.exists(), "a run that stopped before its end is a target that is down"
    with pytest.raises(urllib.error.URLError):
        scrape(url_of(run_dir))
    Trackers(config(run_dir), run_dir, 4).close(finished=True)
    assert not target.exists()


def test_runs_of_a_sweep_are_told_apart(tmp_path):
    targets = tmp_path / "targets"
    runs = [tmp_path / "sweep" / f"seed={seed}" for seed in (0, 1)]
    tracked = []
    for run_dir in runs:
        swept = dataclasses.replace(config(run_dir, prometheus_targets=str(targets)), name="sweep")
        tracked.append(Trackers(swept, run_dir, 0))
        tracked[-1].log(1, {"train/loss": 1.0})
    assert sorted(path.name for path in targets.iterdir()) == ["sweep_seed=0.json", "sweep_seed=1.json"]
    assert [json.loads(path.read_text())[0]["labels"]["run"] for path in sorted(targets.iterdir())] == [
        "sweep/seed=0",
        "sweep/seed=1",
    ]
    for run_dir in runs:
        with urllib.request.urlopen(url_of(run_dir), timeout=10) as response:
            assert f'mla_jax_train_loss{{run="sweep/{run_dir.name}"}} 1.0' in response.read().decode()
    for tracker in tracked:
        tracker.close(finished=True)


def test_other_machines_get_a_name_for_this_one(tmp_path):
    run_dir, elsewhere = tmp_path / "run", tmp_path / "elsewhere"
    tracked = Trackers(config(run_dir, prometheus_host="0.0.0.0", prometheus_targets=str(elsewhere)), run_dir, 0)
    (group,) = json.loads((elsewhere / "run.json").read_text())
    tracked.close(finished=True)
    host, _, port = group["targets"][0].rpartition(":")
    assert host == socket.getfqdn() and int(port) > 0


def test_a_port_that_is_taken_ends_a_new_run_and_not_a_resumed_one(tmp_path, capsys):
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        with pytest.raises(InputError, match=r"tracker prometheus cannot start \(.*in use"):
            Trackers(config(tmp_path / "new", prometheus_port=port), tmp_path / "new", 0)
        run_dir = tmp_path / "run"
        Trackers(config(run_dir), run_dir, 0).close(finished=False)
        resumed = Trackers(config(run_dir, prometheus_port=port), run_dir, 4)
        resumed.log(5, {"train/loss": 1.0})
        resumed.close(finished=True)
    assert "tracker prometheus cannot go on with run" in capsys.readouterr().out


def test_a_folder_of_targets_that_cannot_be_written_leaves_no_server(tmp_path):
    (tmp_path / "prometheus_targets").write_text("a file")
    with held_port() as port:
        with pytest.raises(InputError, match="tracker prometheus cannot start"):
            Trackers(config(tmp_path / "run", prometheus_port=port), tmp_path / "run", 0)
        with socket.create_server(("127.0.0.1", port)):
            pass


def test_only_the_first_process_has_a_server(tmp_path, monkeypatch):
    monkeypatch.setattr(jax, "process_index", lambda: 1)
    Trackers(config(tmp_path / "run"), tmp_path / "run", 0).close(finished=True)
    assert not (tmp_path / "prometheus_targets").exists()


def test_evaluations_are_not_for_prometheus(tmp_path, capsys):
    assert add_metrics(TrackerConfig(names=["prometheus"]), tmp_path, 1, {"eval/correct": 1.0}) == []
    assert capsys.readouterr().out == ""
