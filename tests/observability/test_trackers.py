"""Trackers against what they wrote: TensorBoard's events, W&B's offline files, MLflow's SQLite store."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import pytest
import wandb

import wandb_file
from mla_jax.config import TrackerConfig
from mla_jax.errors import InputError, UsageError
from mla_jax.observability import trackers as trackers_module
from mla_jax.observability.environment import environment
from mla_jax.observability.trackers import Trackers, check_installed
from mla_jax.observability.trackers.mlflow import mlflow_uri
from tiny import make_config, train

ALL = TrackerConfig(names=["tensorboard", "wandb", "mlflow"], wandb_mode="offline")


@pytest.fixture(autouse=True)
def quiet(monkeypatch):
    monkeypatch.setenv("WANDB_SILENT", "true")
    for name in ("WANDB_MODE", "WANDB_API_KEY", "MLFLOW_TRACKING_URI"):
        monkeypatch.delenv(name, raising=False)


def config(run_dir: Path, names: list[str], **changes):
    run_dir.mkdir(parents=True, exist_ok=True)
    return make_config(run_dir, tracker=TrackerConfig(names=names, wandb_mode="offline"), **changes)


def mlflow_run(run_dir: Path):
    from mlflow import MlflowClient

    client = MlflowClient(tracking_uri=mlflow_uri(ALL, run_dir))
    (experiment,) = [e for e in client.search_experiments() if e.name == "infinitecontext"]
    (run,) = client.search_runs([experiment.experiment_id])
    return client, run


def mlflow_history(run_dir: Path, key: str) -> list[tuple[int, float]]:
    client, run = mlflow_run(run_dir)
    return [(m.step, m.value) for m in client.get_metric_history(run.info.run_id, key)]


def wandb_files(run_dir: Path) -> list[Path]:
    wandb.teardown()  # `finish` returns before the file is whole
    return sorted(run_dir.glob("wandb/offline-run-*/run-*.wandb"))


def tensorboard_history(run_dir: Path, key: str) -> list[tuple[int, float]]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(run_dir / "tensorboard"))
    events.Reload()
    return [(e.step, e.value) for e in events.Scalars(key)]


def steps_of_two_processes(run_dir: Path, names: list[str]) -> None:
    """Logs 3, 6, 9 and is killed; the checkpoint was at 4, so the next process logs 6, 9, 12."""
    first = Trackers(config(run_dir, names), run_dir, 0)
    for step in (3, 6, 9):
        first.log(step, {"train/loss": float(step)})
    first.close(finished=False)
    second = Trackers(config(run_dir, names, seed=7), run_dir, 4)
    for step in (6, 9, 12):
        second.log(step, {"train/loss": step + 0.5})
    second.close(finished=True)


def test_mlflow_goes_on_in_the_same_run_with_each_step_once(tmp_path):
    run_dir = tmp_path / "run"
    steps_of_two_processes(run_dir, ["mlflow"])
    assert mlflow_history(run_dir, "train/loss") == [(3, 3.0), (6, 6.0), (9, 9.0), (12, 12.5)]
    _, run = mlflow_run(run_dir)
    assert run.info.run_name == "run" and run.info.status == "FINISHED"
    assert run.data.params["model.hidden_size"] == "32" and run.data.params["seed"] == "0"
    assert run.data.tags["config.seed"] == "7" and "config.model.hidden_size" not in run.data.tags
    assert run.data.tags["environment.packages.jax"] == jax.__version__
    assert (tmp_path / "mlflow.db").exists()


def test_wandb_goes_on_in_the_same_run_with_each_step_once(tmp_path):
    run_dir = tmp_path / "run"
    steps_of_two_processes(run_dir, ["wandb"])
    first, second = wandb_files(run_dir)
    rows = [(row["_step"], row["train/loss"]) for row in wandb_file.history(first) + wandb_file.history(second)]
    assert rows == [(3, 3.0), (6, 6.0), (9, 9.0), (12, 12.5)]
    assert wandb_file.run(first).run_id == wandb_file.run(second).run_id
    written = {item.key: json.loads(item.value_json) for item in wandb_file.run(first).config.update}
    assert written["model"]["hidden_size"] == 32 and written["environment"]["device_count"] == jax.device_count()


def test_tensorboard_hides_what_is_logged_again(tmp_path):
    run_dir = tmp_path / "run"
    steps_of_two_processes(run_dir, ["tensorboard"])
    assert tensorboard_history(run_dir, "train/loss") == [(3, 3.0), (6, 6.5), (9, 9.5), (12, 12.5)]
    written = b"".join(p.read_bytes() for p in (run_dir / "tensorboard").iterdir())
    assert b"hidden_size: 32" in written and b"device_count: 8" in written


def test_the_environment_is_json_and_names_the_job(monkeypatch):
    monkeypatch.setenv("SLURM_JOB_ID", "17")
    found = json.loads(json.dumps(environment()))
    assert found["slurm_job_id"] == "17" and found["process_count"] == 1 and found["device_kind"] == "cpu"
    monkeypatch.setenv("PATH", "")
    assert environment()["git_revision"] is None


def test_only_the_first_process_tracks(tmp_path, monkeypatch):
    monkeypatch.setattr(jax, "process_index", lambda: 1)
    others = Trackers(config(tmp_path, ["tensorboard"]), tmp_path, 0)
    others.log(1, {"train/loss": 1.0})
    others.close(finished=True)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("missing", "extra"),
    [
        ("wandb", "wandb"),
        ("mlflow", "mlflow"),
        ("sqlalchemy", "mlflow"),
        ("alembic", "mlflow"),
        ("prometheus_client", "prometheus"),
    ],
)
def test_a_missing_package_names_the_extra(missing, extra, monkeypatch, tmp_path):
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == missing else find_spec(name))
    with pytest.raises(UsageError, match=rf"needs the package {missing}: pip install 'infinitecontext\[{extra}\]'"):
        train(make_config(tmp_path / "run", tracker=TrackerConfig(names=[extra])))
    assert not (tmp_path / "run").exists()
    check_installed(TrackerConfig(names=["tensorboard"]))


class Broken:
    """A tracker whose server is away."""

    def log(self, step, metrics):
        raise ConnectionError("no route\nto the server")

    def close(self, finished):
        raise ConnectionError("no route")


def test_a_tracker_that_fails_is_reported_once_and_the_others_go_on(tmp_path, monkeypatch, capsys):
    make = trackers_module._make
    monkeypatch.setattr(trackers_module, "_make", lambda name, *a: Broken() if name == "wandb" else make(name, *a))
    both = Trackers(config(tmp_path / "run", ["wandb", "tensorboard"]), tmp_path / "run", 0)
    for step in (1, 2):
        both.log(step, {"train/loss": 1.0})
    both.close(finished=True)
    assert capsys.readouterr().out == (
        "tracker wandb failed (no route); training goes on, later failures are not reported\n"
    )
    assert tensorboard_history(tmp_path / "run", "train/loss") == [(1, 1.0), (2, 1.0)]


def test_mlflow_that_fails_in_its_thread_is_reported(tmp_path, capsys):
    run_dir = tmp_path / "run"
    tracked = Trackers(config(run_dir, ["mlflow"]), run_dir, 0)
    tracked.log(1, {"train/loss": 1.0})
    tracker = tracked._trackers["mlflow"]
    tracker._check(timeout=30)

    def away(*args, **kwargs):
        raise ConnectionError("store is away")

    tracker._client.log_batch = away
    for step in (2, 3):
        tracked.log(step, {"train/loss": 2.0})
    tracked.close(finished=True)
    assert capsys.readouterr().out.count("tracker mlflow failed (store is away)") == 1
    assert mlflow_history(run_dir, "train/loss") == [(1, 1.0)]


def test_a_tracker_that_cannot_start_ends_a_new_run_but_not_a_resumed_one(tmp_path, monkeypatch, capsys):
    run_dir = tmp_path / "run"
    Trackers(config(run_dir, ["mlflow"]), run_dir, 0).close(finished=False)

    def away(*args):
        raise ConnectionError("refused")

    monkeypatch.setattr(trackers_module, "_make", away)
    resumed = Trackers(config(run_dir, ["mlflow"]), run_dir, 4)
    resumed.log(6, {"train/loss": 1.0})
    resumed.close(finished=True)
    assert "tracker mlflow cannot go on with run" in capsys.readouterr().out
    with pytest.raises(InputError, match=r"tracker mlflow cannot start \(refused\)"):
        Trackers(config(tmp_path / "new", ["mlflow"]), tmp_path / "new", 0)


WANDB_DIES = """
import os, signal, subprocess, sys, time
from pathlib import Path
sys.path.insert(0, "tests")
import wandb_file
from mla_jax.config import TrackerConfig
from mla_jax.observability.trackers import Trackers
from tiny import make_config
run_dir = Path(sys.argv[1])
run_dir.mkdir()
tracked = Trackers(make_config(run_dir, tracker=TrackerConfig(names=["wandb"], wandb_mode="offline")), run_dir, 0)
tracked.log(1, {"train/loss": 1.0})
while not any(map(wandb_file.history, run_dir.glob("wandb/offline-run-*/run-*.wandb"))):
    time.sleep(0.05)
children = subprocess.run(["ps", "--ppid", str(os.getpid()), "-o", "pid=,args="], capture_output=True, text=True)
(core,) = [line for line in children.stdout.splitlines() if "wandb-core" in line]
core = int(core.split()[0])
os.kill(core, signal.SIGTERM)
os.waitid(os.P_PID, core, os.WEXITED | os.WNOWAIT)
for step in (2, 3):
    tracked.log(step, {"train/loss": 1.0})
tracked.close(finished=False)
print("trained on")
"""


@pytest.mark.integration
def test_wandb_whose_process_is_terminated_keeps_what_it_had_and_training_goes_on(tmp_path):
    run_dir = tmp_path / "run"
    command = [sys.executable, "-c", WANDB_DIES, str(run_dir)]
    # WANDB_SERVICE would have it use this process's W&B.
    env = {key: value for key, value in os.environ.items() if key != "WANDB_SERVICE"}
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parent.parent.parent, env=env)
    assert done.returncode == 0 and "trained on" in done.stdout, done.stderr
    assert done.stdout.count("tracker wandb failed") == 1
    (file,) = wandb_files(run_dir)
    assert [row["_step"] for row in wandb_file.history(file)] == [1]
    assert json.loads((run_dir / trackers_module.FILE).read_text())["wandb"]["last_step"] == 1


def test_wandb_without_a_key_says_so(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))  # no .netrc
    monkeypatch.setenv("NETRC", str(tmp_path / "none"))
    online = make_config(tmp_path, tracker=TrackerConfig(names=["wandb"], wandb_mode="online"))
    with pytest.raises(InputError, match=r"tracker wandb cannot start \(No API key configured"):
        Trackers(online, tmp_path, 0)
    assert not (tmp_path / trackers_module.FILE).exists()


def test_a_damaged_file_of_ids_is_named(tmp_path):
    (tmp_path / trackers_module.FILE).write_text("[")
    with pytest.raises(InputError, match=r"trackers\.json cannot be read .* delete it"):
        Trackers(config(tmp_path, ["tensorboard"]), tmp_path, 0)


def test_mlflow_is_where_config_or_environment_say(tmp_path, monkeypatch):
    assert mlflow_uri(ALL, tmp_path / "run") == f"sqlite:///{tmp_path}/mlflow.db"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://localhost:5000")
    assert mlflow_uri(ALL, tmp_path / "run") == "http://localhost:5000"
    assert mlflow_uri(TrackerConfig(names=["mlflow"], mlflow_uri="http://other"), tmp_path) == "http://other"


class Killed(BaseException):
    """As if the process ended."""


@pytest.mark.integration
def test_a_run_killed_and_resumed_is_one_run_everywhere(tmp_path, monkeypatch):
    from mla_jax.training.loop import _Trainer

    run_dir = tmp_path / "run"
    whole = make_config(run_dir, [{"seq_len": 96, "steps": 8}], tracker=ALL, log_every=1, profile=[2, 3])
    step = _Trainer._step

    def killed_at(number):
        def _step(self):
            if self.loop.step == number:
                raise Killed
            step(self)

        return _step

    for number in (3, 6):  # before the first checkpoint, and after that of step 4
        monkeypatch.setattr(_Trainer, "_step", killed_at(number))
        with pytest.raises(Killed):
            train(whole)
    monkeypatch.setattr(_Trainer, "_step", step)
    assert train(whole).finished

    losses = dict(mlflow_history(run_dir, "train/loss"))
    assert [s for s, _ in mlflow_history(run_dir, "train/loss")] == list(range(1, 9))
    rows = [row for file in wandb_files(run_dir) for row in wandb_file.history(file)]
    assert {row["_step"]: row["train/loss"] for row in rows} == losses and len(rows) == 8
    assert len({wandb_file.run(file).run_id for file in wandb_files(run_dir)}) == 1 < len(wandb_files(run_dir))
    assert dict(tensorboard_history(run_dir, "train/loss")) == pytest.approx(losses, rel=1e-6)
    assert mlflow_run(run_dir)[1].info.status == "FINISHED"
    assert set(rows[-1]) >= {
        "train/tokens_per_second", "time/step_seconds", "time/compute", "time/data", "time/compile", "time/checkpoint",
        "time/other", "utilisation/tflops_per_device", "goodput/goodput", "goodput/lost", "goodput/restart",
    }  # fmt: skip
    assert sum(rows[-1][f"time/{kind}"] for kind in ("compute", "data", "compile", "checkpoint", "other")) == (
        pytest.approx(1)
    )
    assert rows[0]["time/compile"] > 0 and rows[-1]["time/compile"] == 0
    assert rows[-1]["goodput/lost"] > 0 and rows[2]["goodput/lost"] == 0
    assert list((run_dir / "profile").rglob("*.trace.json.gz"))
