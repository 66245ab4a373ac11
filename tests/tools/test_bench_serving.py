"""The load test against a small server of server-sent events, well and ill behaved."""

import json
import socket
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from tools.bench import serving as bench_serving

PIECES = 5
GAP = 0.03


class Fake(BaseHTTPRequestHandler):
    """Answers as `server.behaviour` says, but the first completion well, which is the load test's warm-up."""

    def log_message(self, *_):
        pass

    def do_GET(self):
        models = {"data": [{"id": "fake"}]} if self.server.behaviour != "no models" else {"hello": "world"}
        self.answer(200, json.dumps(models).encode())

    def answer(self, status, content):
        self.send_response(status)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def event(self, content):
        self.wfile.write(f"data: {content if isinstance(content, str) else json.dumps(content)}\n\n".encode())
        self.wfile.flush()

    def do_POST(self):
        server, body = self.server, json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with server.lock:
            server.bodies.append(body)
            server.keys.add(self.headers["Authorization"])
            server.in_flight += 1
            server.most = max(server.most, server.in_flight)
            number = len(server.bodies)
            behaviour = server.behaviour if number > 1 else "well"
            if behaviour == "every second fails":
                behaviour = "error 503" if number % 2 else "well"
        if number in server.together:
            server.all_there.wait(60)
        self.stream(behaviour)

    def stream(self, behaviour):
        if behaviour.startswith("error "):
            return self.answer(int(behaviour.removeprefix("error ")), b'{"error": "no"}')
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.end_headers()
        self.wfile.write(b": a comment\n\n")
        for i in range(PIECES):
            if behaviour == "empty":
                break
            time.sleep(GAP)
            self.event({"choices": [{"text": f" {i}"}], "usage": None})
            if behaviour == "cut":
                return None
            if behaviour == "silent":
                self.server.over.wait()
            if behaviour == "garbage":
                self.event("{")
            if behaviour == "says an error":
                self.event({"error": {"message": "out of memory"}})
        if behaviour not in ("no usage", "empty"):
            self.event({"choices": [], "usage": {"prompt_tokens": 7, "completion_tokens": 2 * PIECES}})
        with self.server.lock:
            self.server.in_flight -= 1  # before the client knows
        self.event("[DONE]")
        return None


@pytest.fixture
def server():
    with ThreadingHTTPServer(("127.0.0.1", 0), Fake) as fake:
        fake.behaviour, fake.bodies, fake.keys, fake.lock = "well", [], set(), threading.Lock()
        fake.in_flight, fake.most, fake.over = 0, 0, threading.Event()
        fake.together, fake.all_there = range(0), threading.Barrier(4)  # requests that are answered when all have come
        fake.daemon_threads = False  # closing waits for them: what they print does not get into the next test
        thread = threading.Thread(target=fake.serve_forever, args=(0.01,))  # seconds until it sees that it shall end
        thread.start()
        yield fake
        fake.over.set()
        fake.shutdown()
        thread.join()


@pytest.fixture
def call(server, monkeypatch, capsys, tmp_path):
    """Runs the tool; exit code, printed text, errors, and the results or None."""

    def run(*arguments, url=f"http://127.0.0.1:{server.server_port}/"):
        out = tmp_path / "out.json"
        command = ["tool", url, "--prompt-words", "6", "--max-tokens", "9", "--out", str(out), *arguments]
        monkeypatch.setattr(sys, "argv", command)
        code = 0
        try:
            bench_serving.main()
        except SystemExit as e:
            code = e.code
        return code, *capsys.readouterr(), json.loads(out.read_text()) if out.exists() else None

    return run


def test_levels_of_concurrency(call, server):
    server.together = range(10, 14)  # the first of the second level
    code, printed, err, results = call("--concurrency", "1", "4", "--requests", "8", "--extra", '{"seed": 3}')
    assert (code, err) == (0, "")
    assert [level["concurrency"] for level in results["levels"]] == [1, 4]
    one, four = results["levels"]
    for level in (one, four):
        assert (level["succeeded"], level["failed"], level["errors"]) == (8, 0, {})
        assert (level["prompt_tokens"], level["output_tokens"]) == (8 * 7, 8 * 2 * PIECES)
        assert level["ttft_ms"]["p50"] >= 1e3 * GAP
        assert 0 < level["itl_ms"]["p50"] <= level["itl_ms"]["p99"] < level["latency_ms"]["p99"]
        assert level["latency_ms"]["p50"] >= 1e3 * GAP * PIECES
        assert level["output_tokens_per_s"] == pytest.approx(level["output_tokens"] / level["seconds"])
    assert server.most == 4, "as many in flight as the level says, and no more"
    assert len(printed.splitlines()) == 4


def test_what_is_sent(call, server, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "secret")
    code, _, _, results = call("--concurrency", "2", "--requests", "3", "--model", "mine", "--extra", '{"seed": 3}')
    assert code == 0
    assert server.keys == {"Bearer secret"}
    prompts = [body.pop("prompt") for body in server.bodies]
    assert len(set(prompts)) == len(prompts) == 4, "no two prompts alike, so that none is cached"
    assert {len(prompt.split()) for prompt in prompts} == {6}
    assert all(body == results["request"] for body in server.bodies)
    assert results["request"]["model"] == "mine" and results["request"]["seed"] == 3
    assert results["request"]["max_tokens"] == 9
    assert "secret" not in json.dumps(results)


def test_pieces_are_counted_where_the_server_does_not(call, server):
    server.behaviour = "no usage"
    code, _, _, results = call("--concurrency", "1", "--requests", "2")
    assert code == 0
    assert (results["levels"][0]["prompt_tokens"], results["levels"][0]["output_tokens"]) == (0, 2 * PIECES)


FAILURES = {
    "error 500": "HTTP 500",
    "error 429": "HTTP 429",
    "cut": "the stream was cut",
    "empty": "the answer was empty",
    "silent": "the server was silent for too long",
    "garbage": "JSONDecodeError",
    "says an error": "out of memory",
}


@pytest.mark.parametrize(("behaviour", "message"), FAILURES.items(), ids=FAILURES)
def test_failed_requests_are_counted_and_named(call, server, behaviour, message):
    server.behaviour = behaviour
    patience = "2" if behaviour == "silent" else "60"
    code, printed, err, results = call("--concurrency", "2", "--requests", "2", "--timeout", patience)
    assert code == 1
    assert err.startswith("error: 2 of 2 requests failed") and message in err and err.count("\n") == 1
    (level,) = results["levels"]
    assert (level["succeeded"], level["failed"], level["output_tokens"]) == (0, 2, 0)
    assert level["ttft_ms"] is level["itl_ms"] is level["latency_ms"] is None
    assert message in next(iter(level["errors"]))
    assert len(printed.splitlines()) == 3


def test_the_others_are_measured(call, server):
    server.behaviour = "every second fails"
    code, _, err, results = call("--concurrency", "1", "--requests", "4")
    assert code == 1
    assert "2 of 4 requests failed: 2 x HTTP 503" in err
    assert (results["levels"][0]["succeeded"], results["levels"][0]["output_tokens"]) == (2, 2 * 2 * PIECES)


def test_nobody_there(call):
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{unused.getsockname()[1]}"
        code, _, err, results = call(url=url)
        assert code == 1 and results is None
        assert "ConnectionRefusedError" in err and "is an OpenAI-compatible server there?" in err
        code, _, err, _ = call("--model", "named", url=url)
        assert code == 1
        assert "does not answer a first request" in err


def test_another_kind_of_server(call, server):
    server.behaviour = "no models"
    code, _, err, _ = call()
    assert code == 1
    assert "does not name a model" in err


def test_an_address_that_is_none(call):
    code, _, err, _ = call(url="localhost:8000")
    assert code == 1
    assert "is no address of a server" in err


@pytest.mark.parametrize("wrong", [("--requests", "0"), ("--concurrency", "x"), ("--extra", "{"), ("--extra", "[]")])
def test_wrong_arguments(call, wrong):
    assert call(*wrong)[0] == 2
