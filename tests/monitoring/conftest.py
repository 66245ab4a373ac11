"""The real exporters that rules and dashboards are held against."""

import dataclasses

import pytest

from mla_jax.bridge.hf.export import export
from mla_jax.config import TrackerConfig
from mla_jax.data.tokenizer import load_tokenizer
from mla_jax.observability import telemetry
from mla_jax.observability.trackers.prometheus import PrometheusTracker
from monitoring_servers import free_address, start
from tiny import make_config, train
from vllm_server import PYTHON, WIDTH_576, random_params, serve


@pytest.fixture(scope="session")
def vllm(tmp_path_factory):
    """HOST:PORT of a server that answers one request at a time, so that others queue.

    Its model has so many layers that a step takes longer than vLLM's front end needs to pass a token on. Of one that is
    faster, nothing else is answered, /metrics neither, until all requests are.
    """
    if not PYTHON.exists():
        pytest.skip(f"{PYTHON} is missing; make vllm")
    slow = dataclasses.replace(WIDTH_576, num_hidden_layers=12)
    folder = export(slow, random_params(slow), load_tokenizer("bytes"), tmp_path_factory.mktemp("e") / "tiny")
    with serve(folder, "--max-num-seqs", "1") as server:
        yield f"127.0.0.1:{server.port}"


@pytest.fixture(scope="session")
def training(tmp_path_factory):
    """The file that tells Prometheus of a run, whose last metrics are there to be scraped."""
    run_dir = tmp_path_factory.mktemp("runs") / "tiny"
    run_dir.mkdir()
    stages = [{"seq_len": 96, "steps": 4}]
    config = make_config(run_dir, stages, tracker=TrackerConfig(names=["prometheus"]), log_every=1, validate_every=2)
    servers = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(telemetry, "nominal_peak", lambda kind: 1e12)  # none is known of a CPU: no MFU
        patch.setattr(PrometheusTracker, "close", lambda self, finished: servers.append(self))
        train(config)
    (tracker,) = servers
    (target,) = run_dir.parent.glob("prometheus_targets/*.json")
    yield target
    tracker.close(finished=True)


@pytest.fixture(scope="session")
def node(tmp_path_factory):
    """HOST:PORT of a node-exporter."""
    log = tmp_path_factory.mktemp("node") / "log"
    with (
        free_address() as address,
        start("prometheus-node-exporter", f"http://{address}/metrics", log, f"--web.listen-address={address}"),
    ):
        yield address
