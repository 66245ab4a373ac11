"""Tokenizers of the kinds that models come with, tiny ones."""

import json
from collections.abc import Iterable
from typing import Any

import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers

from mla_jax.data.tokenizer import Tokenizer

_SPECIAL = ["<unk>", "<s>", "</s>"]
_CONFIG = {"bos_token": "<s>", "eos_token": "</s>"}

_GPT4_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
"""Where GPT-4, Llama-3 and Qwen split text: marks and the line break after them are one word."""


def sentencepiece_like(kind: str, texts: Iterable[str]) -> Tokenizer:
    """A BPE over whole texts, as the tokenizers of Llama-2 and Mistral are converted.

    Words begin with "▁", which is written before a text, too; digits are single and line breaks are bytes.

    Args:
        kind: what writes the "▁": `llama`, a normalizer, there being no pre-tokenizer; `first` or `always`, Metaspace.
        texts: to learn words from.
    """
    training = tokenizers.Tokenizer(models.BPE())
    parts: list[Any] = [
        pre_tokenizers.Split("\n", "removed"),
        pre_tokenizers.Digits(individual_digits=True),
        pre_tokenizers.Metaspace(prepend_scheme="never"),
        pre_tokenizers.Split(tokenizers.Regex(r"[.,:?!]"), "isolated"),
    ]
    training.pre_tokenizer = pre_tokenizers.Sequence(parts)
    byte_tokens = [f"<0x{byte:02X}>" for byte in range(256)]
    trainer = trainers.BpeTrainer(vocab_size=700, special_tokens=_SPECIAL + byte_tokens, show_progress=False)
    training.train_from_iterator([*texts, "0123456789"], trainer)
    learned = json.loads(training.to_str())["model"]
    merges = [(left, right) for left, right in learned["merges"]]
    backend = tokenizers.Tokenizer(
        models.BPE(vocab=learned["vocab"], merges=merges, byte_fallback=True, unk_token="<unk>", fuse_unk=True)
    )
    if kind == "llama":
        backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    else:
        backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=kind, split=kind != "first")
    without_first_space = decoders.Strip(" ", 1, 0)
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), without_first_space]
    )
    backend.add_special_tokens(_SPECIAL)
    return Tokenizer(backend, _CONFIG, kind)


def gpt4_like(texts: Iterable[str]) -> Tokenizer:
    """A byte-level BPE that splits text as GPT-4 does: numbers in threes, a full stop and a line break as one token."""
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(tokenizers.Regex(_GPT4_WORDS), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=900,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=_SPECIAL,
        show_progress=False,
    )
    lines = [".\n", ".\n\n"] * 50
    backend.train_from_iterator([*texts, *lines, *map(str, range(1000))], trainer)
    return Tokenizer(backend, _CONFIG, "gpt4")
