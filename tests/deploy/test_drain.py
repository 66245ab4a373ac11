"""The pod's preStop against a server of metrics: it ends when everything is answered, or when the time is over."""

import importlib.util
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from manifests import FOLDER

pytestmark = pytest.mark.kubernetes
STOCK = 'vllm:num_requests_running{{engine="0"}} {}.0\nvllm:num_requests_waiting{{engine="0"}} {}.0\n'


class Metrics(BaseHTTPRequestHandler):
    """Gives the server's texts one after the other, the last for ever."""

    def log_message(self, *_):
        pass

    def do_GET(self):
        texts = self.server.texts
        body = (texts.pop(0) if len(texts) > 1 else texts[0]).encode()
        self.send_response(200)
        self.end_headers()
        self.wfile.write(body)


@pytest.fixture
def drain(tmp_path, monkeypatch):
    """Runs the script on a server that gives these texts: how many it left."""
    spec = importlib.util.spec_from_file_location("drain", FOLDER / "base" / "drain.py")
    assert spec and spec.loader
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    server = ThreadingHTTPServer(("127.0.0.1", 0), Metrics)
    server.texts = []
    monkeypatch.setattr(script, "NOTICE", 0)
    monkeypatch.setenv("CONFIG", str(tmp_path / "serve.yaml"))

    def run(*texts: str, limit: int = 60) -> int:
        (tmp_path / "serve.yaml").write_text(
            f"model: /m\nport: {server.server_port}\nshutdown-timeout: {limit}\nx: [1]\n"
        )
        server.texts = list(texts)
        if texts:
            threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
        else:
            server.server_close()
        script.main()
        return len(server.texts)

    yield run
    if server.texts:
        server.shutdown()
    server.server_close()


def test_it_waits_for_unsent_answers(drain):
    """Which vLLM itself no longer counts."""
    ours = "infinitecontext_http_requests_in_flight {}\n" + STOCK
    assert (
        drain(ours.format("2.0", 0, 0), ours.format("1.0", 0, 0), ours.format("0.0", 0, 0), "not asked any more") == 1
    )


def test_without_our_middleware_it_goes_by_vllms_counts(drain):
    assert drain(STOCK.format(1, 2), STOCK.format(0, 1), STOCK.format(0, 0), "not asked any more") == 1


def test_it_ends_when_the_time_is_over(drain):
    started = time.monotonic()
    drain(STOCK.format(1, 0), limit=1)
    assert time.monotonic() - started > 0.9


def test_it_ends_when_the_server_is_gone(drain):
    drain()
