"""Where metrics go besides the terminal: TensorBoard, Weights & Biases, MLflow, or several of them.

RUN/trackers.json keeps the id that each tracker knows the run by and the last step it was given, so a resumed run goes
on in the same run of each. Steps after the last checkpoint come twice then. TensorBoard hides the first ones. W&B and
MLflow cannot take back what they have (W&B ignores an older step, MLflow keeps both), so they get no step twice.
"""

import dataclasses
import importlib.util
import json
import os
import time
import uuid
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, Protocol

import jax
import yaml

from mla_jax.config import SftConfig, TrackerConfig, flatten
from mla_jax.distributed.decisions import broadcast_decision
from mla_jax.errors import InputError, UsageError, first_line
from mla_jax.observability.environment import environment

FILE = "trackers.json"
_CLOSE_SECONDS = 20
"""The longest that the end of training waits for a tracker's server: a job that is being stopped has little time."""


class Tracker(Protocol):
    """Takes scalar metrics by optimizer step."""

    def log(self, step: int, metrics: dict[str, float]) -> None:
        """Records `metrics` at `step`."""
        ...

    def close(self, finished: bool) -> None:
        """Writes what is buffered; `finished` is False if training stops before its end."""
        ...


class Trackers:
    """The trackers that the config names; none on processes but the first.

    One that fails while training is reported once and training goes on; it is tried again at the next metrics.

    Args:
        config: of the run; `config.tracker` says which.
        run_dir: the run folder, which must exist.
        step: finished steps that this process starts from.

    Raises:
        InputError: a tracker cannot start a new run, or RUN/trackers.json cannot be read.
    """

    def __init__(self, config: SftConfig, run_dir: Path, step: int):
        self._path = run_dir / FILE
        self._failed: set[str] = set()
        self._trackers: dict[str, Tracker] = {}
        if config.tracker.names:
            broadcast_decision(lambda: self._start(config, run_dir, step))

    def _start(self, config: SftConfig, run_dir: Path, step: int) -> None:
        if jax.process_index() != 0:
            return
        self._known = self._read()
        start = {"config": dataclasses.asdict(config), "environment": environment()}
        for name in config.tracker.names:
            known = self._known.get(name, {})
            try:
                self._trackers[name] = _make(name, config, run_dir, step, known, start)
            except Exception as e:
                if name not in self._known:
                    raise InputError(
                        f"tracker {name} cannot start ({first_line(e)}); see docs/training.md, or leave it out of "
                        "tracker.names"
                    ) from e
                # A run that is requeued at night shall not end because a server is away.
                print(
                    f"tracker {name} cannot go on with run {known.get('id')} ({first_line(e)}); training goes on "
                    f"without it; to begin a new run there, delete {self._path}"
                )
            self._known[name] = known
        self._write()

    def log(self, step: int, metrics: dict[str, float]) -> None:
        """Records `metrics` at `step` with all trackers."""
        for name, tracker in self._trackers.items():
            known = self._known[name]
            if name == "tensorboard" or step > known.get("last_step", -1):
                try:
                    tracker.log(step, metrics)
                    known["last_step"] = step
                except Exception as e:
                    self._report(name, e)
        if self._trackers:
            self._write()

    def close(self, finished: bool) -> None:
        """Writes what is buffered; `finished` is False if training stops before its end."""
        for name, tracker in self._trackers.items():
            try:
                tracker.close(finished)
            except Exception as e:
                self._report(name, e)

    def _report(self, name: str, e: Exception) -> None:
        if name not in self._failed:
            self._failed.add(name)
            print(f"tracker {name} failed ({first_line(e)}); training goes on, later failures are not reported")

    def _read(self) -> dict[str, dict]:
        if not self._path.exists():
            return {}
        try:
            return {name: dict(known) for name, known in json.loads(self._path.read_text(encoding="utf-8")).items()}
        except (OSError, ValueError, AttributeError, TypeError) as e:
            raise InputError(f"{self._path} cannot be read ({e}); delete it to begin new runs in the trackers") from e

    def _write(self) -> None:
        partial = self._path.with_suffix(".partial")
        try:
            partial.write_text(json.dumps(self._known, indent=1), encoding="utf-8")
            partial.replace(self._path)
        except OSError as e:
            self._report(FILE, e)


class TensorBoardTracker:
    """Event files in RUN/tensorboard; what was logged after step `step` by an interrupted process is hidden."""

    def __init__(self, run_dir: Path, step: int, start: dict):
        from tensorboardX import SummaryWriter

        # Files are named by the second: the suffix keeps apart processes that start within one.
        suffix = f".from{step + 1}"
        self._writer = SummaryWriter(str(run_dir / "tensorboard"), purge_step=step + 1, filename_suffix=suffix)
        self._writer.add_text("start", f"```yaml\n{yaml.safe_dump(start, sort_keys=False)}```", step + 1)

    def log(self, step: int, metrics: dict[str, float]) -> None:
        """Writes one event for each metric."""
        for name, value in metrics.items():
            self._writer.add_scalar(name, value, step)

    def close(self, finished: bool) -> None:
        """Writes what is buffered."""
        self._writer.close()


class WandbTracker:
    """A run on a W&B server, or files in RUN/wandb for `wandb sync`. Account and key are W&B's own business.

    `known["id"]` is the run's id, chosen here the first time.
    """

    def __init__(self, config: SftConfig, run_dir: Path, known: dict, start: dict):
        import wandb

        known.setdefault("id", uuid.uuid4().hex[:12])
        mode: Any = config.tracker.wandb_mode  # None: WANDB_MODE decides
        self._run = wandb.init(
            project=config.tracker.project,
            name=config.name,
            id=known["id"],
            resume="allow",
            mode=mode,
            dir=str(run_dir),
            config=start["config"] | {"environment": start["environment"]},
            allow_val_change=True,  # a resumed run may have another config
            settings=wandb.Settings(
                console="off",
                finish_timeout=_CLOSE_SECONDS,
                x_transaction_log_flush_interval=1.0,  # a killed process loses metrics of so many seconds, not of 15
            ),
        )

    def log(self, step: int, metrics: dict[str, float]) -> None:
        """Hands the metrics to W&B's own process."""
        self._run.log(metrics, step=step, commit=True)

    def close(self, finished: bool) -> None:
        """Waits for uploads; a run that was stopped counts as failed until it is resumed."""
        self._run.finish(exit_code=0 if finished else 1)


class MlflowTracker:
    """A run in an MLflow store. The config becomes its parameters, the environment its tags.

    Parameters cannot change: what differs after a restart becomes tags `config.KEY`. A server that is slow or away
    holds up a thread, not training. `known["id"]` is the run's id, given by the store the first time.
    """

    def __init__(self, config: SftConfig, run_dir: Path, known: dict, start: dict):
        os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")  # training jobs should not call home
        from mlflow import MlflowClient
        from mlflow.entities import Param, RunTag

        self._client = MlflowClient(tracking_uri=mlflow_uri(config.tracker, run_dir))
        params = _as_text(start["config"])
        tags = {f"environment.{key}": value for key, value in _as_text(start["environment"]).items()}
        if "id" in known:
            stored = self._client.get_run(known["id"]).data.params
            tags |= {f"config.{key}": value for key, value in params.items() if stored.get(key) != value}
            self._client.update_run(known["id"], status="RUNNING")
        else:
            run = self._client.create_run(self._experiment(config.tracker.project), run_name=config.name)
            known["id"] = run.info.run_id
            for part in _parts([Param(key, value) for key, value in params.items()]):
                self._client.log_batch(known["id"], params=part)
        for part in _parts([RunTag(key, value) for key, value in tags.items()]):
            self._client.log_batch(known["id"], tags=part)
        self._id = known["id"]
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="mlflow")
        self._sent: list[Future] = []

    def _experiment(self, name: str) -> str:
        from mlflow.exceptions import MlflowException

        found = self._client.get_experiment_by_name(name)
        if found is None:
            try:
                return self._client.create_experiment(name)
            except MlflowException:  # another run of a sweep was faster
                found = self._client.get_experiment_by_name(name)
                if found is None:
                    raise
        return found.experiment_id

    def log(self, step: int, metrics: dict[str, float]) -> None:
        """Hands the metrics to the thread; raises what an earlier call failed with."""
        from mlflow.entities import Metric

        now = int(time.time() * 1000)
        batch = [Metric(name, float(value), now, step) for name, value in metrics.items()]
        self._sent.append(self._thread.submit(self._client.log_batch, self._id, metrics=batch))
        self._check(timeout=0)

    def close(self, finished: bool) -> None:
        """Marks the run FINISHED, or KILLED if it was stopped."""
        end = "FINISHED" if finished else "KILLED"
        self._sent.append(self._thread.submit(self._client.set_terminated, self._id, end))
        try:
            self._check(timeout=_CLOSE_SECONDS)
        finally:
            self._thread.shutdown(wait=False, cancel_futures=True)

    def _check(self, timeout: float) -> None:
        """Raises the first error of the calls that are done, after waiting for all of them for at most `timeout`."""
        deadline = time.monotonic() + timeout
        sent, self._sent = self._sent, []
        failures = []
        for call in sent:
            try:
                call.result(max(deadline - time.monotonic(), 0))
            except TimeoutError:
                self._sent.append(call)
            except Exception as e:
                failures.append(e)
        if timeout and self._sent:
            failures.append(TimeoutError(f"no answer for {timeout} s"))
        if failures:
            raise failures[0]


def mlflow_uri(config: TrackerConfig, run_dir: Path) -> str:
    """Where MLflow's store is: as configured, else MLFLOW_TRACKING_URI, else mlflow.db beside the run folder."""
    beside = f"sqlite:///{run_dir.resolve().parent / 'mlflow.db'}"
    return config.mlflow_uri or os.environ.get("MLFLOW_TRACKING_URI") or beside


def check_installed(config: TrackerConfig) -> None:
    """Raises UsageError for the first tracker whose package is missing, naming the extra to install."""
    for name, package in (("wandb", "wandb"), ("mlflow", "mlflow"), ("mlflow", "sqlalchemy"), ("mlflow", "alembic")):
        if name in config.names and importlib.util.find_spec(package) is None:
            raise UsageError(f"tracker {name} needs the package {package}: pip install 'infinitecontext[{name}]'")


def _make(name: str, config: SftConfig, run_dir: Path, step: int, known: dict, start: dict) -> Tracker:
    if name == "tensorboard":
        return TensorBoardTracker(run_dir, step, start)
    return {"wandb": WandbTracker, "mlflow": MlflowTracker}[name](config, run_dir, known, start)


def _as_text(tree: dict) -> dict[str, str]:
    """Values by dotted key, as text of at most the 6,000 characters that MLflow takes."""
    return {
        key: (value if isinstance(value, str) else json.dumps(value))[:6000] for key, value in flatten(tree).items()
    }


def _parts(items: list) -> list[list]:
    """Lists of at most 100, which one request to MLflow takes."""
    return [items[i : i + 100] for i in range(0, len(items), 100)]
