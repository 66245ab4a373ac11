"""Tiny models for the vLLM tests, what they must answer, and a vLLM server to ask."""

import contextlib
import dataclasses
import functools
import json
import os
import signal
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers

from mla_jax.config import ModelConfig, YarnConfig
from mla_jax.inference.generator import generate
from mla_jax.model.transformer import abstract_params, bind
from processes import held_port
from tiny import MODEL

ROOT = Path(__file__).resolve().parent.parent
PYTHON = ROOT / ".venv-vllm" / "bin" / "python"
MARKS = [pytest.mark.vllm, pytest.mark.skipif(not PYTHON.exists(), reason=f"{PYTHON} is missing; make vllm")]
NEW = 12
TOLERANCE = 1e-4
LONGEST = 512
BLOCK = 16
SECONDS = 900
"""Until a server must have started: many, for a machine that does other things too."""
YARN = YarnConfig(factor=8.0, original_max_position_embeddings=64, mscale=1.0, mscale_all_dim=1.0)


def model(kv_lora_rank: int, nope: int, rope: int, v: int, **changes) -> ModelConfig:
    """Of few layers, with weights large enough that a wrong rotation or temperature shows."""
    heads = {"qk_nope_head_dim": nope, "qk_rope_head_dim": rope, "v_head_dim": v}
    return dataclasses.replace(
        MODEL,
        kv_lora_rank=kv_lora_rank,
        initializer_range=0.2,
        max_position_embeddings=LONGEST,
        tie_word_embeddings=False,
        **heads,
        **changes,
    )


WIDTH_576 = model(512, 128, 64, 128, q_lora_rank=48)
WIDTH_320_YARN = model(256, 64, 64, 128, q_lora_rank=48, rope_scaling=YARN)


def random_params(config: ModelConfig) -> dict:
    """Norms differ from 1, so that one left out shows."""
    rng = np.random.default_rng(0)

    def draw(path, leaf):
        mean, spread = (1.0, 0.2) if "norm" in path[-1].key else (0.0, config.initializer_range)
        return jnp.asarray(rng.normal(mean, spread, leaf.shape), leaf.dtype)

    return jax.tree.map_with_path(draw, abstract_params(config))


def random_prompts(config: ModelConfig, *lengths: int) -> list[list[int]]:
    rng = np.random.default_rng(1)
    return [rng.integers(0, 256, n).tolist() for n in lengths]  # bytes, no special tokens


def ours(config: ModelConfig, params: dict, prompts: list[list[int]]) -> list[list[int]]:
    """Greedy continuations of NEW tokens by our generation."""
    return generate(config, params, prompts, max_new_tokens=NEW)


@functools.partial(jax.jit, static_argnums=0)
def _logits(config: ModelConfig, params: dict, tokens: jax.Array) -> jax.Array:
    return bind(config, params).logits(bind(config, params)(tokens))


def our_logprobs(config: ModelConfig, params: dict, prompt: list[int], new: list[int]) -> np.ndarray:
    """Of each new token, from the whole forward pass, padded to one length so that it compiles once."""
    tokens = np.zeros((1, LONGEST), np.int32)
    tokens[0, : len(prompt) + len(new)] = prompt + new
    logits = _logits(config, params, tokens)[0, len(prompt) - 1 :][: len(new)]
    return np.asarray(jnp.take_along_axis(jax.nn.log_softmax(logits), jnp.asarray(new)[:, None], 1))[:, 0]


def theirs(folder: Path, prompts: list[list[int]]) -> list[tuple[list[int], np.ndarray]]:
    """Greedy tokens of transformers, and their logprobs."""
    hf_model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    answers = []
    with torch.inference_mode():
        for prompt in prompts:
            ids = torch.tensor([prompt])
            tokens = hf_model.generate(
                ids, attention_mask=torch.ones_like(ids), do_sample=False, min_new_tokens=NEW, max_new_tokens=NEW
            )
            new = tokens[0, len(prompt) :]
            logits = hf_model(tokens[:, :-1]).logits[0, len(prompt) - 1 :]
            answers.append((new.tolist(), logits.log_softmax(-1).gather(1, new[:, None])[:, 0].numpy()))
    return answers


@dataclasses.dataclass
class Server:
    """A vLLM server that answers."""

    process: subprocess.Popen
    port: int
    log: Path

    def post(self, path: str, body: dict, timeout: float = 600):
        """The open response to a JSON request."""
        request = urllib.request.Request(
            f"http://127.0.0.1:{self.port}{path}", json.dumps(body).encode(), {"Content-Type": "application/json"}
        )
        return urllib.request.urlopen(request, timeout=timeout)

    def complete(self, prompt: list[int], **options) -> tuple[list[int], list[float]]:
        """Greedy tokens and their logprobs."""
        with self.post("/v1/completions", completion_of(prompt, **options)) as response:
            return tokens_of(json.load(response)["choices"][0]["logprobs"])

    def stop(self, seconds: float = 300) -> int:
        """Asks it to end, and gives its exit code; fails if it or a process of its does not end."""
        self.process.terminate()
        code = self.process.wait(seconds)
        end = time.monotonic() + seconds
        while alive(self.process.pid):
            assert time.monotonic() < end, "a process of the server is left"
            time.sleep(0.1)
        return code


def check_answers(server: Server, config: ModelConfig, params: dict, folder: Path, lengths: tuple[int, ...]) -> None:
    """vLLM, asked all prompts at once, answers as our generation and as transformers."""
    prompts = random_prompts(config, *lengths)
    with ThreadPoolExecutor(len(prompts)) as pool:
        answers = list(pool.map(server.complete, prompts))
    expected = ours(config, params, prompts)
    assert len({token for row in expected for token in row}) > 15, "the test would not notice much"
    for prompt, (tokens, logprobs), our, (their, their_logprobs) in zip(
        prompts, answers, expected, theirs(folder, prompts), strict=True
    ):
        assert tokens == our == their
        np.testing.assert_allclose(logprobs, our_logprobs(config, params, prompt, our), atol=TOLERANCE)
        np.testing.assert_allclose(logprobs, their_logprobs, atol=TOLERANCE)


def alive(group: int) -> bool:
    """Whether the process group still has a process."""
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    return True


def completion_of(prompt: list[int], **options) -> dict:
    """The body of a request for NEW greedy tokens with their ids and logprobs."""
    greedy = {"temperature": 0, "max_tokens": NEW, "ignore_eos": True}
    return {"model": "tiny", "prompt": prompt, "logprobs": 1, "return_tokens_as_token_ids": True, **greedy, **options}


def tokens_of(logprobs: dict) -> tuple[list[int], list[float]]:
    return [int(token.removeprefix("token_id:")) for token in logprobs["tokens"]], logprobs["token_logprobs"]


@contextlib.contextmanager
def serve(folder: Path, *flags: str, **environment: str) -> Iterator[Server]:
    """vLLM on a CPU, with the exported model `tiny`, ready for requests; killed afterwards if it still runs."""
    folder = folder.resolve()  # it runs in there
    log = folder.with_suffix(".log")
    with held_port() as port:
        command = [
            str(PYTHON), "-m", "vllm.entrypoints.openai.api_server", "--model", str(folder),
            "--served-model-name", "tiny", "--host", "127.0.0.1", "--port", str(port), "--dtype", "float32",
            "--max-model-len", str(LONGEST), "--max-num-seqs", "8", "--enforce-eager",
            "--attention-backend", "CPU_MLA",
            # vLLM's own rotary op for CPUs gives wrong tokens.
            "--compilation-config", '{"custom_ops":["-rotary_embedding"]}', *flags,
        ]  # fmt: skip
        kept = {k: v for k, v in os.environ.items() if not k.startswith(("XLA_", "JAX_", "PYTHONPATH"))}
        settings = {"VLLM_CPU_KVCACHE_SPACE": "1", "HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1"}
        with log.open("w") as out:
            process = subprocess.Popen(
                command,
                env=kept | settings | environment,
                stdout=out,
                stderr=subprocess.STDOUT,
                cwd=folder,
                start_new_session=True,  # its engine and workers are in its process group
            )
        try:
            end = time.monotonic() + SECONDS
            while not healthy(port):
                assert process.poll() is None, f"vLLM ended with {process.returncode}:\n{log.read_text()[-6000:]}"
                assert time.monotonic() < end, f"vLLM did not start within {SECONDS} s:\n{log.read_text()[-6000:]}"
                time.sleep(0.5)
            yield Server(process, port, log)
        finally:
            if alive(process.pid):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def healthy(port: int) -> bool:
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5) as response:
            return response.status == 200
    except (urllib.error.URLError, OSError):
        return False
