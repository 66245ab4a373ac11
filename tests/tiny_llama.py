"""Small Llamas that transformers itself makes, and synthetic texts to train and calibrate them on."""

import dataclasses
from pathlib import Path

import numpy as np
import torch
import transformers

from mla_jax.bridge.llama import source as llama_source
from mla_jax.bridge.llama.config import LlamaConfig, Ranks
from mla_jax.bridge.llama.convert import convert
from mla_jax.config import ModelConfig
from mla_jax.data.tokenizer import Tokenizer, load_tokenizer, train_bpe

_NAMES = "anna ben carl dora emil fay gus hana ivan jill kurt lena".split()
_COLOURS = "red blue green black white gold pink grey".split()
_THINGS = "key cup book ring coin lamp rope drum bell fish".split()
_PLACES = "park barn cave shop tower garden cellar forest".split()

SIZES = {
    "vocab_size": 262, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
    "max_position_embeddings": 256, "rms_norm_eps": 1e-6, "initializer_range": 0.1,
}  # fmt: skip


def story(rng: np.random.Generator) -> str:
    """Who has what where, then questions about it: to answer, one must look back, and word order matters."""
    n = rng.integers(3, 6)
    names, things = (rng.choice(words, n, replace=False) for words in (_NAMES, _THINGS))
    colours, places = (rng.choice(words, n) for words in (_COLOURS, _PLACES))
    sentences = [
        f"{name} has the {colour} {thing} in the {place} ."
        for name, colour, thing, place in zip(names, colours, things, places, strict=True)
    ]
    for _ in range(n):
        i = rng.integers(n)
        questions = (
            f"who has the {things[i]} ? {names[i]} .",
            f"where is {names[i]} ? in the {places[i]} .",
            f"what is {colours[i]} and in the {places[i]} ? the {things[i]} of {names[i]} .",
        )
        sentences.append(questions[rng.integers(3)])
        if i + 1 < n and rng.random() < 0.5:
            sentences.append(f"after {names[i]} came {names[i + 1]} .")
    return " ".join(sentences)


def stories(seed: int, count: int) -> str:
    """One a line."""
    rng = np.random.default_rng(seed)
    return "\n".join(story(rng) for _ in range(count))


def stories_tokenizer() -> Tokenizer:
    """Every word of the stories is a token."""
    return train_bpe([stories(0, 300)], 512, source="stories")


def save_llama(folder: Path, kind: str = "llama", **changes) -> transformers.PreTrainedModel:
    """A random checkpoint with norms unlike 1 and the tokenizer `bytes`."""
    torch.manual_seed(0)
    make_config, make_model = {
        "llama": (transformers.LlamaConfig, transformers.LlamaForCausalLM),
        "mistral": (transformers.MistralConfig, transformers.MistralForCausalLM),
        "qwen2": (transformers.Qwen2Config, transformers.Qwen2ForCausalLM),
        "qwen3": (transformers.Qwen3Config, transformers.Qwen3ForCausalLM),
    }[kind]
    model = make_model(make_config(**{**SIZES, **changes})).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.uniform_(0.5, 1.5)
            elif "embed" in name:
                parameter.normal_()
            elif name.endswith("bias"):
                parameter.normal_(std=0.1)
    model.save_pretrained(folder)
    load_tokenizer("bytes").save(folder)
    return model


def convert_exactly(folder: Path) -> tuple[ModelConfig, dict, Tokenizer]:
    """Saves a Llama with one key head of 64 as `folder`, and converts it to 192 + 64, where nothing is lost."""
    save_llama(folder, hidden_size=192, num_attention_heads=3, num_key_value_heads=1, max_position_embeddings=512)
    (folder / "texts.txt").write_text(stories(0, 60))
    return convert(folder, Ranks(192), folder / "texts.txt", tokens=2048, length=64)[:3]


def leave_positions_out(monkeypatch) -> None:
    """Reads checkpoints as if nothing turned with position: nothing is left for the RoPE key."""
    whole = llama_source.read_config

    def read_config(hf: dict) -> LlamaConfig:
        config = whole(hf)
        return dataclasses.replace(config, inv_freq=0 * config.inv_freq)

    monkeypatch.setattr(llama_source, "read_config", read_config)


def train_llama(
    model: transformers.LlamaForCausalLM, rows_BT: np.ndarray, steps: int, rate: float, batch: int, seed: int
) -> None:
    """AdamW with a short warm-up and a rate that decays over the last 40 %."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # waiting for each other costs more than small matrices, the more so on busy cores
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.95), weight_decay=0.01)
    rng = np.random.default_rng(seed)
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = rate * min(1, (step + 1) / 10, (steps - step) / (0.4 * steps))
        tokens = torch.from_numpy(rows_BT[rng.integers(len(rows_BT), size=batch)].astype(np.int64))
        loss = model(tokens, labels=tokens).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    torch.set_num_threads(threads)
