"""The gateway's routes in a real Envoy: what the list lets through, and what becomes of requests when pods fail."""

import contextlib
import threading
import time
import urllib.error
import urllib.request
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from envoy_gateway import Gateway, gateway
from manifests import of_overlay

pytestmark = pytest.mark.kubernetes


class Pod(BaseHTTPRequestHandler):
    """Answers every path; completions as `server.status` says, once `server.release` is set."""

    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def answer(self):
        self.rfile.read(int(self.headers.get("Content-Length", 0)))
        health = self.path == "/health"
        if not health:
            self.server.seen.append(f"{self.command} {self.path}")
            assert self.server.release.wait(300)
        body = str(self.server.server_port).encode()
        self.send_response(200 if health else self.server.status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    do_GET = do_POST = do_DELETE = answer


@contextlib.contextmanager
def pods(number: int):
    servers = [ThreadingHTTPServer(("127.0.0.1", 0), Pod) for _ in range(number)]
    for server in servers:
        server.seen, server.status, server.release, server.daemon_threads = [], 200, threading.Event(), True
        server.release.set()
        threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
    try:
        yield servers
    finally:
        for server in servers:
            server.shutdown()
            server.server_close()


def ask(running: Gateway, path: str, method: str = "POST", host: str | None = None) -> tuple[int, str]:
    data = b"{}" if method == "POST" else None
    request = urllib.request.Request(
        f"http://127.0.0.1:{running.port}{path}", data, {"Host": host or running.host}, method=method
    )
    try:
        with urllib.request.urlopen(request, timeout=300) as response:
            return response.status, response.read().decode()
    except urllib.error.HTTPError as e:
        return e.code, e.read().decode()


@pytest.fixture
def manifests():
    return of_overlay("prod")


def test_only_the_listed_routes_pass(manifests, tmp_path):
    with pods(1) as [pod], gateway(manifests, tmp_path, pod.server_port) as running:
        passed = ["GET /v1/models", "POST /v1/completions", "POST /v1/chat/completions"]
        for line in passed:
            method, path = line.split()
            assert ask(running, path, method)[0] == 200
        for line in (
            "GET /metrics", "GET /health", "POST /tokenize", "POST /score", "GET /docs", "GET /openapi.json", "GET /",
            "POST /v1/embeddings", "POST /v1/load_lora_adapter", "POST /v1/models", "DELETE /v1/models",
            "GET /v1/completions", "POST /v1/completions/", "POST /v1/completions/../../tokenize",
            "POST /v1//completions", "POST /V1/completions", "POST /v1/completions%2f..%2f..%2ftokenize",
        ):  # fmt: skip
            method, path = line.split()
            assert ask(running, path, method)[0] == 404, line
        assert ask(running, "/v1/models", "GET", host="127.0.0.1")[0] == 404
        assert pod.seen == passed


def test_a_full_pod_sends_the_request_to_another(manifests, tmp_path):
    with pods(2) as (full, free), gateway(manifests, tmp_path, full.server_port, free.server_port) as running:
        full.status = 503
        assert [ask(running, "/v1/completions") for _ in range(8)] == [(200, str(free.server_port))] * 8
        free.status = 503
        assert ask(running, "/v1/completions")[0] == 503


def test_a_pod_that_refuses_connections_costs_no_request(manifests, tmp_path):
    with pods(2) as (gone, stays), gateway(manifests, tmp_path, gone.server_port, stays.server_port) as running:
        gone.shutdown()
        gone.server_close()
        assert [ask(running, "/v1/completions")[0] for _ in range(8)] == [200] * 8


def test_a_pod_that_is_drained_ends_what_it_has_and_gets_nothing_new(manifests, tmp_path):
    with pods(2) as (old, new), gateway(manifests, tmp_path, old.server_port) as running:
        old.release.clear()
        answers = []
        asking = threading.Thread(target=lambda: answers.append(ask(running, "/v1/completions")))
        asking.start()
        end = time.monotonic() + 300
        while not old.seen:
            assert time.monotonic() < end
            time.sleep(0.01)
        running.pods(new.server_port)
        running.wait_for(new.server_port)
        assert [ask(running, "/v1/completions") for _ in range(4)] == [(200, str(new.server_port))] * 4
        old.release.set()
        asking.join(300)
        assert answers == [(200, str(old.server_port))] and len(old.seen) == 1


def test_without_a_pod_the_error_is_one_that_clients_try_again(manifests, tmp_path):
    with gateway(manifests, tmp_path) as running:
        assert ask(running, "/v1/completions")[0] == 503
