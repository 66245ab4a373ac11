"""The autoscaler's metrics, from what vLLM exports to what the HPA and KEDA ask for, by name and by value."""

import re

import pytest
import yaml

from experiments.entry import compose_config
from manifests import EXPORTED, FOLDER, RULES, find, has, of_overlay, settings
from mla_jax.inference.serving_plan import ServingPlan

pytestmark = pytest.mark.kubernetes


def rules() -> dict[str, str]:
    """Expressions by the name that they record."""
    (group,) = yaml.safe_load(RULES.read_text())["groups"]
    return {rule["record"]: rule["expr"] for rule in group["rules"]}


def adapted() -> dict[str, str]:
    """The adapter's metrics of pods: name, recorded name."""
    (rule,) = yaml.safe_load((FOLDER / "components" / "hpa" / "prometheus-adapter.yaml").read_text())["rules"]["custom"]
    (pattern,) = re.findall(r'__name__=~"([^"]+)"', rule["seriesQuery"])
    new = rule["name"]["as"].replace("$", "\\")
    recorded = [name for name in rules() if re.fullmatch(pattern, name)]
    return {re.sub(rule["name"]["matches"], new, name): name for name in recorded}


def hpa_metrics() -> dict[str, str]:
    """Targets by the name of the metric."""
    metrics = find(of_overlay("prod"), "HorizontalPodAutoscaler")["spec"]["metrics"]
    assert all(m["type"] == "Pods" and m["pods"]["target"]["type"] == "AverageValue" for m in metrics)
    return {m["pods"]["metric"]["name"]: m["pods"]["target"]["averageValue"] for m in metrics}


def number(quantity: str) -> float:
    """Of a Kubernetes quantity."""
    suffixes = {"m": 1e-3, "k": 1e3, "M": 1e6}
    return float(quantity.rstrip("".join(suffixes))) * suffixes.get(quantity[-1], 1)


def keda_metrics() -> dict[str, str]:
    """Thresholds by the recorded name."""
    triggers = find(of_overlay("keda"), "ScaledObject")["spec"]["triggers"]
    thresholds = {}
    for trigger in triggers:
        match = re.fullmatch(r'sum\((pod:[\w:]+)\{namespace="infinitecontext"\}\)', trigger["metadata"]["query"])
        assert trigger["type"] == "prometheus" and trigger["metricType"] == "AverageValue" and match
        thresholds[match[1]] = trigger["metadata"]["threshold"]
    return thresholds


def test_the_hpa_asks_for_what_the_adapter_makes_of_what_is_recorded():
    assert set(hpa_metrics()) == set(adapted())
    assert set(adapted().values()) == set(rules())


def test_rules_read_what_vllm_exports():
    found = {name for expr in rules().values() for name in re.findall(r"(?:vllm:|infinitecontext_)\w+", expr)}
    assert found == EXPORTED


def test_keda_scales_as_the_hpa_does():
    targets = {adapted()[name]: number(quantity) for name, quantity in hpa_metrics().items()}
    assert {name: number(threshold) for name, threshold in keda_metrics().items()} == targets
    hpa, keda = (find(of_overlay(o), kind)["spec"] for o, kind in
                 (("prod", "HorizontalPodAutoscaler"), ("keda", "ScaledObject")))  # fmt: skip
    assert keda["advanced"]["horizontalPodAutoscalerConfig"]["behavior"] == hpa["behavior"]
    assert (keda["minReplicaCount"], keda["maxReplicaCount"]) == (hpa["minReplicas"], hpa["maxReplicas"])


@pytest.mark.parametrize("overlay", ["prod", "keda", "oci-model", "inference-pool"])
def test_there_is_one_autoscaler_and_it_has_the_replicas(overlay):
    manifests = of_overlay(overlay)
    assert has(manifests, "HorizontalPodAutoscaler") != has(manifests, "ScaledObject")
    assert "replicas" not in find(manifests, "Deployment")["spec"]
    scaler = find(manifests, "ScaledObject" if overlay == "keda" else "HorizontalPodAutoscaler")
    assert scaler["spec"]["scaleTargetRef"]["name"] == find(manifests, "Deployment")["metadata"]["name"]


def test_targets_are_those_of_the_plan_and_below_what_a_pod_refuses():
    flags = settings(of_overlay("prod"))
    answer = flags["override-generation-config"]["max_new_tokens"]
    plan = ServingPlan.of(compose_config(["model=infinite_1b"]).model, "h200", flags["max-model-len"], answer)
    targets = {name: number(quantity) for name, quantity in hpa_metrics().items()}
    assert targets["vllm_queued_prompt_tokens"] == pytest.approx(plan.queued_tokens_target, rel=0.02)
    assert targets["vllm_queued_prompt_tokens"] < flags["max-num-queued-tokens"]
    assert targets["vllm_requests_in_flight"] == 0.75 * flags["max-num-seqs"]
    assert targets["vllm_kv_cache_usage"] == 0.8


def test_the_operator_gets_the_same_rules():
    assert find(of_overlay("prod"), "PrometheusRule")["spec"] == yaml.safe_load(RULES.read_text())
