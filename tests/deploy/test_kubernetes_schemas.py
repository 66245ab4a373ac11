"""Every overlay renders, and is what each version of Kubernetes and of the custom resources takes, key by key."""

import json
import subprocess

import pytest
import yaml

from manifests import FOLDER, MODELS, OVERLAYS, Manifest, find, of_export, of_overlay, tool

pytestmark = pytest.mark.kubernetes
VERSIONS = [f"1.{minor}" for minor in range(30, 38)]
IMAGE_VOLUMES = "1.31"
"""The first version that knows them."""
GROUPS = ("gateway.networking.k8s.io", "keda.sh", "monitoring.coreos.com")
"""Of custom resources whose Go types are published as validators."""
UNPUBLISHED = ("inference.networking.k8s.io", "gateway.envoyproxy.io")
"""InferencePool and Envoy Gateway's policies: no package brings their types."""


def group(manifest: Manifest) -> str:
    return manifest["apiVersion"].rpartition("/")[0]


def own_kinds(manifests: list[Manifest]) -> list[Manifest]:
    """Those that Kubernetes itself knows."""
    return [m for m in manifests if group(m) not in (*GROUPS, *UNPUBLISHED)]


def validated(manifests: list[Manifest], version: str, folder) -> subprocess.CompletedProcess:
    path = folder / "manifests.yaml"
    path.write_text(yaml.safe_dump_all(manifests))
    command = [tool("kubernetes-validate"), "--strict", "-k", version, path]
    return subprocess.run(command, capture_output=True, text=True)


def wrong_custom_resources(manifests: list[Manifest]) -> list[str]:
    resources = json.dumps([m for m in manifests if group(m) in GROUPS])
    command = [tool("node"), FOLDER.parents[1] / "tests" / "deploy" / "custom_resources.mjs", MODELS]
    ran = subprocess.run(command, input=resources, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    return json.loads(ran.stdout)


@pytest.mark.parametrize("version", VERSIONS)
def test_every_object_is_what_this_version_takes(version, tmp_path):
    overlays = [o for o in OVERLAYS if o != "oci-model" or VERSIONS.index(version) >= VERSIONS.index(IMAGE_VOLUMES)]
    manifests = [m for overlay in overlays for m in own_kinds(of_overlay(overlay))] + own_kinds(of_export())
    ran = validated(manifests, version, tmp_path)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    assert (ran.stdout + ran.stderr).count("passed") == len(manifests)


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_custom_resources_are_what_their_types_take(overlay):
    assert wrong_custom_resources(of_overlay(overlay)) == []


def test_a_misspelt_key_is_found(tmp_path):
    """In objects of Kubernetes and in custom resources, or the tests above would not notice much."""
    manifests = of_overlay("keda")
    find(manifests, "Deployment")["spec"]["template"]["spec"]["terminationGracePeriod"] = 1
    ran = validated([find(manifests, "Deployment")], "1.37", tmp_path)
    assert ran.returncode != 0 and "terminationGracePeriod" in ran.stdout + ran.stderr
    find(manifests, "ScaledObject")["spec"]["triggers"][0]["treshold"] = "1"
    find(manifests, "HTTPRoute")["spec"]["rules"][0]["matches"][0]["method"] = "FETCH"
    unknown, not_allowed = sorted(wrong_custom_resources(manifests), reverse=True)
    assert unknown == "ScaledObject/vllm: /spec/triggers/0/treshold is unknown"
    assert not_allowed.startswith("HTTPRoute/vllm: data/spec/rules/0/matches/0/method must be")


def test_an_inference_pool_is_of_version_1():
    """Its fields are those of the published CRD of 2026-11."""
    pool = find(of_overlay("inference-pool"), "InferencePool")
    assert pool["apiVersion"] == "inference.networking.k8s.io/v1"
    spec = pool["spec"]
    assert set(spec) == {"selector", "targetPorts", "endpointPickerRef"}
    assert set(spec["endpointPickerRef"]) == {"name", "port", "failureMode"}
