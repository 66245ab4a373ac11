"""Byte-level BPE of the built-in tokenizers: byte b has the id b, special tokens those from 256, then come merges."""

import json
from collections.abc import Iterable

import tokenizers
from tokenizers import AddedToken, decoders, models, pre_tokenizers, processors, trainers

from mla_jax.errors import UsageError

PAD, BOS, EOS = "<|pad|>", "<|bos|>", "<|eos|>"
ROLES = ("<|system|>", "<|user|>", "<|assistant|>")
SPECIAL_TOKENS = (PAD, BOS, EOS, *ROLES)

CHAT_TEMPLATE = (
    "{{ bos_token }}"
    "{% for message in messages %}"
    "{% if message['role'] not in ['system', 'user', 'assistant'] %}"
    "{{ raise_exception('unknown role ' + message['role']) }}"
    "{% endif %}"
    "{{ '<|' + message['role'] + '|>' + message['content'] + eos_token }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)
"""Every turn ends with the eos token, so that generation stops where a turn does."""


def train_merges(texts: Iterable[str], vocab_size: int) -> list[tuple[str, str]]:
    """Merges of a BPE of `vocab_size` ids with digits split singly; raises UsageError as `train_bpe` does."""
    smallest = 256 + len(SPECIAL_TOKENS)
    if vocab_size < smallest:
        raise UsageError(f"vocab_size must be at least {smallest} (256 bytes and special tokens), got {vocab_size}")
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = _pre_tokenizer()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - len(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(texts, trainer)
    merges = json.loads(backend.to_str())["model"]["merges"]
    return [(left, right) for left, right in merges]


def _pre_tokenizer() -> pre_tokenizers.PreTokenizer:
    return pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )


def byte_bpe(merges: list[tuple[str, str]]) -> tokenizers.Tokenizer:
    """The tokenizer whose ids are bytes, special tokens, then one token a merge."""
    vocab = {character: byte for byte, character in enumerate(_byte_characters())}
    vocab |= {token: 256 + i for i, token in enumerate(SPECIAL_TOKENS)}
    for left, right in merges:
        vocab.setdefault(left + right, len(vocab))
    backend = tokenizers.Tokenizer(models.BPE(vocab=vocab, merges=merges))
    backend.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL_TOKENS])
    backend.pre_tokenizer = _pre_tokenizer()
    backend.decoder = decoders.ByteLevel()
    backend.post_processor = processors.TemplateProcessing(single=f"{BOS} $A", special_tokens=[(BOS, vocab[BOS])])
    return backend


def _byte_characters() -> list[str]:
    """GPT-2's printable character for each byte, as the ByteLevel pre-tokenizer writes them."""
    printable = {*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)}
    others = iter(range(256, 512))
    return [chr(byte) if byte in printable else chr(next(others)) for byte in range(256)]
