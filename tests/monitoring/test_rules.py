"""Rules, alerts and their routes, by Prometheus' and Alertmanager's own tools."""

import json
import re
import subprocess
from pathlib import Path

import pytest
import yaml

from monitoring_servers import DEPLOY, MARKS, ROOT, RULE_FILES, RULES, run
from vllm_server import PYTHON

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


def test_objectives_are_bounds_of_the_servers_histograms():
    """A `le` that no bucket has would be an SLO that is always met."""
    rules = (DEPLOY / "prometheus" / "rules" / "slo.yaml").read_text()
    (waiting,) = {float(le) for le in re.findall(r'request_queue_time_seconds_bucket\{le="([\d.]+)"', rules)}
    (inter_token,) = {float(le) for le in re.findall(r'inter_token_latency_seconds_bucket\{le="([\d.]+)"', rules)}
    code = (
        "import json; from vllm.v1.metrics.buckets import histogram_buckets as b;"
        "print(json.dumps({name: b(name) for name in ('request_latency', 'inter_token_latency')}))"
    )
    ran = subprocess.run([PYTHON, "-c", code], capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    default = json.loads(ran.stdout.splitlines()[-1])
    deployed = [ROOT / "deploy" / "kubernetes" / part / "serve.yaml" for part in ("base", "overlays/prod")]
    configured = [yaml.safe_load(path.read_text()) for path in deployed if path.exists()]
    for buckets in [default, *(default | config["custom-histogram-buckets"] for config in configured)]:
        assert waiting in buckets["request_latency"]
        assert inter_token in buckets["inter_token_latency"]
