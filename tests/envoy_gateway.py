"""Envoy as the Gateway of the manifests configures it, by its HTTPRoute and its BackendTrafficPolicy.

A test plays the controllers: it says which pods are ready, and Envoy reads that from a file that is replaced, as a
gateway reads it from its controller.
"""

import contextlib
import json
import os
import subprocess
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

from manifests import Manifest, find, tool
from processes import held_port

CLUSTER = "vllm"
EDS = "type.googleapis.com/envoy.config.endpoint.v3.ClusterLoadAssignment"
HCM = "type.googleapis.com/envoy.extensions.filters.network.http_connection_manager.v3.HttpConnectionManager"
HTTP_OPTIONS = "type.googleapis.com/envoy.extensions.upstreams.http.v3.HttpProtocolOptions"
ROUTER = "type.googleapis.com/envoy.extensions.filters.http.router.v3.Router"
POD = "x-pod"
"""Header of a response, for tests: the address of the pod that gave it."""
LEAST_REQUEST = {"LeastRequest": "LEAST_REQUEST"}


def routes(route: Manifest, policy: Manifest) -> list[dict]:
    """Envoy's routes of an HTTPRoute; what none matches is answered with 404."""
    retry = policy["spec"]["retry"]
    found = []
    for rule in route["spec"]["rules"]:
        for match in rule["matches"]:
            assert match["path"]["type"] == "Exact"
            method = {"name": ":method", "string_match": {"exact": match["method"]}}
            found.append(
                {
                    "match": {"path": match["path"]["value"], "headers": [method]},
                    "route": {
                        "cluster": CLUSTER,
                        "timeout": rule["timeouts"]["request"],
                        "idle_timeout": "3600s",  # Envoy Gateway's, where a request has a time-out
                        "retry_policy": {
                            "num_retries": retry["numRetries"],
                            "retry_on": ",".join(retry["retryOn"]["triggers"]),
                            "retriable_status_codes": retry["retryOn"]["httpStatusCodes"],
                            "retry_host_predicate": [
                                {
                                    "name": "envoy.retry_host_predicates.previous_hosts",
                                    "typed_config": {
                                        "@type": "type.googleapis.com/envoy.extensions.retry.host.previous_hosts.v3."
                                        "PreviousHostsPredicate"
                                    },
                                }
                            ],
                            "host_selection_retry_max_attempts": 5,
                        },
                    },
                }
            )
    return found


def bootstrap(manifests: list[Manifest], port: int, admin: int, folder: Path, check_every: str | None) -> dict:
    """Envoy's configuration. `check_every` replaces the interval of the health checks."""
    policy = find(manifests, "BackendTrafficPolicy")
    check = policy["spec"]["healthCheck"]["active"]
    hosts = find(manifests, "HTTPRoute")["spec"]["hostnames"]

    def address(number: int) -> dict:
        return {"socket_address": {"address": "127.0.0.1", "port_value": number}}

    manager = {
        "@type": HCM,
        "stat_prefix": "https",
        "route_config": {
            "response_headers_to_add": [{"header": {"key": POD, "value": "%UPSTREAM_REMOTE_ADDRESS%"}}],
            "virtual_hosts": [
                {
                    "name": "vllm",
                    "domains": [*hosts, *(f"{host}:*" for host in hosts)],
                    "routes": routes(find(manifests, "HTTPRoute"), policy),
                }
            ],
        },
        "http_filters": [{"name": "envoy.filters.http.router", "typed_config": {"@type": ROUTER}}],
    }
    cluster = {
        "name": CLUSTER,
        "type": "EDS",
        "connect_timeout": "5s",
        "lb_policy": LEAST_REQUEST[policy["spec"]["loadBalancer"]["type"]],
        "ignore_health_on_host_removal": True,
        "typed_extension_protocol_options": {
            "envoy.extensions.upstreams.http.v3.HttpProtocolOptions": {
                "@type": HTTP_OPTIONS,
                "common_http_protocol_options": {
                    "idle_timeout": policy["spec"]["timeout"]["http"]["connectionIdleTimeout"]
                },
                "explicit_http_config": {"http_protocol_options": {}},
            }
        },
        "circuit_breakers": {"thresholds": [{"max_retries": 1024}]},  # Envoy Gateway's; Envoy's own is 3
        "eds_cluster_config": {
            "eds_config": {
                "resource_api_version": "V3",
                "path_config_source": {
                    "path": str(folder / "pods.json"),
                    "watched_directory": {"path": str(folder)},
                },
            }
        },
        "health_checks": [
            {
                "timeout": check["timeout"],
                "interval": check_every or check["interval"],
                "no_traffic_interval": check_every or check["interval"],
                "unhealthy_threshold": check["unhealthyThreshold"],
                "healthy_threshold": check["healthyThreshold"],
                "http_health_check": {"path": check["http"]["path"]},
            }
        ],
    }
    filters = [{"name": "envoy.filters.network.http_connection_manager", "typed_config": manager}]
    return {
        "admin": {"address": address(admin)},
        "node": {"id": "gateway", "cluster": "gateway"},
        "static_resources": {
            "listeners": [{"name": "https", "address": address(port), "filter_chains": [{"filters": filters}]}],
            "clusters": [cluster],
        },
    }


class Gateway:
    """A running Envoy."""

    def __init__(self, folder: Path, port: int, admin: int, host: str):
        self.port, self.host = port, host
        self._folder, self._admin = folder, admin

    def pods(self, *ports: int) -> None:
        """Says which pods are ready."""
        _write_pods(self._folder, ports)

    def wait_for(self, *ports: int, seconds: float = 120) -> None:
        """Waits until requests go to these pods and to no other."""
        end = time.monotonic() + seconds
        while self._healthy() != set(ports):
            assert time.monotonic() < end, f"Envoy has {self._healthy()}, not {set(ports)}"
            time.sleep(0.05)

    def _healthy(self) -> set[int]:
        with urllib.request.urlopen(f"http://127.0.0.1:{self._admin}/clusters?format=json", timeout=10) as response:
            clusters = json.load(response)["cluster_statuses"]
        hosts = [host for cluster in clusters for host in cluster.get("host_statuses", [])]
        return {
            host["address"]["socket_address"]["port_value"]
            for host in hosts
            if set(host["health_status"]) <= {"eds_health_status"}
        }


def _write_pods(folder: Path, ports: tuple[int, ...]) -> None:
    endpoints = [
        {"endpoint": {"address": {"socket_address": {"address": "127.0.0.1", "port_value": port}}}} for port in ports
    ]
    resource = {"@type": EDS, "cluster_name": CLUSTER, "endpoints": [{"lb_endpoints": endpoints}]}
    new = folder / "pods.json.new"
    new.write_text(json.dumps({"version_info": str(time.monotonic_ns()), "resources": [resource]}))
    os.replace(new, folder / "pods.json")


@contextlib.contextmanager
def gateway(manifests: list[Manifest], folder: Path, *pods: int, check_every: str | None = None) -> Iterator[Gateway]:
    """Envoy on loopback before these pods' ports; ends with the block."""
    with held_port() as port, held_port() as admin:
        _write_pods(folder, pods)
        config, log = folder / "envoy.json", folder / "envoy.log"
        config.write_text(json.dumps(bootstrap(manifests, port, admin, folder, check_every)))
        command = [tool("envoy"), "-c", config, "--concurrency", "1", "--disable-hot-restart", "--log-path", log]
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        running = Gateway(folder, port, admin, find(manifests, "HTTPRoute")["spec"]["hostnames"][0])
        try:
            end = time.monotonic() + 240
            while True:
                assert process.poll() is None, log.read_text()[-3000:]
                assert time.monotonic() < end, "Envoy did not start"
                with contextlib.suppress(OSError):
                    running.wait_for(*pods)
                    break
                time.sleep(0.1)
            yield running
        finally:
            process.terminate()
            process.wait(30)
