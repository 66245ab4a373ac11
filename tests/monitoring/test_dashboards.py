"""Every query of rules and dashboards: parsed by Prometheus, and of metrics that a real exporter has."""

import copy
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from grafana_foundation_sdk.cog.encoder import JSONEncoder
from grafana_foundation_sdk.cog.plugins import register_default_plugins
from grafana_foundation_sdk.models import dashboard as dashboard_types

from monitoring_servers import DEPLOY, MARKS, RULES, exported, run
from promql import dashboard_queries, metric_names

pytestmark = MARKS
DASHBOARDS = sorted((DEPLOY / "grafana" / "dashboards").glob("*.json"))
RECORDED = {rule["record"] for rule in RULES if "record" in rule}
EXPORTERS = {
    name: set(listed["metrics"])
    for name, listed in json.loads((Path(__file__).parent / "exporters.json").read_text()).items()
}
COUNTERS = set(re.findall(r"^(DCGM_\w+),", (DEPLOY / "dcgm-counters.csv").read_text(), re.M))
PROMETHEUS = {"up", "ALERTS"}


@pytest.mark.parametrize(
    ("expr", "names"),
    [
        (
            'sum by (le) (rate(a_bucket{le="b", c=~"d|e"}[5m])) / on (f) group_left () (a:b:c > 1e9)',
            {"a_bucket", "a:b:c"},
        ),
        ("histogram_quantile(0.95, x) or vector(0) unless absent(y offset 5m)", {"x", "y"}),
        ('label_replace(x, "sum", "$1", "y", "(.*)") and topk(3, sum without (z) (w))', {"x", "w"}),
    ],
)
def test_names_are_found_in_queries(expr, names):
    assert metric_names(expr) == names


@pytest.mark.parametrize("path", DASHBOARDS, ids=lambda path: path.stem)
def test_queries_are_promql(path, tmp_path):
    queries = dashboard_queries(json.loads(path.read_text()))
    rules = [{"record": f"q{i}", "expr": query} for i, query in enumerate(queries)]
    (tmp_path / "rules.yaml").write_text(yaml.safe_dump({"groups": [{"name": "queries", "rules": rules}]}))
    assert f"{len(rules)} rules found" in run("promtool", "check", "rules", tmp_path / "rules.yaml")


def test_there_are_metrics_behind_every_query(vllm, training, node):
    (target,) = json.loads(training.read_text())
    known = PROMETHEUS | RECORDED | COUNTERS | exported(f"http://{target['targets'][0]}/metrics")
    known |= exported(f"http://{vllm}/metrics") | exported(f"http://{node}/metrics")
    both = EXPORTERS["slurm"] & EXPORTERS["slurm_exporter"]
    either = EXPORTERS["slurm"] | EXPORTERS["slurm_exporter"]
    unknown = {}
    for rule in RULES:
        # What autoscaling reads first is of our middleware of vLLM.
        missing = metric_names(rule["expr"]) - known - either - {"infinitecontext_queued_prompt_tokens"}
        unknown |= {rule.get("alert") or rule["record"]: missing} if missing else {}
    for path in DASHBOARDS:
        for query in dashboard_queries(json.loads(path.read_text())):
            missing = metric_names(query) - known - both
            unknown |= {f"{path.stem}: {query}": missing} if missing else {}
    assert unknown == {}


def test_counters_are_known_to_dcgm_exporter():
    assert COUNTERS <= EXPORTERS["dcgm-exporter"] | EXPORTERS["dcgm-exporter, off by default"]


def test_every_recording_is_used():
    queries = [query for path in DASHBOARDS for query in dashboard_queries(json.loads(path.read_text()))]
    queries += [rule["expr"] for rule in RULES]
    used = set().union(*map(metric_names, queries))
    autoscaling = {name for name in RECORDED if name.startswith("pod:")}  # read by Kubernetes
    assert RECORDED - autoscaling <= used


NEWER = {
    "/annotations/list/step",
    "/annotations/list/titleFormat",
    "/templating/list/definition",
    "/panels/options/tooltip/mode",
}
"""What Grafana reads though the types of version 10.1 do not have it."""


def dropped(given: Any, kept: Any, path: str = "") -> Iterator[str]:
    """Where `kept` lacks what was given, or has something else."""
    if isinstance(given, dict) and isinstance(kept, dict):
        for key, value in given.items():
            yield from dropped(value, kept.get(key), f"{path}/{key}")
    elif isinstance(given, list) and isinstance(kept, list) and len(given) == len(kept):
        for pair in zip(given, kept, strict=True):
            yield from dropped(*pair, path)
    elif given != kept:
        yield path


@pytest.mark.parametrize("path", DASHBOARDS, ids=lambda path: path.stem)
def test_grafanas_own_types_know_every_field(path):
    register_default_plugins()
    given = json.loads(path.read_text())
    kept = json.loads(JSONEncoder().encode(dashboard_types.Dashboard.from_json(given)))
    assert set(dropped(given, kept)) <= NEWER
    broken = copy.deepcopy(given)
    broken["panels"][1]["fieldConfig"]["defaults"]["units"] = "s"
    kept = json.loads(JSONEncoder().encode(dashboard_types.Dashboard.from_json(broken)))
    assert "/panels/fieldConfig/defaults/units" in set(dropped(broken, kept))


@pytest.mark.parametrize("path", DASHBOARDS, ids=lambda path: path.stem)
def test_panels_are_whole_and_do_not_overlap(path):
    dashboard = json.loads(path.read_text())
    panels = dashboard["panels"]
    assert dashboard["uid"] == path.stem and dashboard["title"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    cells = [
        (x, y)
        for panel in panels
        for x in range(panel["gridPos"]["x"], panel["gridPos"]["x"] + panel["gridPos"]["w"])
        for y in range(panel["gridPos"]["y"], panel["gridPos"]["y"] + panel["gridPos"]["h"])
    ]
    assert len(set(cells)) == len(cells) and max(x for x, _ in cells) < 24
    variables = {variable["name"] for variable in dashboard["templating"]["list"]} | {"__rate_interval"}
    for panel in panels:
        assert panel["title"]
        if panel["type"] == "row":
            continue
        assert panel["description"] and panel["fieldConfig"]["defaults"]["unit"]
        assert panel["datasource"]["uid"] == "${datasource}"
        refs = [query["refId"] for query in panel["targets"]]
        assert refs and len(set(refs)) == len(refs)
        for query in panel["targets"]:
            assert set(re.findall(r"\$(\w+)", query["expr"])) <= variables
