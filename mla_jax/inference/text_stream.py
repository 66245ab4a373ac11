"""Incremental detokenisation: text of a token stream, in whole characters and only up to a stop string."""

from collections.abc import Sequence

from mla_jax.data.tokenizer import Tokenizer
from mla_jax.errors import InputError

_INCOMPLETE = "\ufffd"
"""The replacement character, to which an incomplete UTF-8 sequence decodes."""


class TextStream:
    """Decodes one continuation piece by piece.

    Args:
        tokenizer: of the model.
        stop: texts that end the continuation; they are not part of it.

    Raises:
        InputError: an empty stop string.
    """

    def __init__(self, tokenizer: Tokenizer, stop: Sequence[str] = ()):
        if "" in stop:
            raise InputError("a stop string must not be empty")
        self._tokenizer, self._stop = tokenizer, tuple(stop)
        self._ids: list[int] = []
        self._given = 0
        self.text = ""
        """The whole text so far."""
        self.stopped = False
        """True after a stop string."""

    def add(self, ids: Sequence[int]) -> str:
        """The text that these tokens add, without an end that may become another character or a stop string."""
        if self.stopped:
            return ""
        self._ids += ids
        self.text = self._tokenizer.decode(self._ids)
        ends = [place for place in map(self.text.find, self._stop) if place >= 0]
        if ends:
            self.text, self.stopped = self.text[: min(ends)], True
            return self._give(len(self.text))
        whole = len(self.text.rstrip(_INCOMPLETE))
        return self._give(whole - max((_overlap(self.text[:whole], stop) for stop in self._stop), default=0))

    def finish(self) -> str:
        """The text that `add` has held back, when no more tokens come."""
        return self._give(len(self.text))

    def _give(self, end: int) -> str:
        new, self._given = self.text[self._given : end], max(end, self._given)
        return new


def special_stops(tokenizer: Tokenizer, stops: Sequence[str]) -> list[int]:
    """Ids of the stop strings that are special tokens, which are in no decoded text.

    Raises:
        InputError: a stop string that holds a special token and something else.
    """
    found = []
    for stop in stops:
        ids = tokenizer.encode(stop)
        if any(i in tokenizer.added_ids for i in ids):
            if len(ids) > 1:
                raise InputError(f"stop string {stop!r} holds a special token and more; give the special token alone")
            found += ids
    return found


def _overlap(text: str, stop: str) -> int:
    """Number of characters at the end of the text that could be the start of the stop string."""
    return next(n for n in range(min(len(stop), len(text)), -1, -1) if text.endswith(stop[:n]))
