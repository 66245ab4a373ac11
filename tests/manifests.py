"""The Kubernetes manifests as kustomize renders them, and the tools that `make kubernetes` installs."""

import copy
import functools
import os
import subprocess
from pathlib import Path

import yaml

ROOT = Path(__file__).resolve().parent.parent
FOLDER = ROOT / "deploy" / "kubernetes"
TOOLS = ROOT / ".venv-kubernetes" / "bin"
MODELS = ROOT / ".venv-kubernetes" / "crds" / "node_modules" / "@kubernetes-models"
OVERLAYS = sorted(path.name for path in (FOLDER / "overlays").iterdir())
RULES = ROOT / "deploy" / "monitoring" / "prometheus" / "rules" / "autoscaling.yaml"
EXPORTED = {
    "vllm:num_requests_running",
    "vllm:num_requests_waiting",
    "vllm:kv_cache_usage_perc",
    "vllm:request_prompt_tokens_sum",
    "vllm:request_prompt_tokens_count",
    "infinitecontext_queued_prompt_tokens",
}
"""Metrics that RULES read; tests/serving/test_vllm_rollout.py finds each on a vLLM that runs."""

Manifest = dict
"""One Kubernetes object."""


def tool(name: str) -> str:
    """The path of an installed tool; fails with what to do where it is missing."""
    path = TOOLS / name
    assert path.exists(), f"{path} is missing: make kubernetes"
    return str(path)


@functools.cache
def rendered(folder: Path) -> str:
    """What `kubectl kustomize` prints."""
    environment = {"PATH": os.environ["PATH"], "HOME": "/nonexistent"}
    ran = subprocess.run([tool("kubectl"), "kustomize", folder], capture_output=True, text=True, env=environment)
    assert ran.returncode == 0, ran.stderr
    return ran.stdout


@functools.cache
def _parsed(folder: str) -> list[Manifest]:
    return list(yaml.safe_load_all(rendered(FOLDER / folder)))


def of_folder(folder: str) -> list[Manifest]:
    """The objects of a folder of deploy/kubernetes, a copy of their own."""
    return copy.deepcopy(_parsed(folder))


def of_overlay(name: str) -> list[Manifest]:
    """The objects of an overlay."""
    return of_folder(f"overlays/{name}")


def of_export() -> list[Manifest]:
    """The objects of the export Job."""
    return of_folder("export")


def find(manifests: list[Manifest], kind: str, name: str | None = None) -> Manifest:
    """The one object of that kind, and name if given."""
    (found,) = (m for m in manifests if m["kind"] == kind and name in (None, m["metadata"]["name"]))
    return found


def has(manifests: list[Manifest], kind: str) -> bool:
    return any(m["kind"] == kind for m in manifests)


def pod(manifests: list[Manifest], kind: str = "Deployment") -> dict:
    """The spec of the pods of a Deployment or a Job."""
    return find(manifests, kind)["spec"]["template"]["spec"]


def server(manifests: list[Manifest]) -> dict:
    """The container that serves."""
    (container,) = pod(manifests)["containers"]
    return container


def settings(manifests: list[Manifest]) -> dict:
    """The flags of `vllm serve`."""
    (config,) = (m for m in manifests if m["kind"] == "ConfigMap" and "serve.yaml" in m["data"])
    return yaml.safe_load(config["data"]["serve.yaml"])
