"""The whole chain: a vLLM server under load, scraped, rules that have data, alerts that fire, and who is told."""

import json
import subprocess
import sys

import pytest
import yaml
from prometheus_client import CollectorRegistry, Gauge, start_http_server

from monitoring_servers import (
    DEPLOY,
    MARKS,
    ROOT,
    RULES,
    Prometheus,
    Webhook,
    alertmanager_config,
    free_address,
    get,
    start,
    wait_for,
    write_prometheus,
)
from promql import dashboard_queries

pytestmark = MARKS
IN_FLIGHT = 100
QUIET = {
    'status="5xx"': "no request fails",
    "prefix_cache": "vLLM has no prefix cache for MLA on a CPU",
    "ALERTS": "shown as they come",
    "ratio_1h": "the run is over, so no time passes",
}
"""Queries on serving and training that need not have data here, by a part of them."""


@pytest.fixture(scope="module")
def webhook():
    receiver = Webhook()
    yield receiver
    receiver.close()


@pytest.fixture(scope="module")
def prometheus(tmp_path_factory, vllm, training, node, webhook):
    """Prometheus with the deployed rules, and Alertmanager with the deployed routes."""
    folder = tmp_path_factory.mktemp("monitoring")
    with free_address() as manager, free_address() as address, free_address() as nobody:
        (folder / "alertmanager.yml").write_text(yaml.safe_dump(alertmanager_config(webhook.url)))
        config = write_prometheus(folder / "prometheus", manager, {"vllm": vllm, "node": node, "gpu": nobody})
        (config.parent / "targets" / "training").symlink_to(training.parent)
        # An endpoint of prometheus_client's, scraped with and without what restores names.
        registry = CollectorRegistry()
        Gauge("vllm:colon", "as vLLM names its own", registry=registry).set(1)
        server, thread = start_http_server(0, "127.0.0.1", registry=registry)
        scraped = yaml.safe_load(config.read_text())
        (ours,) = [job for job in scraped["scrape_configs"] if job["job_name"] == "vllm"]
        for name, relabelling in (("restored", ours["metric_relabel_configs"]), ("bare", [])):
            targets = [{"targets": [f"127.0.0.1:{server.server_port}"]}]
            job = {"job_name": name, "static_configs": targets, "metric_relabel_configs": relabelling}
            scraped["scrape_configs"].append(job)
        config.write_text(yaml.safe_dump(scraped))
        with (
            start(
                "prometheus-alertmanager", f"http://{manager}/-/ready", folder / "alertmanager.log",
                f"--config.file={folder}/alertmanager.yml", f"--storage.path={folder}/alerts",
                f"--web.listen-address={manager}", "--cluster.listen-address=",
            ),
            start(
                "prometheus", f"http://{address}/-/ready", folder / "prometheus.log", f"--config.file={config}",
                f"--storage.tsdb.path={folder}/data", f"--web.listen-address={address}",
            ),
        ):  # fmt: skip
            yield Prometheus(f"http://{address}", f"http://{manager}")
        server.shutdown()
        server.server_close()
        thread.join()


@pytest.fixture(scope="module")
def load(prometheus, vllm, webhook, tmp_path_factory):
    """The serving bench with more requests than the server takes, from before the tests to their end."""
    wait_for(lambda: prometheus.query('up{job="vllm"} == 1'), "the first scrape")
    assert not webhook.named("SloBudgetBurnsIn2Days")
    command = [sys.executable, "-m", "tools.bench.serving", f"http://{vllm}", "--concurrency", str(IN_FLIGHT)]
    # So many that no machine answers them all before the end, and none is given up for its time in the queue.
    options = ["--requests", "10000", "--timeout", "3600", "--prompt-words", "20", "--max-tokens", "300"]
    log = (tmp_path_factory.mktemp("load") / "log").open("w")
    bench = subprocess.Popen([*command, *options, "--extra", '{"ignore_eos": true}'], cwd=ROOT, stdout=log, stderr=log)
    yield bench
    bench.terminate()
    bench.wait(30)
    log.close()


def test_metrics_have_their_colons(prometheus, load):
    """prometheus_client answers Prometheus 2 with other names than a browser, and then no rule has data."""
    wait_for(lambda: prometheus.query('vllm:num_requests_running{job="vllm"}'), "vLLM's metrics")
    for job in ("restored", "bare"):
        wait_for(lambda job=job: prometheus.query(f'up{{job="{job}"}} == 1'), f"the scrape of {job}")
    assert prometheus.query('vllm_colon{job="bare"}') and not prometheus.query('vllm:colon{job="bare"}')
    assert prometheus.query('vllm:colon{job="restored"}') and not prometheus.query('vllm_colon{job="restored"}')


def test_an_overload_is_recorded_and_alerts_the_pager(prometheus, load, webhook):
    wait_for(lambda: prometheus.query("job_model:vllm_requests_waiting:sum > 10"), "a queue")
    (path, alert), *_ = wait_for(
        lambda: webhook.named("SloBudgetBurnsIn2Days", slo="waiting", job="vllm"), "the notification"
    )
    assert path == "/pager" and alert["status"] == "firing" and alert["labels"]["severity"] == "critical"
    assert alert["annotations"]["summary"].startswith("vllm burns its budget of waiting")
    (burning,) = prometheus.query('job:slo_errors:ratio_rate1h{job="vllm", slo="waiting"}')
    assert float(burning["value"][1]) > 14.4 * 0.01
    # A budget that burns fast also burns slowly, of which nobody is told as long as the faster alert lasts.
    slower = {"alertname": "SloBudgetBurnsIn5Days", "slo": "waiting"}
    wait_for(lambda: prometheus.suppressed(**slower), "the slower alert to be inhibited")
    assert not prometheus.suppressed(**slower | {"alertname": "SloBudgetBurnsIn2Days"})
    assert wait_for(lambda: webhook.named("RequestsQueue"), "the warning")[0][0] == "/chat"
    assert wait_for(lambda: webhook.named("TargetDown", job="gpu"), "the exporter that is not there")[0][0] == "/chat"
    assert not webhook.named("SloBudgetBurnsIn2Days", slo="availability")


def test_rules_are_evaluated_without_errors(prometheus, load):
    groups = prometheus.api("rules")["groups"]
    rules = [rule for group in groups for rule in group["rules"]]
    assert len(rules) == len(RULES)
    wait_for(lambda: all(r["health"] == "ok" for g in prometheus.api("rules")["groups"] for r in g["rules"]), "rules")


@pytest.mark.parametrize("name", ["serving", "training"])
def test_dashboards_have_data(prometheus, load, name):
    queries = dashboard_queries(json.loads((DEPLOY / "grafana" / "dashboards" / f"{name}.json").read_text()))
    shown = [query for query in queries if not any(part in query for part in QUIET)]
    assert len(shown) > 10
    empty = shown

    def have_data() -> bool:
        nonlocal empty
        empty = [query for query in empty if not prometheus.query(query)]
        return not empty

    wait_for(have_data, "data of every query")


@pytest.mark.parametrize("name", ["gpu", "slurm"])
def test_queries_of_absent_exporters_are_answered(prometheus, load, name):
    for query in dashboard_queries(json.loads((DEPLOY / "grafana" / "dashboards" / f"{name}.json").read_text())):
        prometheus.query(query)


def test_goodput_and_badput_are_the_wall_time(prometheus, training):
    wait_for(lambda: prometheus.query('up{job="training", run="tiny"} == 1'), "the scrape of training")
    (wall,) = prometheus.query("mla_jax_time_run_seconds")
    (parts,) = prometheus.query("sum(mla_jax_goodput_seconds) + sum(mla_jax_badput_seconds)")
    assert float(parts["value"][1]) == pytest.approx(float(wall["value"][1])) and float(wall["value"][1]) > 0
    assert wall["metric"]["run"] == "tiny"
    (target,) = json.loads(training.read_text())
    assert "mla_jax_goodput_seconds" in get(f"http://{target['targets'][0]}/metrics")
