"""Attention on a key against the probabilities of transformers, and the tool that shows it."""

import dataclasses
import json

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from mla_jax.bridge.hf.export import export
from mla_jax.checkpoint.run_folder import save_imported
from mla_jax.data.tokenizer import load_tokenizer
from mla_jax.errors import InputError
from mla_jax.evals.attention_mass import attention_mass
from mla_jax.inference.generator import Generator
from tiny import MODEL, random_params
from tools import attention_mass as tool

TOKENIZER = load_tokenizer("bytes")
PEAKY = dataclasses.replace(MODEL, initializer_range=0.3)
PARAMS = random_params(PEAKY)
ANSWER = list(b" 31415")
PROMPT = [TOKENIZER.bos_id, *b"It is 31415. Mind it: 31415 it is. More is to come. What is it? It is"]


def test_shares_are_those_of_transformers(tmp_path):
    theirs = AutoModelForCausalLM.from_pretrained(
        export(PEAKY, PARAMS, TOKENIZER, tmp_path / "hf"), attn_implementation="eager", dtype=torch.float64
    )
    ours = attention_mass(Generator(PEAKY, PARAMS), PROMPT, ANSWER)
    with torch.no_grad():
        out = theirs(torch.tensor([PROMPT + ANSWER[:-1]]), output_attentions=True)
    size = len(ANSWER)
    starts = [i for i in range(len(PROMPT)) if PROMPT[i : i + size] == ANSWER]
    assert len(starts) == 2
    attention_LHTS = torch.stack(out.attentions)[:, 0, :, -size:].numpy()
    on_answer = sum(attention_LHTS[..., start : start + size].sum(-1) for start in starts)
    own = sum(np.stack([attention_LHTS[:, :, t, start + t] for t in range(size)], axis=-1) for start in starts)
    np.testing.assert_allclose(ours.answer_LHT, on_answer, atol=1e-4)
    np.testing.assert_allclose(ours.token_LHT, own, atol=1e-4)
    assert on_answer.max() > 0.3
    assert ours.right_T.tolist() == (out.logits[0, -size:].argmax(-1).numpy() == ANSWER).tolist()


def test_a_prompt_without_the_answer():
    with pytest.raises(InputError, match="does not hold the answer"):
        attention_mass(Generator(PEAKY, PARAMS), PROMPT, list(b" 27182"))


def test_the_tool_shows_the_heads_and_writes_all_of_them(call, tmp_path):
    run = save_imported(tmp_path / "run", PEAKY, PARAMS, TOKENIZER)
    code, out, err = call(
        tool, run, "--lengths", 320, 400, "--depths", 0.5, "--heads", 3, "--json", tmp_path / "x.json"
    )
    assert code == 0, err
    assert out.count(" tokens\n") == 2 and out.count("right") == 2
    content = json.loads((tmp_path / "x.json").read_text())
    assert [each["length"] for each in content] == [320, 400]
    shape = np.shape(content[0]["prompts"][0]["on_token"])
    assert shape[:2] == (MODEL.num_hidden_layers, MODEL.num_attention_heads)
    code, _, err = call(tool, run, "--lengths", 8)
    assert code != 0 and err.count("\n") == 1
