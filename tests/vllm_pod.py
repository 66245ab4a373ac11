"""A vLLM server as the Deployment of the manifests starts it."""

import contextlib
import dataclasses
import os
import re
import signal
import subprocess
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import yaml

from manifests import Manifest, server, settings
from vllm_server import LONGEST, PYTHON, alive

KEY = "a key for this test"


@dataclasses.dataclass
class Pod:
    """A vLLM server with its processes."""

    port: int
    process: subprocess.Popen
    config: Path
    log: Path

    def metrics(self) -> str:
        with urllib.request.urlopen(f"http://127.0.0.1:{self.port}/metrics", timeout=60) as response:
            return response.read().decode()

    def metric(self, name: str) -> float:
        """The sum over labels."""
        return sum(float(v) for v in re.findall(rf"^{name}(?:{{.*}})? (\S+)$", self.metrics(), re.M))

    @contextlib.contextmanager
    def engine_held(self) -> Iterator[None]:
        """Inside it the server takes requests and its engine, a process of its own, does nothing."""
        tasks = Path(f"/proc/{self.process.pid}/task").glob("*/children")
        children = [int(child) for task in tasks for child in task.read_text().split()]
        for child in children:
            os.kill(child, signal.SIGSTOP)
        try:
            yield
        finally:
            for child in children:
                os.kill(child, signal.SIGCONT)

    def kill(self) -> None:
        if alive(self.process.pid):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()


def start(manifests: list[Manifest], model: Path, folder: Path, port: int, length: int = LONGEST) -> Pod:
    """The container of the Deployment, with another model, port and greatest length."""
    changed = {"model": str(model), "served-model-name": "tiny", "port": port, "max-model-len": length}
    config, log = folder / f"{port}.yaml", folder / f"{port}.log"
    config.write_text(yaml.safe_dump({**settings(manifests), **changed, "host": "127.0.0.1"}))
    container = {e["name"]: e["value"] for e in server(manifests)["env"] if "value" in e}
    ours = ("INFINITECONTEXT_VLLM", "TRITON_INTERPRET")  # stock vLLM knows this model's width, and is faster
    paths = {name for name, value in container.items() if value.startswith("/")}
    variables = {name: value for name, value in container.items() if name not in paths.union(ours)}
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("XLA_", "JAX_", "PYTHONPATH"))}
    command = [PYTHON, "-m", "vllm.entrypoints.openai.api_server", "--config", config]
    with log.open("w") as out:
        process = subprocess.Popen(
            command, env={**kept, **variables, "VLLM_API_KEY": KEY}, stdout=out, stderr=subprocess.STDOUT, cwd=folder,
            start_new_session=True,
        )  # fmt: skip
    return Pod(port, process, config, log)
