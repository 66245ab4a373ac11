"""The answers of several engines to questions about needles: `python -m tools.compare_engines HF_FOLDER`."""

import argparse
import dataclasses
import http.client
import itertools
import json
import urllib.request
from pathlib import Path
from typing import Any

from mla_jax.bridge.run_or_hf import load_run_or_hf
from mla_jax.checkpoint.run_folder import Run
from mla_jax.config import MultikeyConfig, PasskeyConfig
from mla_jax.errors import InputError, UsageError, one_line_errors
from mla_jax.evals.multikey import multikey_task
from mla_jax.evals.passkey import passkey_task
from mla_jax.evals.task import Prompt
from mla_jax.inference.generator import Generator

NEW = 10
"""The most tokens of an answer."""
WAIT = 600
"""Seconds for an answer of a server."""


def main() -> None:
    """The command line; exit code 1 if the engines differ."""
    parser = argparse.ArgumentParser(
        prog="python -m tools.compare_engines",
        description="Asks an exported model for passkeys and for numbers among many keys, in JAX, in transformers, "
        "and in a server if there is one; all greedily and in float32, but for what the server was started with.",
    )
    parser.add_argument("folder", type=Path, help="Hugging Face folder")
    parser.add_argument("--length", type=int, default=2048, help="tokens of a prompt; default %(default)s")
    parser.add_argument("--questions", type=int, default=5, help="of each of the two kinds; default %(default)s")
    parser.add_argument("--keys", type=int, default=16, help="in a haystack of many; default %(default)s")
    parser.add_argument("--server", metavar="URL", help="of a vLLM server of the same folder, http://127.0.0.1:8000")
    parser.add_argument("--no-transformers", action="store_true", help="leave out transformers, which is slow if long")
    args = parser.parse_args()
    with one_line_errors():
        if not (args.folder / "config.json").exists():
            raise UsageError(f"{args.folder} has no config.json; export the run with tools.export_hf")
        if args.no_transformers and not args.server:
            raise UsageError("nothing to compare with: leave out --no-transformers, or name a --server")
        export = load_run_or_hf(args.folder)
        asked = prompts(export, args.length, args.questions, args.keys)
        answers = {"JAX": in_jax(export, asked)}
        if not args.no_transformers:
            answers["transformers"] = in_transformers(args.folder, export, asked)
        if args.server:
            answers["server"] = in_server(args.server.rstrip("/"), export, asked)
        print("| expected |", " | ".join(answers), "|")
        print("|---|" + "---|" * len(answers))
        for prompt, texts in zip(asked, zip(*answers.values(), strict=True), strict=True):
            print(f"| {prompt.answer} |", " | ".join(map(repr, texts)), "|")
        alike = sum(len(set(texts)) == 1 for texts in zip(*answers.values(), strict=True))
        right = sum(prompt.answer in text for prompt, text in zip(asked, answers["JAX"], strict=True))
        print(f"{alike} of {len(asked)} alike, {right} right in JAX")
        if alike < len(asked):
            raise InputError("the engines differ")


def prompts(export: Run, length: int, questions: int, keys: int) -> list[Prompt]:
    """So many passkeys at depths spread over a prompt, and as many questions about a haystack of many keys."""
    depths = [i / max(questions - 1, 1) for i in range(questions)]
    passkeys = PasskeyConfig(lengths=[length], depths=depths, samples=1, max_new_tokens=NEW)
    many = MultikeyConfig(lengths=[length], keys=[keys], samples=questions, questions=1, max_new_tokens=NEW)
    tasks = (
        passkey_task(export.model, export.tokenizer, passkeys),
        multikey_task(export.model, export.tokenizer, many),
    )
    return [
        task.prompt(cell, sample)
        for task in tasks
        for cell, sample in itertools.product(task.cells, range(task.samples))
    ]


def in_jax(export: Run, asked: list[Prompt]) -> list[str]:
    """Texts of our own generation."""
    generator = Generator(dataclasses.replace(export.model, dtype="float32"), export.params)
    eos_id = export.tokenizer.eos_id
    new = (generator.generate([prompt.ids], max_new_tokens=NEW, eos_id=eos_id)[0] for prompt in asked)
    return [export.tokenizer.decode(ids) for ids in new]


def in_transformers(folder: Path, export: Run, asked: list[Prompt]) -> list[str]:
    """Texts of transformers' `generate`."""
    try:
        import torch
        from transformers import AutoModelForCausalLM
    except ImportError as e:
        raise InputError("transformers is not installed: pip install -e '.[hf]', or --no-transformers") from e

    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    texts = []
    for prompt in asked:
        ids = torch.tensor([prompt.ids])
        made = model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=NEW)
        texts.append(_text(export, made[0, len(prompt.ids) :].tolist()))
    return texts


def in_server(url: str, export: Run, asked: list[Prompt]) -> list[str]:
    """Texts of a server that takes and gives token ids, as vLLM does beside what OpenAI's completions have.

    Raises:
        InputError: it does not answer.
    """

    def call(path: str, body: dict | None = None) -> dict:
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(url + path, data, {"Content-Type": "application/json"})
        with urllib.request.urlopen(request, timeout=WAIT) as response:
            return json.load(response)

    try:
        name = call("/v1/models")["data"][0]["id"]
        how = {"model": name, "max_tokens": NEW, "temperature": 0, "return_token_ids": True}
        replies = (call("/v1/completions", how | {"prompt": prompt.ids}) for prompt in asked)
        return [_text(export, reply["choices"][0]["token_ids"]) for reply in replies]
    except (OSError, LookupError, ValueError, TypeError, http.client.HTTPException) as e:
        raise InputError(f"{url} does not answer as vLLM would ({e})") from e


def _text(export: Run, new: list[int]) -> str:
    """The text of new tokens up to the end."""
    return export.tokenizer.decode(list(itertools.takewhile(lambda token: token != export.tokenizer.eos_id, new)))


if __name__ == "__main__":
    main()
