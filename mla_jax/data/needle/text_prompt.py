"""Prompts that are made as texts, in formats that others define, and encoded as a whole."""

from dataclasses import dataclass


@dataclass(frozen=True)
class TextPrompt:
    """A prompt, up to where the answer begins, and all that a right answer names."""

    text: str
    answers: tuple[str, ...]
