"""Rules, alerts and their routes, by Prometheus' and Alertmanager's own tools."""

import re
from pathlib import Path

import pytest
import yaml

from monitoring_servers import DEPLOY, MARKS, ROOT, RULE_FILES, RULES, get, run

pytestmark = MARKS
UNIT_TESTS = sorted((Path(__file__).parent / "rules").glob("*.yaml"))
ALERTS = [rule for rule in RULES if "alert" in rule]


def test_the_configuration_is_valid():
    assert "is valid prometheus config" in run("promtool", "check", "config", DEPLOY / "prometheus" / "prometheus.yml")
    run("promtool", "check", "rules", "--lint=all", "--lint-fatal", *RULE_FILES)
    run("amtool", "check-config", DEPLOY / "alertmanager" / "alertmanager.yml")


@pytest.mark.parametrize("path", UNIT_TESTS, ids=lambda path: path.stem)
def test_rules_do_what_they_should(path):
    assert "SUCCESS" in run("promtool", "test", "rules", path)


@pytest.mark.parametrize("firing", [True, False])
def test_every_alert_is_tested(firing):
    tests = [test for path in UNIT_TESTS for test in yaml.safe_load(path.read_text())["tests"]]
    cases = [case for test in tests for case in test.get("alert_rule_test", [])]
    seen = {case["alertname"] for case in cases if bool(case["exp_alerts"]) == firing}
    assert {alert["alert"] for alert in ALERTS} == seen


def test_every_alert_is_explained():
    rows = re.findall(r"^\| `(\w+)` \|", (ROOT / "docs" / "monitoring.md").read_text(), re.M)
    assert {alert["alert"] for alert in ALERTS} <= set(rows)
    assert len({alert["alert"] for alert in ALERTS}) == len(ALERTS)


@pytest.mark.parametrize(
    ("labels", "receiver"),
    [("severity=critical", "pager"), ("severity=warning", "chat"), ("severity=info", "nobody"), ("a=b", "chat")],
)
def test_alerts_reach_who_should_see_them(labels, receiver):
    config = DEPLOY / "alertmanager" / "alertmanager.yml"
    assert run("amtool", "config", "routes", "test", f"--config.file={config}", labels).strip() == receiver


def test_every_severity_has_a_route():
    assert {alert["labels"]["severity"] for alert in ALERTS} == {"critical", "warning", "info"}


def test_objectives_are_bounds_of_the_servers_histograms(vllm):
    """A `le` that no bucket has would be an objective without data."""
    rules = (DEPLOY / "prometheus" / "rules" / "slo.yaml").read_text()
    served = get(f"http://{vllm}/metrics")
    families = {"request_queue_time": "request_latency", "inter_token_latency": "inter_token_latency"}
    for metric, family in families.items():
        (bound,) = set(re.findall(rf'{metric}_seconds_bucket\{{le="([\d.]+)"', rules))
        assert re.search(rf'{metric}_seconds_bucket{{[^}}]*le="{bound}"', served)
        for part in ("base", "overlays/prod"):
            flags = yaml.safe_load((ROOT / "deploy" / "kubernetes" / part / "serve.yaml").read_text())
            assert float(bound) in flags["custom-histogram-buckets"][family]


@pytest.mark.parametrize("path", sorted((DEPLOY / "prometheus" / "targets").glob("*.yaml")), ids=lambda path: path.stem)
def test_targets_are_told_apart_by_their_labels(path):
    """Two paths of one address would have one `up`."""
    labels = [
        (target, *sorted(item for item in group.get("labels", {}).items() if not item[0].startswith("__")))
        for group in yaml.safe_load(path.read_text())
        for target in group["targets"]
    ]
    assert len(set(labels)) == len(labels) > 0
