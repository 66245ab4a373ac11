"""A Llama is trained on synthetic text, converted, and healed by our own training: what each step costs.

`python -m pytest -s tests/bridge/test_llama_healing.py` prints the table of docs/importing.md.
"""

import dataclasses
import json

import jax
import numpy as np
import pytest
import torch
import transformers

from mla_jax.bridge.llama.config import Ranks
from mla_jax.bridge.llama.convert import convert, converted_perplexity
from mla_jax.checkpoint.run_folder import load_run, save_imported
from mla_jax.config import JsonlDataConfig, OptimConfig
from tiny import make_config, train
from tiny_llama import SIZES, stories, stories_tokenizer, train_llama

LENGTH, BATCH, HEALING = 128, 16, 100
RATE = 2e-3


def rows(tokenizer, seed, count):
    """[count, LENGTH] token ids of stories one after the other, each row with the beginning-of-text token."""
    ids = tokenizer.encode(stories(seed, count * 2))[: count * (LENGTH - 2)]
    rows = np.array(ids, np.int32).reshape(count, LENGTH - 2)
    ends = (np.full((count, 1), end, np.int32) for end in (tokenizer.bos_id, tokenizer.eos_id))
    return np.concatenate([next(ends), rows, next(ends)], axis=1)


@pytest.fixture(autouse=True, scope="module")
def optimised():
    """These trainings are long enough that optimising them pays."""
    before = jax.config.read("jax_disable_most_optimizations")
    jax.config.update("jax_disable_most_optimizations", False)
    yield
    jax.config.update("jax_disable_most_optimizations", before)


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """Folder with a trained Llama of 4 heads, calibration texts, and texts to heal on; the model; training rows."""
    folder = tmp_path_factory.mktemp("llama")
    tokenizer = stories_tokenizer()
    config = transformers.LlamaConfig(**{
        **SIZES, "vocab_size": tokenizer.vocab_size, "hidden_size": 32, "intermediate_size": 128, "rope_theta": 100.0,
        "tie_word_embeddings": True, "bos_token_id": tokenizer.bos_id, "eos_token_id": tokenizer.eos_id,
    })  # fmt: skip
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(config)
    with torch.no_grad():
        model.model.embed_tokens.weight.normal_(std=0.3)
    data = rows(tokenizer, 1, 2000)
    train_llama(model, data, steps=300, rate=4e-3, batch=BATCH, seed=0)
    model.save_pretrained(folder)
    tokenizer.save(folder)
    (folder / "calibration.txt").write_text(stories(2, 600))
    texts = (tokenizer.decode(row) for row in data)
    (folder / "healing.jsonl").write_text("\n".join(json.dumps({"prompt": "", "completion": t}) for t in texts))
    return folder, model, data


def source_perplexity(model, tokens_BT):
    with torch.inference_mode():
        tokens = torch.from_numpy(tokens_BT.astype(np.int64))
        return float(torch.exp(model(tokens, labels=tokens).loss))


def heal(run_dir, folder, name):
    """100 steps of experiments.sft's training, from the imported run."""
    imported = load_run(run_dir)
    config = make_config(
        run_dir.with_name(name),
        stages=[{"seq_len": LENGTH, "batch_size": BATCH, "steps": HEALING, "learning_rate": RATE}],
        model=dataclasses.replace(imported.model, remat="none"),
        data=JsonlDataConfig(path=str(folder / "healing.jsonl"), tokenizer=str(run_dir / "tokenizer")),
        optim=OptimConfig(name="adamw", b2=0.95, warmup_steps=10, decay_fraction=0.4),
        init_from=str(run_dir),
        checkpoint_every=HEALING,
    )
    assert train(config).finished
    healed = load_run(config.run_dir)
    assert healed.step == HEALING
    return healed


@pytest.mark.integration
def test_what_conversion_costs_and_healing_wins_back(source, tmp_path):
    folder, model, data = source
    table = {}
    for name, rank in (("full rank", 32), ("half rank", 16)):
        config, params, tokenizer, report = convert(
            folder, Ranks(rank), folder / "calibration.txt", tokens=16_384, length=LENGTH
        )
        run_dir = save_imported(tmp_path / name.replace(" ", "-"), config, params, tokenizer)
        held_out = rows(tokenizer, 3, 64)
        before = converted_perplexity(config, params, held_out)
        healed = heal(run_dir, folder, f"healed-{rank}")
        table[name] = before, converted_perplexity(healed.model, healed.params, held_out), report
    original = source_perplexity(model, held_out)
    train_llama(model, data, steps=HEALING, rate=RATE, batch=BATCH, seed=1)
    longer = source_perplexity(model, held_out)

    print(f"\n{'':<14}{'converted':>12}{'healed':>12}{'won back':>12}")
    print(f"{'source':<14}{original:>12.3f}{longer:>12.3f}")
    for name, (before, after, report) in table.items():
        print(f"{name:<14}{before:>12.3f}{after:>12.3f}{(before - after) / (before - longer):>12.0%}")
        print(report)

    (full, full_healed, _), (half, half_healed, _) = table.values()
    assert original * 1.02 < full < 1.5 * original
    assert full < half < 3 * original
    for before, after in ((full, full_healed), (half, half_healed)):
        # Against the source that has been trained as much longer: healing is not just more training.
        assert after - longer < 0.5 * (before - original)
