"""Our Triton kernel inside vLLM, in Triton's interpreter: widths that stock vLLM refuses on a CPU, and YaRN.

The model of width 256 was a Llama, and vLLM answers as the Llama does in transformers.
"""

import dataclasses

import numpy as np
import pytest

from mla_jax.bridge.hf.export import export
from mla_jax.data.tokenizer import load_tokenizer
from tiny_llama import convert_exactly
from tools import compare_engines
from vllm_server import (
    BLOCK,
    MARKS,
    TOLERANCE,
    WIDTH_320_YARN,
    check_answers,
    our_logprobs,
    random_params,
    random_prompts,
    serve,
)

pytestmark = MARKS


def random_320_yarn(folder):
    params = random_params(WIDTH_320_YARN)
    served = export(WIDTH_320_YARN, params, load_tokenizer("bytes"), folder / "tiny")
    return WIDTH_320_YARN, params, served, served


def converted_256(folder):
    config, params, tokenizer = convert_exactly(folder / "llama")
    return config, params, export(config, params, tokenizer, folder / "tiny"), folder / "llama"


@pytest.fixture(scope="module", params=[random_320_yarn, converted_256])
def served(request, tmp_path_factory):
    """(config, parameters, folder of what transformers must answer alike, server)"""
    config, params, folder, of_transformers = request.param(tmp_path_factory.mktemp("models"))
    with serve(folder, INFINITECONTEXT_VLLM="on", TRITON_INTERPRET="1") as server:
        yield config, params, of_transformers, server


def test_tokens_and_logprobs_of_requests_at_once(served):
    config, params, folder, server = served
    check_answers(server, config, params, folder, (1, BLOCK, 300))


def test_questions_about_needles_are_answered_alike(served, call):
    *_, server = served
    url, few = f"http://127.0.0.1:{server.port}", ("--length", 300, "--questions", 1, "--keys", 2)
    code, out, err = call(compare_engines, server.log.with_suffix(""), *few, "--server", url)
    assert code == 0 and "2 of 2 alike" in out, err


def test_the_log_says_what_was_chosen(served):
    *_, server = served
    log = server.log.read_text()
    assert "infinitecontext plugin: decode as CPU_MLA; prefill as CPU: INFINITECONTEXT_VLLM=on" in log
    assert "Using INFINITECONTEXT MLA prefill backend" in log


def test_sigterm_ends_an_idle_server(served):
    """The last test: it ends the server."""
    *_, server = served
    assert server.stop() == 0


def test_yarn_matters():
    """Otherwise the tests above would pass without it."""
    config, params = WIDTH_320_YARN, random_params(WIDTH_320_YARN)
    (tokens,) = random_prompts(config, 300)
    with_yarn, without = (
        our_logprobs(c, params, tokens[:280], tokens[280:])
        for c in (config, dataclasses.replace(config, rope_scaling=None))
    )
    assert np.abs(with_yarn - without).max() > 100 * TOLERANCE
