"""Prometheus, Alertmanager and a receiver of alerts, on loopback, with the configuration of deploy/monitoring."""

import contextlib
import json
import os
import re
import shutil
import subprocess
import sys
import threading
import time
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import yaml

from processes import held_port

ROOT = Path(__file__).resolve().parent.parent
DEPLOY = ROOT / "deploy" / "monitoring"
RULE_FILES = sorted((DEPLOY / "prometheus" / "rules").glob("*.yaml"))
_GROUPS = [group for path in RULE_FILES for group in yaml.safe_load(path.read_text())["groups"]]
RULES = [rule for group in _GROUPS for rule in group["rules"]]
_PATH = f"{sys.prefix}/prometheus/usr/bin:{os.environ['PATH']}"
_TOOLS = {
    name: shutil.which(name, path=_PATH)
    for name in ("prometheus", "promtool", "prometheus-alertmanager", "amtool", "prometheus-node-exporter")
}
_MISSING = [name for name, path in _TOOLS.items() if path is None]
MARKS = [
    pytest.mark.monitoring,
    pytest.mark.skipif(bool(_MISSING), reason=f"{', '.join(_MISSING)} missing; make prometheus"),
]


@contextlib.contextmanager
def free_address() -> Iterator[str]:
    """HOST:PORT that nobody else is given."""
    with held_port() as port:
        yield f"127.0.0.1:{port}"


def run(tool: str, *args: str | Path) -> str:
    """The output of a tool that must succeed."""
    done = subprocess.run([_TOOLS[tool], *map(str, args)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def _command(tool: str) -> list[str]:
    """Debian's Alertmanager reads a template in /usr/share: only unpacked, it gets the /usr/share beside it there."""
    path, share = str(_TOOLS[tool]), Path("/usr/share")
    if tool != "prometheus-alertmanager" or (share / "prometheus/alertmanager/default.tmpl").exists():
        return [path]
    as_root = [] if os.geteuid() == 0 else ["--map-root-user"]
    seen = 'mount --bind "$0" /usr/share && exec "$@"'
    return ["unshare", *as_root, "--mount", "sh", "-c", seen, str(Path(path).parents[1] / "share"), path]


@contextlib.contextmanager
def start(tool: str, ready: str, log: Path, *args: str | Path) -> Iterator[subprocess.Popen]:
    """A server, from when the URL `ready` answers; ended afterwards."""
    with log.open("w") as out:
        process = subprocess.Popen(
            [*_command(tool), *map(str, args)], stdout=out, stderr=subprocess.STDOUT, cwd=log.parent
        )
    try:
        wait_for(lambda: process.poll() is not None or answers(ready), f"{tool} to start")
        assert process.poll() is None, log.read_text()
        yield process
    finally:
        process.terminate()
        process.wait(120)


def answers(url: str) -> bool:
    with contextlib.suppress(OSError):
        return get(url) is not None
    return False


def get(url: str, **headers: str) -> str:
    with urllib.request.urlopen(urllib.request.Request(url, headers=headers), timeout=60) as response:
        return response.read().decode()


def exported(url: str) -> set[str]:
    """Names of the metrics at a URL."""
    return {re.split(r"[{ ]", line)[0] for line in get(url).splitlines() if line and not line.startswith("#")}


def wait_for(condition: Callable[[], Any], what: str, seconds: float = 300) -> Any:
    """What `condition` returns, once that is true; `seconds` are many, for a machine that does other things too."""
    end = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < end, f"waited {seconds} s for {what}"
        time.sleep(0.2)
    return found


class Prometheus:
    """A server to query, and its Alertmanager."""

    def __init__(self, url: str, alertmanager: str):
        self.url, self.alertmanager = url, alertmanager

    def api(self, path: str, **query: str) -> Any:
        with urllib.request.urlopen(f"{self.url}/api/v1/{path}?{urllib.parse.urlencode(query)}", timeout=30) as answer:
            return json.load(answer)["data"]

    def query(self, expr: str) -> list[dict]:
        """The samples of an instant vector."""
        found = self.api("query", query=expr)
        assert found["resultType"] == "vector", expr
        return found["result"]

    def suppressed(self, **labels: str) -> bool:
        """Whether Alertmanager has such an alert, and keeps it from everyone."""
        alerts = json.loads(get(f"{self.alertmanager}/api/v2/alerts"))
        states = [alert["status"]["state"] for alert in alerts if labels.items() <= alert["labels"].items()]
        return bool(states) and set(states) == {"suppressed"}


class Webhook:
    """Takes Alertmanager's notifications: `received` holds (path, alert)."""

    def __init__(self):
        self.received: list[tuple[str, dict]] = []
        received = self.received

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self):
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                received.extend((self.path, alert) for alert in body["alerts"])
                self.send_response(200)
                self.end_headers()

            def log_message(self, *args):
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        self._thread = threading.Thread(target=self._server.serve_forever, daemon=True)
        self._thread.start()

    def named(self, name: str, **labels: str) -> list[tuple[str, dict]]:
        wanted = {"alertname": name, **labels}.items()
        return [(path, alert) for path, alert in self.received if wanted <= alert["labels"].items()]

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


def alertmanager_config(receiver: str) -> dict:
    """The deployed configuration, sent to `receiver`, without its delays."""
    text = (DEPLOY / "alertmanager" / "alertmanager.yml").read_text().replace("http://127.0.0.1:9095", receiver)
    config = yaml.safe_load(text)
    config["route"] |= {"group_wait": "0s", "group_interval": "1s"}
    return config


def write_prometheus(folder: Path, alertmanager: str, targets: dict[str, str]) -> Path:
    """A copy of the deployed configuration that asks every 3 s and lets alerts wait 5 s (`for`).

    Args:
        folder: for the copy.
        alertmanager: HOST:PORT of Alertmanager.
        targets: HOST:PORT by job; jobs without one have none. All `targets/training/*.json` are targets.

    Returns:
        The configuration file.
    """
    shutil.copytree(DEPLOY / "prometheus", folder)
    for path in (folder / "targets").glob("*.yaml"):
        path.write_text(
            yaml.safe_dump([{"targets": [targets[path.stem]]} if path.stem in targets else {"targets": []}])
        )
    for path in (folder / "rules").glob("*.yaml"):
        rules = yaml.safe_load(path.read_text())
        for group in rules["groups"]:
            group.pop("interval", None)
            for rule in group["rules"]:
                if "for" in rule:
                    rule["for"] = "5s"
        path.write_text(yaml.safe_dump(rules))
    path = folder / "prometheus.yml"
    config = yaml.safe_load(path.read_text())
    config["global"] |= {"scrape_interval": "3s", "scrape_timeout": "3s", "evaluation_interval": "1s"}
    config["alerting"]["alertmanagers"] = [{"static_configs": [{"targets": [alertmanager]}]}]
    path.write_text(yaml.safe_dump(config))
    return path
