"""The source of a conversion computed in JAX against transformers, and a run that learns from it."""

import dataclasses
import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from experiments import sft
from mla_jax.bridge.llama.teacher import load_teacher
from mla_jax.config import JsonlDataConfig, SftLossConfig
from mla_jax.errors import InputError, UsageError
from tiny import MODEL, make_config
from tiny_llama import save_llama

YARN = {"rope_type": "yarn", "rope_theta": 100.0, "factor": 4.0, "original_max_position_embeddings": 64}
LIKE_IT = dataclasses.replace(MODEL, vocab_size=262)


@pytest.mark.parametrize(
    "changes",
    [
        {"num_key_value_heads": 2, "rms_norm_eps": 1e-5},
        {"num_key_value_heads": 1, "tie_word_embeddings": True, "rope_parameters": YARN},
    ],
    ids=["grouped queries", "tied, yarn"],
)
def test_logits_are_those_of_transformers(changes, tmp_path):
    model = save_llama(tmp_path, **changes)
    teacher = load_teacher(tmp_path, LIKE_IT)
    tokens = np.random.default_rng(0).integers(0, 256, (2, 60))
    # Two documents in a row of the first: each sees only itself.
    segments, positions = np.ones((2, 60), np.int32), np.tile(np.arange(60), (2, 1))
    segments[0, 25:], positions[0, 25:] = 2, np.arange(35)
    with jax.default_matmul_precision("highest"), torch.inference_mode():
        h_BTD = jax.jit(teacher.hidden_states)(teacher.params, *map(jnp.asarray, (tokens, positions, segments)))
        ours = np.asarray(h_BTD @ teacher.head(teacher.params))
        for found, alone in ((ours[0, :25], tokens[0, :25]), (ours[0, 25:], tokens[0, 25:]), (ours[1], tokens[1])):
            theirs = model(torch.from_numpy(alone[None])).logits[0].numpy()
            assert np.abs(found - theirs).max() < 1e-4 * theirs.std()


def test_another_vocabulary_is_refused(tmp_path):
    save_llama(tmp_path)
    with pytest.raises(InputError, match="has a vocabulary of 262 tokens, the model one of 512"):
        load_teacher(tmp_path, MODEL)


def test_losses_that_contradict_themselves():
    for values, message in (
        ({"name": "distill"}, "needs loss.source"),
        ({"source": "folder"}, "loss.source is of loss=distill"),
        ({"name": "distill", "source": "folder", "kl_weight": 2.0}, "kl_weight must be from 0 to 1"),
        ({"name": "sigmoid"}, "loss.name"),
    ):
        with pytest.raises(UsageError, match=message):
            SftLossConfig(**values)


def test_a_run_learns_from_the_source(tmp_path, capsys):
    """On all devices: the divergence falls."""
    save_llama(tmp_path / "source", num_key_value_heads=2)
    rows = [json.dumps({"prompt": "", "completion": "the cat sat on the mat " * n}) for n in (3, 5, 2, 4) * 8]
    (tmp_path / "texts.jsonl").write_text("\n".join(rows))
    config = make_config(
        tmp_path / "run", [{"seq_len": 128, "steps": 8}], model=LIKE_IT, log_every=4, checkpoint_every=4,
        data=JsonlDataConfig(path=str(tmp_path / "texts.jsonl"), tokenizer="bytes"),
        loss=SftLossConfig(name="distill", source=str(tmp_path / "source")),
    )  # fmt: skip
    sft.main(config)
    by_step = [float(kl) for kl in re.findall(r"KL ([\d.]+)", capsys.readouterr().out)]
    assert len(by_step) == 2 and by_step[1] < by_step[0]
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["kl"] == pytest.approx(by_step[1], abs=1e-3)
    assert summary["loss"] == pytest.approx(0.9 * summary["kl"] + 0.1 * summary["cross_entropy"], rel=1e-4)
