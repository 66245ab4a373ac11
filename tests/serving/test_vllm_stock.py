"""Stock vLLM serves what the exporter writes: DeepSeek's width of 512 + 64, the one its CPU kernel knows."""

import json
import subprocess
import sys
import threading
import urllib.error
from pathlib import Path

import pytest
import transformers

from mla_jax.bridge.hf.export import export
from mla_jax.data.tokenizer import load_tokenizer
from vllm_server import (
    BLOCK,
    MARKS,
    PYTHON,
    ROOT,
    WIDTH_576,
    check_answers,
    completion_of,
    random_params,
    serve,
    tokens_of,
)

pytestmark = MARKS
PARAMS = random_params(WIDTH_576)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return export(WIDTH_576, PARAMS, load_tokenizer("bytes"), tmp_path_factory.mktemp("exports") / "tiny")


@pytest.fixture(scope="module")
def server(folder):
    with serve(folder, "--shutdown-timeout", "300") as running:
        yield running


def test_the_plugin_is_installed_and_changes_nothing(server):
    """Beside a vLLM without JAX."""
    assert subprocess.run([PYTHON, "-c", "import jax"], capture_output=True).returncode != 0
    log = server.log.read_text()
    assert "infinitecontext plugin: decode as none; prefill as none" in log
    assert "Using CPU_SDPA_MLA MLA prefill backend" in log


def test_tokens_and_logprobs_of_requests_at_once(server, folder):
    check_answers(server, WIDTH_576, PARAMS, folder, (1, 5, BLOCK - 1, BLOCK, BLOCK + 1, 40, 300, 480))


def events(response) -> list[str]:
    """The contents of a stream of server-sent events."""
    lines = (line.decode().strip() for line in response)
    return [line.removeprefix("data: ") for line in lines if line]


def test_a_stream_says_what_one_answer_says(server):
    prompt = [72, 105, 33]
    with server.post("/v1/completions", completion_of(prompt, stream=True)) as response:
        *pieces, end = events(response)
    assert end == "[DONE]" and len(pieces) > 1
    streamed = [tokens_of(json.loads(piece)["choices"][0]["logprobs"])[0] for piece in pieces]
    assert [token for tokens in streamed for token in tokens] == server.complete(prompt)[0]


def test_chat_uses_the_exported_template(server, folder):
    messages = [{"role": "user", "content": "Where is it?"}]
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=True, return_dict=False)
    options = {"max_tokens": 8, "temperature": 0, "ignore_eos": True, "return_tokens_as_token_ids": True}
    body = {"model": "tiny", "messages": messages, "logprobs": True, **options}
    with server.post("/v1/chat/completions", body) as response:
        answer = json.load(response)
    assert answer["usage"]["prompt_tokens"] == len(prompt)
    tokens = [int(said["token"].removeprefix("token_id:")) for said in answer["choices"][0]["logprobs"]["content"]]
    assert tokens == server.complete(prompt, max_tokens=8)[0]


def test_a_prompt_that_is_too_long_is_refused(server):
    with pytest.raises(urllib.error.HTTPError) as refused:
        server.complete([1] * 600)
    assert refused.value.code == 400
    assert "512" in refused.value.read().decode()


def test_the_load_test_measures_a_real_server(server, tmp_path):
    out = tmp_path / "load.json"
    url = f"http://127.0.0.1:{server.port}"
    command = [sys.executable, "-m", "tools.bench.serving", url, "--concurrency", "1", "3", "--requests", "6"]
    sizes = ["--prompt-words", "10", "--max-tokens", "12", "--extra", '{"ignore_eos": true}', "--out", str(out)]
    ran = subprocess.run([*command, *sizes], cwd=ROOT, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    levels = json.loads(out.read_text())["levels"]
    assert [level["concurrency"] for level in levels] == [1, 3]
    for level in levels:
        assert (level["succeeded"], level["failed"], level["output_tokens"]) == (6, 0, 72)
        assert 0 < level["ttft_ms"]["p50"] <= level["ttft_ms"]["p99"] <= level["latency_ms"]["p99"]
        assert level["prompt_tokens"] > 6 * 10


def test_sigterm_lets_requests_in_flight_end(server):
    """The last test: it ends the server."""
    tokens = 400
    body = completion_of([72, 105], stream=True, max_tokens=tokens)
    result, signalled = [], threading.Event()

    def ask():
        with server.post("/v1/completions", body) as response:
            result.append(response.readline())
            server.process.terminate()  # here and at once: a busy machine may let another thread wait for long
            signalled.set()
            result.extend(events(response))

    asking = threading.Thread(target=ask)
    asking.start()
    assert signalled.wait(300)
    server.process.wait(300)  # so that `stop` sends no second signal
    assert server.stop() == 0
    asking.join(300)
    assert result[-1] == "[DONE]"
    pieces = [json.loads(piece) for piece in result[1:-1]]
    assert pieces[-1]["choices"][0]["finish_reason"] == "length"
    with pytest.raises(urllib.error.URLError):
        server.complete([1])
