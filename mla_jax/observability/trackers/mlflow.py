"""Metrics in an MLflow store."""

import json
import os
import time
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

from mla_jax.config import RunConfig, TrackerConfig, flatten
from mla_jax.observability.trackers.tracker import CLOSE_SECONDS


class MlflowTracker:
    """A run in an MLflow store. The config becomes its parameters, the environment its tags.

    Parameters cannot change: what differs after a restart becomes tags `config.KEY`. A server that is slow or away
    holds up a thread, not training. `known["id"]` is the run's id, given by the store the first time.
    """

    def __init__(self, config: RunConfig, run_dir: Path, known: dict, start: dict):
        self._client = _client(config.tracker, run_dir)
        from mlflow.entities import Param, RunTag

        params = _as_text(start["config"])
        tags = {f"environment.{key}": value for key, value in _as_text(start["environment"]).items()}
        if "id" in known:
            stored = self._client.get_run(known["id"]).data.params
            tags |= {f"config.{key}": value for key, value in params.items() if stored.get(key) != value}
            self._client.update_run(known["id"], status="RUNNING")
        else:
            run = self._client.create_run(self._experiment(config.tracker.project), run_name=config.name)
            known["id"] = run.info.run_id
            for part in _in_batches([Param(key, value) for key, value in params.items()]):
                self._client.log_batch(known["id"], params=part)
        for part in _in_batches([RunTag(key, value) for key, value in tags.items()]):
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
        batch = _as_entities(step, metrics)
        self._sent.append(self._thread.submit(self._client.log_batch, self._id, metrics=batch))
        self._check(timeout=0)

    def close(self, finished: bool) -> None:
        """Marks the run FINISHED, or KILLED if it was stopped."""
        end = "FINISHED" if finished else "KILLED"
        self._sent.append(self._thread.submit(self._client.set_terminated, self._id, end))
        try:
            self._check(timeout=CLOSE_SECONDS)
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


def add_metrics(config: TrackerConfig, run_dir: Path, run_id: str, step: int, metrics: dict[str, float]) -> None:
    """Adds metrics to a run, whose status stays."""
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")  # by default a server that is away takes minutes
    client = _client(config, run_dir)
    for part in _in_batches(_as_entities(step, metrics)):
        client.log_batch(run_id, metrics=part)


def _client(config: TrackerConfig, run_dir: Path) -> Any:
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")  # training jobs should not call home
    from mlflow import MlflowClient

    return MlflowClient(tracking_uri=mlflow_uri(config, run_dir))


def _as_entities(step: int, metrics: dict[str, float]) -> list:
    from mlflow.entities import Metric

    now = int(time.time() * 1000)
    return [Metric(name, float(value), now, step) for name, value in metrics.items()]


def mlflow_uri(config: TrackerConfig, run_dir: Path) -> str:
    """Address of MLflow's store: as configured, else MLFLOW_TRACKING_URI, else mlflow.db beside the run folder."""
    beside = f"sqlite:///{run_dir.resolve().parent / 'mlflow.db'}"
    return config.mlflow_uri or os.environ.get("MLFLOW_TRACKING_URI") or beside


def _as_text(tree: dict) -> dict[str, str]:
    """Values by dotted key, as text of at most the 6,000 characters that MLflow takes."""
    return {
        key: (value if isinstance(value, str) else json.dumps(value))[:6000] for key, value in flatten(tree).items()
    }


def _in_batches(items: list) -> list[list]:
    """Lists of at most 100, which one request to MLflow takes."""
    return [items[i : i + 100] for i in range(0, len(items), 100)]
