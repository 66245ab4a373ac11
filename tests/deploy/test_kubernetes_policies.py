"""What must hold in every overlay: security, selectors, drain, and what a person sees when something is missing."""

import itertools
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from experiments.entry import compose_config
from manifests import (
    FOLDER,
    OVERLAYS,
    find,
    has,
    of_export,
    of_folder,
    of_overlay,
    pod,
    rendered,
    server,
    settings,
    tool,
)
from mla_jax.inference.serving_plan import MARGIN, PRE_STOP, ServingPlan

pytestmark = pytest.mark.kubernetes
ON_GPU = [overlay for overlay in OVERLAYS if overlay != "dev"]
SKIPPED = {
    "CKV_K8S_11": "a CPU limit throttles the process that feeds the GPU; the request and the memory limit are set",
    "CKV_K8S_15": "images are pinned by digest, so pulling them again changes nothing",
    "CKV_K8S_35": "vLLM reads its key from the environment",
    "CKV_K8S_40": "UID 2000 is the user of vLLM's image",
    "CKV_K8S_43": "digests are set at release; check_images.py refuses an overlay without",
}
"""Checks of checkov that are not ours, with reasons."""


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_pods_are_restricted(overlay):
    manifests = of_overlay(overlay)
    labels = find(manifests, "Namespace")["metadata"]["labels"]
    assert labels["pod-security.kubernetes.io/enforce"] == "restricted"
    for spec in (pod(manifests), pod(of_export(), "Job")):
        assert spec["securityContext"]["runAsNonRoot"] and spec["securityContext"]["runAsUser"] != 0
        assert spec["securityContext"]["seccompProfile"]["type"] == "RuntimeDefault"
        assert spec["automountServiceAccountToken"] is False and spec["enableServiceLinks"] is False
        for container in spec["containers"] + spec.get("initContainers", []):
            context = container["securityContext"]
            assert context["readOnlyRootFilesystem"] is True and context["allowPrivilegeEscalation"] is False
            assert context["capabilities"] == {"drop": ["ALL"]}
            assert container["terminationMessagePolicy"] == "FallbackToLogsOnError"
            assert "memory" in container["resources"]["limits"] and "cpu" in container["resources"]["requests"]


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_what_the_server_writes_is_on_a_volume(overlay):
    manifests = of_overlay(overlay)
    mounts = {mount["mountPath"]: mount for mount in server(manifests)["volumeMounts"]}
    volumes = {volume["name"]: volume for volume in pod(manifests)["volumes"]}
    assert mounts["/models"]["readOnly"] and mounts["/etc/vllm"]["readOnly"]
    for path in ("/cache", "/tmp", "/dev/shm"):
        assert "emptyDir" in volumes[mounts[path]["name"]] and not mounts[path].get("readOnly")
    assert volumes[mounts["/dev/shm"]["name"]]["emptyDir"]["medium"] == "Memory"
    written = {e["value"] for e in server(manifests)["env"] if e.get("value", "").startswith("/")}
    assert written and all(path.startswith("/cache") for path in written)


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_selectors_find_the_pods_and_ports_lead_to_the_server(overlay):
    manifests = of_overlay(overlay)
    deployment = find(manifests, "Deployment")
    labels = deployment["spec"]["template"]["metadata"]["labels"]
    (port,) = server(manifests)["ports"]
    assert port["containerPort"] == settings(manifests)["port"]
    selectors = [
        deployment["spec"]["selector"]["matchLabels"],
        find(manifests, "Service")["spec"]["selector"],
        find(manifests, "PodDisruptionBudget")["spec"]["selector"]["matchLabels"],
        find(manifests, "NetworkPolicy", "vllm")["spec"]["podSelector"]["matchLabels"],
    ]
    if has(manifests, "PodMonitor"):
        monitor = find(manifests, "PodMonitor")["spec"]
        selectors.append(monitor["selector"]["matchLabels"])
        assert [endpoint["port"] for endpoint in monitor["podMetricsEndpoints"]] == [port["name"]]
    if has(manifests, "InferencePool"):
        pool = find(manifests, "InferencePool")["spec"]
        selectors.append(pool["selector"]["matchLabels"])
        assert pool["targetPorts"] == [{"number": port["containerPort"]}]
    for constraint in pod(manifests).get("topologySpreadConstraints", []):
        selectors.append(constraint["labelSelector"]["matchLabels"])
    for selector in selectors:
        assert selector and selector.items() <= labels.items()
    (service_port,) = find(manifests, "Service")["spec"]["ports"]
    assert service_port["targetPort"] == port["name"]
    for probe in ("startupProbe", "readinessProbe", "livenessProbe"):
        assert server(manifests)[probe]["httpGet"] == {"path": "/health", "port": port["name"]}


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_everything_is_in_the_namespace(overlay):
    manifests = of_overlay(overlay)
    namespace = find(manifests, "Namespace")["metadata"]["name"]
    assert {m["metadata"].get("namespace", namespace) for m in manifests} == {namespace}


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_the_network_is_closed_but_for_the_gateway_and_prometheus(overlay):
    manifests = of_overlay(overlay)
    denied = find(manifests, "NetworkPolicy", "deny-all")["spec"]
    assert denied == {"podSelector": {}, "policyTypes": ["Ingress", "Egress"]}
    policy = find(manifests, "NetworkPolicy", "vllm")["spec"]
    assert policy["policyTypes"] == ["Ingress"] and "egress" not in policy
    (rule,) = policy["ingress"]
    namespaces = [peer["namespaceSelector"]["matchLabels"]["kubernetes.io/metadata.name"] for peer in rule["from"]]
    assert namespaces == ["envoy-gateway-system", "monitoring"]
    assert all(set(peer) == {"namespaceSelector"} for peer in rule["from"])


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_no_secret_is_in_the_manifests_and_a_missing_one_keeps_the_pod_from_starting(overlay):
    manifests = of_overlay(overlay)
    assert not has(manifests, "Secret")
    (key,) = (e for e in server(manifests)["env"] if e["name"] == "VLLM_API_KEY")
    reference = key["valueFrom"]["secretKeyRef"]
    assert not reference.get("optional") and "value" not in key
    assert "api-key" not in settings(manifests)


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_a_pod_that_goes_has_time_for_what_it_took(overlay):
    """The last request may have come when preStop ended; SIGKILL must come after everything was answered."""
    manifests = of_overlay(overlay)
    (config,) = (m["data"] for m in manifests if m["kind"] == "ConfigMap" and "serve.yaml" in m["data"])
    script = Path(server(manifests)["lifecycle"]["preStop"]["exec"]["command"][-1])
    assert script.parent == Path("/etc/vllm") and f"\nNOTICE = {PRE_STOP}\n" in config[script.name]
    shutdown = settings(manifests)["shutdown-timeout"]
    assert pod(manifests)["terminationGracePeriodSeconds"] >= PRE_STOP + shutdown + MARGIN
    rolling = find(manifests, "Deployment")["spec"]["strategy"]["rollingUpdate"]
    assert rolling == {"maxSurge": 1, "maxUnavailable": 0}
    assert PRE_STOP < server(manifests)["livenessProbe"]["terminationGracePeriodSeconds"] <= 60, "but not if it hangs"


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_a_server_has_time_to_start_and_says_why_it_did_not(overlay):
    manifests = of_overlay(overlay)
    probe = server(manifests)["startupProbe"]
    seconds = probe["periodSeconds"] * probe["failureThreshold"]
    assert seconds >= 600
    assert find(manifests, "Deployment")["spec"]["progressDeadlineSeconds"] > seconds
    assert pod(manifests)["initContainers"][0]["name"] == "verify-model"


def planned(flags: dict) -> ServingPlan:
    model = compose_config([f"model={flags['served-model-name'].replace('-', '_')}"]).model
    return ServingPlan.of(model, "h200", flags["max-model-len"], flags["override-generation-config"]["max_new_tokens"])


@pytest.mark.parametrize("folder", ["base", *(f"overlays/{overlay}" for overlay in ON_GPU)])
def test_times_and_limits_are_those_computed_from_the_model(folder):
    """`python -m tools.plan_serving`; the cache holds one request of the greatest length or this raises."""
    flags = settings(of_folder(folder))
    plan = planned(flags)
    assert flags["shutdown-timeout"] == pytest.approx(plan.shutdown_timeout, rel=0.02)
    assert flags["shutdown-timeout"] >= plan.shutdown_timeout > plan.longest_prefill
    assert flags["max-num-queued-tokens"] == pytest.approx(plan.max_num_queued_tokens, rel=0.01)
    assert flags["max-num-seqs"] * 4096 < plan.cache_tokens


@pytest.mark.parametrize("overlay", ON_GPU)
def test_histograms_see_the_fastest_token_and_the_longest_prompt(overlay):
    flags = settings(of_overlay(overlay))
    buckets, plan = flags["custom-histogram-buckets"], planned(flags)
    between, first, whole = (
        buckets[name] for name in ("inter_token_latency", "time_to_first_token", "request_latency")
    )
    assert sum(bound < 0.0006 for bound in between) >= 2
    assert first[-1] > 3 * plan.longest_prefill * 0.9 and whole[-1] > plan.shutdown_timeout
    for bounds in buckets.values():
        assert bounds == sorted(bounds)
    steps = [b / a for a, b in itertools.pairwise(first) if a >= 60]
    assert max(steps) <= 1.5, "minutes are told apart"


@pytest.mark.parametrize("overlay", ON_GPU)
def test_the_gateway_lets_through_what_the_key_guards_and_waits_as_long_as_a_pod_works(overlay):
    manifests = of_overlay(overlay)
    rules = find(manifests, "HTTPRoute")["spec"]["rules"]
    matches = [match for rule in rules for match in rule["matches"]]
    assert all(match["path"]["type"] == "Exact" and match["path"]["value"].startswith("/v1/") for match in matches)
    assert {match["path"]["value"] for match in matches} == {"/v1/models", "/v1/completions", "/v1/chat/completions"}
    assert all("method" in match for match in matches)
    assert int(rules[1]["timeouts"]["request"].removesuffix("s")) >= settings(manifests)["shutdown-timeout"]
    backends = [backend["name"] for rule in rules for backend in rule["backendRefs"]]
    assert set(backends) == {"vllm"}
    kept = find(manifests, "BackendTrafficPolicy")["spec"]["timeout"]["http"]["connectionIdleTimeout"]
    (by_vllm,) = (e["value"] for e in server(manifests)["env"] if e["name"] == "VLLM_HTTP_TIMEOUT_KEEP_ALIVE")
    assert int(kept.removesuffix("s")) < int(by_vllm), "or a request meets a connection that is being closed"
    (listener,) = find(manifests, "Gateway")["spec"]["listeners"]
    assert listener["protocol"] == "HTTPS"
    assert find(manifests, "HTTPRoute")["spec"]["hostnames"] == [listener["hostname"]]


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_a_gpu_where_one_is_needed(overlay):
    limits = server(of_overlay(overlay))["resources"]["limits"]
    assert limits.get("nvidia.com/gpu") == (None if overlay == "dev" else 1)


def test_the_model_from_a_registry_replaces_the_volume():
    manifests = of_overlay("oci-model")
    assert not has(manifests, "PersistentVolumeClaim")
    (volume,) = (v for v in pod(manifests)["volumes"] if v["name"] == "models")
    assert set(volume) == {"name", "image"}


def check_images(text: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, FOLDER / "check_images.py"], input=text, capture_output=True, text=True)


@pytest.mark.parametrize("overlay", ON_GPU)
def test_images_without_a_digest_are_refused_until_they_are_set(overlay):
    text = rendered(FOLDER / "overlays" / overlay)
    refused = check_images(text)
    assert refused.returncode == 1 and "its registry is an example" in refused.stderr
    for digest, code, message in (
        ("0" * 64, 1, "its digest is none"),
        ("abc", 1, "its digest is none"),
        ("0123456789abcdef" * 4, 0, ""),
    ):
        pinned = re.sub(r"registry\.example\.com/([a-z0-9-]+):unreleased", rf"ghcr.io/me/\1@sha256:{digest}", text)
        ran = check_images(pinned)
        assert ran.returncode == code and message in ran.stderr
    assert "it has no digest" in check_images(text.replace("registry.example.com", "ghcr.io/me")).stderr


def test_checkov_finds_nothing_but_what_has_a_reason(tmp_path):
    for overlay in OVERLAYS:
        (tmp_path / f"{overlay}.yaml").write_text(rendered(FOLDER / "overlays" / overlay))
    (tmp_path / "export.yaml").write_text(rendered(FOLDER / "export"))
    command = [
        tool("checkov"), "-d", tmp_path, "--framework", "kubernetes", "--skip-download", "--skip-check",
        ",".join(SKIPPED), "--output", "json",
    ]  # fmt: skip
    report = json.loads(subprocess.run(command, capture_output=True, text=True).stdout)
    assert report["summary"]["passed"] > 60 * len(OVERLAYS)
    failed = report["results"]["failed_checks"]
    assert [(c["check_id"], c["check_name"], c["resource"], c["file_path"]) for c in failed] == []
