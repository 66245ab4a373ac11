"""Experiment trackers: TensorBoard, Weights & Biases, MLflow, Prometheus, or several of them.

RUN/trackers.json keeps the id that each tracker knows the run by and the last step it was given, so a resumed run goes
on in the same run of each. Steps after the last checkpoint come twice then. TensorBoard hides the first ones, and
Prometheus is shown what is true now. W&B and MLflow cannot take back what they have (W&B ignores an older step, MLflow
keeps both), so they get no step twice.
"""

import dataclasses
import importlib.util
import json
from pathlib import Path

from mla_jax.config import RunConfig, TrackerConfig
from mla_jax.distributed.decisions import broadcast_decision
from mla_jax.distributed.join import is_main
from mla_jax.errors import InputError, UsageError, first_line
from mla_jax.files import write_json
from mla_jax.observability.environment import environment
from mla_jax.observability.trackers import mlflow, tensorboard, wandb
from mla_jax.observability.trackers.mlflow import MlflowTracker
from mla_jax.observability.trackers.prometheus import PrometheusTracker
from mla_jax.observability.trackers.tensorboard import TensorBoardTracker
from mla_jax.observability.trackers.tracker import Tracker
from mla_jax.observability.trackers.wandb import WandbTracker

FILE = "trackers.json"
_PACKAGES = {
    "wandb": ("wandb",),
    "mlflow": ("mlflow", "sqlalchemy", "alembic"),
    "prometheus": ("prometheus_client",),
}
"""What the extra of the tracker's name installs."""


class Trackers:
    """The trackers that the config names; none on processes but the first.

    One that fails while training is reported once and training goes on; it is tried again at the next metrics.

    Args:
        config: the run's configuration; `config.tracker` names the trackers.
        run_dir: the run folder, which must exist.
        step: finished steps that this process starts from.

    Raises:
        InputError: a tracker cannot start a new run, or RUN/trackers.json cannot be read.
    """

    def __init__(self, config: RunConfig, run_dir: Path, step: int):
        self._path = run_dir / FILE
        self._failed: set[str] = set()
        self._trackers: dict[str, Tracker] = {}
        if config.tracker.names:
            broadcast_decision(lambda: self._start(config, run_dir, step))

    def _start(self, config: RunConfig, run_dir: Path, step: int) -> None:
        if not is_main():
            return
        self._known = read_known(run_dir)
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
            if name in ("tensorboard", "prometheus") or step > known.get("last_step", -1):
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

    def _write(self) -> None:
        try:
            write_json(self._path, self._known, parents=False)
        except InputError as e:
            self._report(FILE, e)


def read_known(run_dir: Path) -> dict[str, dict]:
    """What RUN/trackers.json keeps, by name of the tracker. Raises InputError if it cannot be read."""
    path = run_dir / FILE
    if not path.exists():
        return {}
    try:
        return {name: dict(known) for name, known in json.loads(path.read_text(encoding="utf-8")).items()}
    except (OSError, ValueError, AttributeError, TypeError) as e:
        raise InputError(f"{path} cannot be read ({e}); delete it to begin new runs in the trackers") from e


def add_metrics(config: TrackerConfig, run_dir: Path, step: int, metrics: dict[str, float]) -> list[str]:
    """Adds metrics to what the trackers have of a run that was trained, at a step that it had reached.

    A tracker that fails is reported, and changes nothing for the others. Prometheus gets none: it asks what runs.

    Args:
        config: the run's trackers.
        run_dir: the run folder.
        step: of the checkpoint that the metrics are about.
        metrics: values by name.

    Returns:
        The trackers that have them now.
    """
    added = []
    for name in config.names:
        if name == "prometheus":
            continue
        try:
            check_installed(dataclasses.replace(config, names=[name]))
            known = read_known(run_dir).get(name, {})
            if name == "tensorboard":
                tensorboard.add_metrics(run_dir, step, metrics)
            elif "id" not in known:
                raise InputError(f"{run_dir / FILE} has no id of its run")
            else:
                {"wandb": wandb, "mlflow": mlflow}[name].add_metrics(config, run_dir, known["id"], step, metrics)
            added.append(name)
        except Exception as e:
            print(f"tracker {name} did not take the metrics ({first_line(e)})")
    return added


def check_installed(config: TrackerConfig) -> None:
    """Raises UsageError for the first tracker whose package is missing, naming the extra to install."""
    for name, packages in _PACKAGES.items():
        for package in packages if name in config.names else ():
            if importlib.util.find_spec(package) is None:
                raise UsageError(f"tracker {name} needs the package {package}: pip install 'infinitecontext[{name}]'")


def _make(name: str, config: RunConfig, run_dir: Path, step: int, known: dict, start: dict) -> Tracker:
    if name == "tensorboard":
        return TensorBoardTracker(run_dir, step, start)
    if name == "prometheus":
        return PrometheusTracker(config, run_dir, known)
    return {"wandb": WandbTracker, "mlflow": MlflowTracker}[name](config, run_dir, known, start)
