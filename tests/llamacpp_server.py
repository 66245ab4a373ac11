"""A real llama.cpp: run as a script it serves a GGUF file on loopback until its stdin closes; `serve` starts that."""

import contextlib
import json
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

CONTEXT = 512
"""Tokens of cache."""


class LlamaCpp:
    """A client of llama.cpp's own HTTP interface."""

    def __init__(self, url: str):
        self.url = url

    def post(self, path: str, **body: Any) -> dict[str, Any]:
        request = urllib.request.Request(
            self.url + path, json.dumps(body).encode(), {"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(request, timeout=600) as response:
            return json.load(response)

    def tokenize(self, text: str, **options: Any) -> list[int]:
        return self.post("/tokenize", content=text, **options)["tokens"]

    def complete(self, ids: list[int], tokens: int, vocab_size: int) -> tuple[list[int], dict[int, list[float]]]:
        """Greedy tokens and, by step, the log-probabilities of all ids; llama.cpp leaves out steps that end in the
        middle of a character.
        """
        answer = self.post(
            "/completion", prompt=ids, n_predict=tokens, temperature=0, n_probs=vocab_size, cache_prompt=False,
            return_tokens=True,
        )  # fmt: skip
        generated, steps, at = answer["tokens"], {}, 0
        for step in answer["completion_probabilities"]:
            at = generated.index(step["id"], at)
            log_probs = {token["id"]: token["logprob"] for token in step["top_logprobs"]}
            steps[at] = [log_probs[i] for i in range(vocab_size)]
            at += 1
        return generated, steps


@contextlib.contextmanager
def serve(gguf: Path, context: int = CONTEXT, port: int = 0, threads: int = 2) -> Iterator[LlamaCpp]:
    """Starts llama.cpp in a process of its own, so that what it asserts ends only that one; port 0 is any free one."""
    log = gguf.with_suffix(".log")
    with log.open("w") as stderr:
        command = [sys.executable, __file__, str(gguf), *map(str, (context, port, threads))]
        server = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=stderr, text=True)
        assert server.stdin and server.stdout
        try:
            lines = (line for line in server.stdout if line.startswith("listening "))
            url = next(lines, None)
            if url is None:
                raise RuntimeError(f"llama.cpp does not load {gguf.name}:\n{log.read_text(errors='replace')[-3000:]}")
            yield LlamaCpp(url.split()[1])
        finally:
            server.stdin.close()
            server.wait(300)


def main(gguf: str, context: str, port: str, threads: str) -> None:
    import xllamacpp

    params = xllamacpp.CommonParams()
    params.model.path = gguf
    params.n_ctx = int(context)
    params.n_parallel = 1
    params.port = int(port)
    params.verbosity = 5  # tells the size of the cache
    params.warmup = params.fit_params = False
    params.hostnames = ["127.0.0.1"]
    params.cpuparams.n_threads = int(threads)
    # As exact as it can be: what is compared is the model, not the rounding of its cache.
    params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
    server = xllamacpp.Server(params)
    print(f"\nlistening {server.listening_address}", flush=True)
    sys.stdin.read()


if __name__ == "__main__":
    main(*sys.argv[1:])
