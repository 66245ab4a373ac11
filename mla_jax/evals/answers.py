"""What a model answered to the prompts of an evaluation, as it is kept in the results."""

import dataclasses
from dataclasses import dataclass
from typing import Any

from mla_jax.evals.task import Params, Prompt


@dataclass(frozen=True)
class Answer:
    """An answer and what it is to be compared with; a judge of answers needs no haystack."""

    question: str
    """Without the haystack; "" where the task does not tell."""
    expected: str
    near: tuple[str, ...]
    """Answers to questions that this one is easily mistaken for."""
    generated: str

    @classmethod
    def of(cls, prompt: Prompt, generated: str) -> "Answer":
        """The answer to a prompt."""
        return cls(prompt.question, prompt.answer, prompt.near, generated)

    def to_json(self) -> dict[str, Any]:
        """The fields."""
        return {**dataclasses.asdict(self), "near": list(self.near)}

    @classmethod
    def from_json(cls, content: dict[str, Any]) -> "Answer":
        """The answer of `to_json`. Raises AttributeError, KeyError or TypeError for anything else."""
        texts = {key: content[key] for key in ("question", "expected", "generated")}
        near = tuple(content["near"])
        if content.keys() != {*texts, "near"} or not all(isinstance(text, str) for text in (*texts.values(), *near)):
            raise TypeError(f"an answer of {content}")
        return cls(**texts, near=near)


@dataclass(frozen=True)
class Failure:
    """A wrong answer."""

    params: Params
    """Parameters of its cell."""
    seed: int
    index: int
    """Seed and index of the random generator from which the task makes the prompt again."""
    expected: str
    generated: str

    def to_json(self) -> dict[str, Any]:
        """The fields, those of params among them."""
        fields = dataclasses.asdict(self)
        return {**fields.pop("params"), **fields}

    @classmethod
    def from_json(cls, content: dict[str, Any]) -> "Failure":
        """The failure of `to_json`. Raises KeyError or TypeError for anything else."""
        own = {key: content[key] for key in ("seed", "index", "expected", "generated")}
        return cls({key: value for key, value in content.items() if key not in own}, **own)
