"""PromQL of dashboards, and the names of metrics in it, for tests; what parses it is Prometheus itself."""

import re

_WORDS = {"and", "or", "unless", "bool", "offset", "inf", "nan"}


def metric_names(expr: str) -> set[str]:
    """The metrics that an expression reads.

    What is no metric: strings, matchers, ranges, lists of labels, functions, operators.
    """
    expr = re.sub(r"#.*", "", expr)
    expr = re.sub(r'"(\\.|[^"\\])*"', "", expr)
    expr = re.sub(r"\{[^}]*\}|\[[^\]]*\]", "", expr)
    expr = re.sub(r"\b(by|without|on|ignoring|group_left|group_right)\s*\([^)]*\)", "", expr)
    names = re.findall(r"(?<![\w.:])([a-zA-Z_:][\w:]*)\b(?!\s*\()", expr)
    return {
        name for name in names if name.lower() not in _WORDS | {"by", "without", "sum", "max", "min", "avg", "count"}
    }


def dashboard_queries(dashboard: dict) -> list[str]:
    """All queries of a Grafana dashboard: panels, annotations and variables, with these set to "all"."""
    queries = [query["expr"] for panel in dashboard["panels"] for query in panel.get("targets", ())]
    queries += [annotation["expr"] for annotation in dashboard["annotations"]["list"]]
    for variable in dashboard["templating"]["list"]:
        if variable["type"] == "query":
            queries.append(re.fullmatch(r"label_values\((.+), *\w+\)", variable["query"]["query"])[1])
    return [re.sub(r"\$\w+", ".*", query.replace("$__rate_interval", "5m")) for query in queries]
