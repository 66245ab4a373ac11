"""Metrics for Prometheus to scrape while training runs."""

import contextlib
import re
import socket
import time
from pathlib import Path

from mla_jax.config import RunConfig, TrackerConfig
from mla_jax.errors import InputError
from mla_jax.files import write_json
from mla_jax.hardware import GIB

PREFIX = "mla_jax_"
_EVERY_ADDRESS = ("0.0.0.0", "::")


class PrometheusTracker:
    """An HTTP server with the last metrics in Prometheus' text format, at /metrics.

    A metric is a gauge of its own name with `mla_jax_` before it and `_` for `/`, labelled with the run; shares of
    the run's time are in seconds, badput by cause (docs/monitoring.md).

    A file in the folder of targets lets a Prometheus with `file_sd_configs` find the run. It goes when the run is
    finished: one that was stopped or killed is a target that is down, until it is resumed.

    `known["url"]` is where the metrics are.
    """

    def __init__(self, config: RunConfig, run_dir: Path, known: dict):
        from prometheus_client import CollectorRegistry, start_http_server

        tracker = config.tracker
        self._registry, self._gauges = CollectorRegistry(), {}
        # Runs of a sweep have one name, and folders named by what is swept.
        self._run = config.name if config.name == run_dir.name else f"{config.name}/{run_dir.name}"
        self._server, self._thread = start_http_server(
            tracker.prometheus_port, tracker.prometheus_host, registry=self._registry
        )
        host = socket.getfqdn() if tracker.prometheus_host in _EVERY_ADDRESS else tracker.prometheus_host
        address = f"{f'[{host}]' if ':' in host else host}:{self._server.server_port}"
        known["url"] = f"http://{address}/metrics"
        print(f"Metrics for Prometheus: {known['url']}", flush=True)
        self._target = targets_folder(tracker, run_dir) / f"{self._run.replace('/', '_')}.json"
        try:
            write_json(self._target, [{"targets": [address], "labels": {"run": self._run}}])
        except InputError:
            self._stop()
            raise

    def log(self, step: int, metrics: dict[str, float]) -> None:
        """Shows `metrics` from now on, beside those that are not measured at every step."""
        now = time.time()
        shown = dict(metrics)
        self._set("step", step)
        self._set("updated_timestamp_seconds", now)
        if (age := shown.pop("time/since_checkpoint_seconds", None)) is not None:
            self._set("checkpoint_timestamp_seconds", now - age)
        if (gib := shown.pop("memory/peak_gib", None)) is not None:
            self._set("memory_peak_bytes", gib * GIB)
        wall = shown.get("time/run_seconds", 0.0)
        for name, value in shown.items():
            group, _, part = name.partition("/")
            if name == "goodput/goodput":
                self._set("goodput_seconds", value * wall)
            elif group == "goodput":
                self._set("badput_seconds", value * wall, cause=part)
            elif group == "time" and not part.endswith("_seconds"):
                self._set("time_ratio", value, kind=part)
            else:
                self._set(name, value)

    def _set(self, name: str, value: float, **labels: str) -> None:
        from prometheus_client import Gauge

        if name not in self._gauges:
            legal = PREFIX + re.sub(r"\W", "_", name, flags=re.ASCII)
            self._gauges[name] = Gauge(legal, name, ["run", *labels], registry=self._registry)
        self._gauges[name].labels(run=self._run, **labels).set(value)

    def close(self, finished: bool) -> None:
        """Ends the server; a run that is finished is no target any more."""
        self._stop()
        if finished:
            with contextlib.suppress(OSError):
                self._target.unlink(missing_ok=True)

    def _stop(self) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


def targets_folder(config: TrackerConfig, run_dir: Path) -> Path:
    """The folder for `file_sd_configs`: as configured, else prometheus_targets beside the run folder."""
    return Path(config.prometheus_targets or run_dir.resolve().parent / "prometheus_targets")
