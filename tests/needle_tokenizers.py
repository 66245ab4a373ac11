"""Tokenizers of every kind that needle data is written with in tests, by name."""

import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from mla_jax.data.needle import vocabulary
from mla_jax.data.tokenizer import Tokenizer, load_tokenizer, train_bpe
from tiny_tokenizers import gpt4_like, sentencepiece_like

TEXT = (
    "It was late. Nobody spoke!  The clock — an old one, from 1871 — struck ten…\n\n\nWas it over? "
    "Not yet: 日本語 came first.\n\n# Title\nA line without an end\n * and another; then “quotes”."
)


def _foreign() -> Tokenizer:
    """Numbers are not split, words are letters, there is no bos: nothing like the built-in tokenizers."""
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=900,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=["</s>"],
        show_progress=False,
    )
    backend.decoder = decoders.ByteLevel()
    backend.train_from_iterator([f" {n}" for n in range(1000, 2000)] + ["The sun. The grass"], trainer)
    return Tokenizer(backend, {"eos_token": "</s>"}, "foreign")


TOKENIZERS = {
    "bytes": load_tokenizer("bytes"),
    "needle-bpe": load_tokenizer("needle-bpe"),
    "small": train_bpe([*vocabulary.PIECES, TEXT], 400, "small"),
    "foreign": _foreign(),
    **{kind: sentencepiece_like(kind, [*vocabulary.PIECES, TEXT]) for kind in ("llama", "first", "always")},
    "gpt4": gpt4_like([*vocabulary.PIECES, TEXT]),
}
OURS = ("bytes", "needle-bpe", "small")
SPACES_FIRST = ("llama", "first", "always")
"""Tokenizers that write a space before a text."""
