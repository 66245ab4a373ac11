"""Texts encoded as they stand within a longer text.

Tokenizers of SentencePiece's kind (Llama-2, Mistral) write a space before whatever they encode, as if a word began
there. So a piece of a text is encoded behind a character, whose tokens are then left out.
"""

from mla_jax.data.tokenizer import Encoded, Tokenizer

_BEFORE = ("\n", "a")


def _character_before(text: str) -> str:
    """A character that no tokenizer joins to the first of `text`."""
    return "\n" if text[:1].isalnum() else "a"


def encode_within(tokenizer: Tokenizer, texts: list[str]) -> list[list[int]]:
    """Ids of each text within a longer one."""
    heads = {character: tokenizer.encode(character) for character in _BEFORE}
    befores = [_character_before(text) for text in texts]
    encoded = tokenizer.encode_batch([before + text for before, text in zip(befores, texts, strict=True)])
    return [ids[len(heads[before]) :] for before, ids in zip(befores, encoded, strict=True)]


def encode_with_words_within(tokenizer: Tokenizer, text: str) -> Encoded:
    """`Tokenizer.encode_with_words` of a text within a longer one."""
    before = _character_before(text)
    encoded, head = tokenizer.encode_with_words(before + text), len(tokenizer.encode(before))
    ids, words, starts, ends = (array[head:] for array in encoded)
    return Encoded(ids, words, starts - 1, ends - 1)


def writes_space_before(tokenizer: Tokenizer) -> bool:
    """True if a text encoded alone begins with a space that it does not have."""
    return tokenizer.encode("a") != encode_within(tokenizer, ["a"])[0]
