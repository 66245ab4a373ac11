"""Engines asked the same questions: transformers for real, a server that answers as vLLM does or does not."""

import http.server
import json
import threading
from dataclasses import replace

import pytest

from mla_jax.bridge.run_or_hf import load_run_or_hf
from tools import compare_engines

NANO = "weights/nano"
ASKED = "--length", 192, "--questions", 2, "--keys", 2


@pytest.fixture(scope="module")
def nano():
    return load_run_or_hf(NANO)


@pytest.fixture
def server(nano):
    """Starts a server that answers as JAX does, but for what `change` makes of it."""
    started = []

    def start(change=lambda text: text):
        class Handler(http.server.BaseHTTPRequestHandler):
            def _answer(self, body):
                self.send_response(200)
                self.end_headers()
                self.wfile.write(json.dumps(body).encode())

            def do_GET(self):
                self._answer({"data": [{"id": "nano"}]})

            def do_POST(self):
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                assert (body["model"], body["temperature"]) == ("nano", 0)
                (prompt, *_) = compare_engines.prompts(nano, 192, 1, 2)
                (text,) = compare_engines.in_jax(nano, [replace(prompt, ids=body["prompt"])])
                self._answer({"choices": [{"token_ids": nano.tokenizer.encode(change(text))}]})

            def log_message(self, *_):
                pass

        httpd = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=httpd.serve_forever, daemon=True).start()
        started.append(httpd)
        return f"http://127.0.0.1:{httpd.server_port}/"

    yield start
    for httpd in started:
        httpd.shutdown()
        httpd.server_close()


@pytest.mark.integration
def test_transformers_and_a_server_answer_alike(call, server):
    code, out, err = call(compare_engines, NANO, *ASKED, "--server", server())
    assert code == 0, err
    header, _, *rows, last = out.splitlines()
    assert header == "| expected | JAX | transformers | server |" and len(rows) == 4
    for row in rows[:2]:  # passkeys
        expected, *texts = (cell.strip() for cell in row.strip("|").split("|"))
        assert set(texts) == {f"' {expected}.'"}
    assert last.startswith("4 of 4 alike, ")


@pytest.mark.integration
def test_one_wrong_character_is_a_difference(call, server):
    code, out, err = call(compare_engines, NANO, *ASKED, "--no-transformers", "--server", server(lambda t: t[:-1]))
    assert code == 1 and "the engines differ" in err and "0 of 4 alike" in out


def test_no_export_or_no_server(call, tmp_path):
    code, _, err = call(compare_engines, tmp_path)
    assert code == 2 and "has no config.json" in err
    code, _, err = call(compare_engines, NANO, "--no-transformers")
    assert code == 2 and "nothing to compare with" in err
    few = "--length", 128, "--questions", 1, "--keys", 2
    code, _, err = call(compare_engines, NANO, *few, "--no-transformers", "--server", "http://127.0.0.1:9")
    assert code == 1 and "does not answer" in err and "Traceback" not in err
