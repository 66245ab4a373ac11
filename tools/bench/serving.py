"""Load test of an OpenAI-compatible server: `python -m tools.bench.serving URL [--concurrency 1 4 16] [--out FILE]`.

Each level keeps so many requests in flight until its requests are done. A request is streamed; measured are the time
to the first piece of text (TTFT), the times between pieces (ITL; a piece is a token on most servers), and the whole.
Prompts are random words, different in each request, so that no server has them cached.
"""

import argparse
import datetime
import http.client
import itertools
import json
import os
import random
import time
import urllib.error
import urllib.request
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from mla_jax.errors import InputError, one_line_errors
from mla_jax.files import write_json

PERCENTILES = (50, 90, 99)
_WORDS = "time year day way man world life hand part child eye place work week case point home water room area".split()


class Answer(NamedTuple):
    """The answer to one request; times are in seconds from when it was sent."""

    pieces: list[float]
    """When each piece of text came."""
    end: float
    prompt_tokens: int
    """Number as the server counts; 0 if it does not say."""
    output_tokens: int
    """Number as the server counts, else of pieces."""
    error: str | None


class Endpoint(NamedTuple):
    """A server and how it is asked."""

    url: str
    timeout: float
    """Seconds without a byte after which a request has failed."""

    def open(self, path: str, body: dict[str, Any] | None = None):
        """The open response. The key for the server is taken from OPENAI_API_KEY."""
        headers = {"Content-Type": "application/json"}
        if key := os.environ.get("OPENAI_API_KEY"):
            headers["Authorization"] = f"Bearer {key}"
        data = None if body is None else json.dumps(body).encode()
        return urllib.request.urlopen(urllib.request.Request(self.url + path, data, headers), timeout=self.timeout)

    def model(self) -> str:
        """The first model that the server has. Raises InputError if it does not answer as such a server does."""
        try:
            with self.open("/v1/models") as response:
                return json.load(response)["data"][0]["id"]
        except (OSError, ValueError, LookupError, TypeError, http.client.HTTPException) as e:
            raise InputError(
                f"{self.url}/v1/models does not name a model ({_reason(e)}); is an OpenAI-compatible server there?"
            ) from e

    def ask(self, body: dict[str, Any]) -> Answer:
        """Sends one streamed completion and waits for its end; what goes wrong is in the answer."""
        start = time.perf_counter()
        pieces, usage, done, error = [], {}, False, None
        try:
            with self.open("/v1/completions", body) as response:
                for event in _events(response):
                    if event == "[DONE]":
                        done = True
                        break
                    content = json.loads(event)
                    if "error" in content:
                        raise ValueError(f"the server says {content['error']}")
                    usage = content.get("usage") or usage
                    if any(choice.get("text") for choice in content.get("choices", ())):
                        pieces.append(time.perf_counter() - start)
            if not done:
                error = "the stream was cut"
            elif not pieces and not usage.get("completion_tokens"):
                error = "the answer was empty"
        except (OSError, ValueError, AttributeError, http.client.HTTPException) as e:
            error = _reason(e)
        tokens = usage.get("completion_tokens", len(pieces))
        return Answer(pieces, time.perf_counter() - start, usage.get("prompt_tokens", 0), tokens, error)


def _events(response) -> Iterator[str]:
    for line in response:
        if line.startswith(b"data:"):
            yield line[5:].strip().decode()


def _reason(e: Exception) -> str:
    if isinstance(e, urllib.error.HTTPError):
        return f"HTTP {e.code}"
    if isinstance(e, urllib.error.URLError):
        e = e.reason if isinstance(e.reason, Exception) else e
    return "the server was silent for too long" if isinstance(e, TimeoutError) else f"{type(e).__name__}: {e}"


def _prompt(words: int, number: int) -> str:
    rng = random.Random(number)
    return " ".join(rng.choices(_WORDS, k=words))


def run_level(endpoint: Endpoint, body: dict[str, Any], prompts: list[str], concurrency: int) -> dict[str, Any]:
    """Asks all prompts, `concurrency` at a time; returns statistics of the requests that succeeded."""
    start = time.perf_counter()
    with ThreadPoolExecutor(concurrency) as pool:
        answers = list(pool.map(lambda prompt: endpoint.ask({**body, "prompt": prompt}), prompts))
    seconds = time.perf_counter() - start
    good = [answer for answer in answers if answer.error is None]
    gaps = [b - a for answer in good for a, b in itertools.pairwise(answer.pieces)]
    output_tokens = sum(answer.output_tokens for answer in good)
    return {
        "concurrency": concurrency,
        "succeeded": len(good),
        "failed": len(answers) - len(good),
        "errors": dict(Counter(answer.error for answer in answers if answer.error is not None)),
        "seconds": seconds,
        "prompt_tokens": sum(answer.prompt_tokens for answer in good),
        "output_tokens": output_tokens,
        "output_tokens_per_s": output_tokens / seconds,
        "requests_per_s": len(good) / seconds,
        "ttft_ms": _percentiles([answer.pieces[0] for answer in good if answer.pieces]),
        "itl_ms": _percentiles(gaps),
        "latency_ms": _percentiles([answer.end for answer in good]),
    }


def _percentiles(seconds: list[float]) -> dict[str, float] | None:
    """Percentiles in milliseconds; None without values."""
    if not seconds:
        return None
    return {f"p{p}": float(np.percentile(seconds, p)) * 1e3 for p in PERCENTILES}


def _row(level: dict[str, Any]) -> str:
    def times(name: str) -> str:
        found = level[name]
        return f"{'-':>24}" if found is None else "".join(f"{found[f'p{p}']:>8.1f}" for p in PERCENTILES)

    head = f"{level['concurrency']:>11}{level['succeeded']:>6}{level['failed']:>7}{level['output_tokens_per_s']:>10.1f}"
    return head + times("ttft_ms") + times("itl_ms") + times("latency_ms")


def _parse() -> argparse.Namespace:
    def count(text: str) -> int:
        if not text.isdecimal() or int(text) < 1:
            raise argparse.ArgumentTypeError(f"{text!r} is no number from 1 on")
        return int(text)

    def fields(text: str) -> dict[str, Any]:
        try:
            content = json.loads(text)
        except ValueError as e:
            raise argparse.ArgumentTypeError(f"{text!r} is no JSON ({e})") from e
        if not isinstance(content, dict):
            raise argparse.ArgumentTypeError(f"{text!r} is no JSON object")
        return content

    parser = argparse.ArgumentParser(prog="python -m tools.bench.serving", description="Load test of a server.")
    parser.add_argument("url", help="of the server, without /v1: http://127.0.0.1:8000 for instance")
    parser.add_argument("--model", help="name of the model (default: the server's first)")
    parser.add_argument("--concurrency", type=count, nargs="+", default=[1, 2, 4, 8], help="requests in flight")
    parser.add_argument("--requests", type=count, default=32, help="of each level (default: 32)")
    parser.add_argument("--prompt-words", type=count, default=128, help="words of a prompt (default: 128)")
    parser.add_argument("--max-tokens", type=count, default=64, help="the most tokens of an answer (default: 64)")
    parser.add_argument("--timeout", type=float, default=300, help="seconds without a byte (default: 300)")
    parser.add_argument("--extra", type=fields, default={}, help="more of the request: '{\"ignore_eos\": true}'")
    parser.add_argument("--out", type=Path, help="file to write the results to, as JSON")
    return parser.parse_args()


def main() -> None:
    """The command line; exit code 1 if a request failed, after all were made and the results written."""
    args = _parse()
    with one_line_errors():
        endpoint = Endpoint(args.url.rstrip("/"), args.timeout)
        if not endpoint.url.startswith(("http://", "https://")):
            raise InputError(f"{args.url} is no address of a server; expected http://HOST:PORT")
        model = args.model or endpoint.model()
        body = {
            "model": model,
            "max_tokens": args.max_tokens,
            "temperature": 0,
            "stream": True,
            "stream_options": {"include_usage": True},
            **args.extra,
        }
        numbers = itertools.count()

        def prompts(n: int) -> list[str]:
            return [_prompt(args.prompt_words, number) for number in itertools.islice(numbers, n)]

        warm_up = endpoint.ask({**body, "prompt": prompts(1)[0]})
        if warm_up.error:
            raise InputError(f"{endpoint.url} does not answer a first request: {warm_up.error}")
        print(f"{model} at {endpoint.url}: {args.requests} requests a level, {args.prompt_words} words each")
        names = "".join(f"{f'{name} p{p}':>8}" for name in ("ttft", "itl", "all") for p in PERCENTILES)
        print(f"{'concurrency':>11}{'ok':>6}{'failed':>7}{'tokens/s':>10}{names}   (ms)")
        levels = []
        for concurrency in args.concurrency:
            levels.append(run_level(endpoint, body, prompts(args.requests), concurrency))
            print(_row(levels[-1]), flush=True)
        if args.out:
            date = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
            asked = {"url": endpoint.url, "date": date, "prompt_words": args.prompt_words, "request": body}
            write_json(args.out, {**asked, "levels": levels})
        errors = sum((Counter(level["errors"]) for level in levels), Counter())
        if errors:
            said = "; ".join(f"{n} x {error}" for error, n in errors.most_common())
            raise InputError(f"{errors.total()} of {args.requests * len(levels)} requests failed: {said}")


if __name__ == "__main__":
    main()
