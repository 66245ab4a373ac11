"""What evaluations ask of a tokenizer: that it can write their prompts."""

import unicodedata

from mla_jax.data.needle import vocabulary as v
from mla_jax.data.tokenizer import Tokenizer
from mla_jax.errors import UsageError


def require_writable(tokenizer: Tokenizer, text: str, key: str) -> None:
    """Raises UsageError, naming a config key, if ids of the tokenizer cannot stand for a text.

    White space, case and compatibility forms of characters, which some tokenizers change, do not count.
    """
    if _plain(tokenizer.decode(tokenizer.encode(text))) == _plain(text):
        return
    lost = next((word for word in text.split() if _plain(tokenizer.decode(tokenizer.encode(word))) != _plain(word)), "")
    raise UsageError(
        f"{key}: tokenizer {tokenizer.source} cannot write its prompts"
        + (f" (not {lost!r}, for instance)" if lost else "")
        + "; evaluate a model whose tokenizer knows every character, such as needle-bpe"
    )


def require_needles_writable(tokenizer: Tokenizer, task: str) -> None:
    """Raises UsageError, naming the evaluation, if a tokenizer cannot write the needles that training teaches too."""
    require_writable(tokenizer, " ".join([*v.PIECES, *map(str, range(10))]), f"eval={task}")


def _plain(text: str) -> str:
    return "".join(unicodedata.normalize("NFKC", text).lower().split())
