"""Answers to be judged: the results of an evaluation (RUN/eval/TASK.json), or a file of records of anybody's.

A record, in JSONL (also compressed) or Parquet:

    {"question": "Where is it?", "gold": "under the stairs", "distractors": ["in the attic"], "prediction": "The attic"}

`gold` may be called `answer`; null, or "not found", if the question has no answer in the document. Optional are
`distractors`, `haystack` (text or number: lines of the same haystack are not independent) and `length` (tokens).
"""

import re
import string
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mla_jax.data.needle.questions import REFUSAL
from mla_jax.data.record_files import read_chunks
from mla_jax.errors import InputError
from mla_jax.evals.cells import CORRECT as CORRECT_SCORE
from mla_jax.evals.cells import Cell
from mla_jax.evals.judge.verdicts import CORRECT, CORRECT_REFUSAL
from mla_jax.evals.results import read_results

RESULTS_SUFFIX = ".json"
_KEYS = {"question", "gold", "answer", "distractors", "prediction", "haystack", "length"}


@dataclass(frozen=True)
class Item:
    """An answer to a question, and what it is compared with."""

    question: str
    gold: str
    """The right answer; REFUSAL if there is none in the document."""
    distractors: tuple[str, ...]
    answer: str
    haystack: str
    """Those of one haystack may depend on each other."""
    exact: bool
    """Whether exact match calls the answer right."""
    length: int | None = None
    """Tokens of the prompt."""

    @property
    def has_answer(self) -> bool:
        """Whether the document has the answer."""
        return self.gold != REFUSAL

    @property
    def right(self) -> str:
        """The class of a right answer to this question."""
        return CORRECT if self.has_answer else CORRECT_REFUSAL


def read_items(path: Path) -> list[Item]:
    """The answers in a file of results, whose name ends with .json, or else in the records of a JSONL file.

    Raises:
        InputError: it cannot be read, holds no answers, or a line is not as the head of this module says.
    """
    if path.suffix == RESULTS_SUFFIX:
        items = [item for cell in read_results(path).cells for item in _of_cell(cell)]
    else:
        items = _of_records(path)
    if not items:
        raise InputError(f"{path} has no answers to judge; files of before version 3 have none: evaluate the run again")
    return items


def _of_cell(cell: Cell) -> list[Item]:
    own = [f"{sorted(cell.params.items())}/{i}" for i in range(cell.n)]
    shared = [f"{cell.length}/{haystack}" for haystack in cell.haystacks.get(CORRECT_SCORE, ())]
    return [
        Item(kept.question, kept.expected, kept.near, kept.generated.strip(), haystack, score == 1, cell.length)
        for kept, score, haystack in zip(cell.answers, cell.scores[CORRECT_SCORE], shared or own, strict=False)
    ]


def _of_records(path: Path) -> list[Item]:
    items = []
    for chunk in read_chunks([path]):
        for place, content in chunk.parsed():
            try:
                if isinstance(content, InputError):
                    raise content
                items.append(_of_record(content, place))
            except (InputError, ValueError) as e:
                raise InputError(f"{path}, {place}: {e}") from e
    return items


def _of_record(content: Any, own: str) -> Item:
    """Raises ValueError for what is no answer."""
    if not isinstance(content, dict):
        raise ValueError("expected a JSON object")
    unknown = content.keys() - _KEYS
    if unknown:
        raise ValueError(f"unknown key {min(unknown)!r}; known are {', '.join(sorted(_KEYS))}")
    if ("gold" in content) == ("answer" in content):
        raise ValueError("expected the right answer as either gold or answer")
    gold = content["gold"] if "gold" in content else content["answer"]
    gold = _text("gold", REFUSAL if gold is None else gold)
    question, answer = (_text(key, content.get(key)) for key in ("question", "prediction"))
    distractors = content.get("distractors", [])
    if not isinstance(distractors, list) or not all(isinstance(text, str) for text in distractors):
        raise ValueError(f"distractors must be a list of texts, got {distractors!r}")
    length = content.get("length")
    if length is not None and not (isinstance(length, int) and length > 0):
        raise ValueError(f"length must be a number of tokens, got {length!r}")
    haystack = content.get("haystack")
    shared = own if haystack is None else f"{length}/{haystack}"
    gold = REFUSAL if normalized(gold) == REFUSAL else gold.strip()
    exact = normalized(answer) == normalized(gold)
    return Item(question, gold, tuple(distractors), answer.strip(), shared, exact, length)


def _text(name: str, text: Any) -> str:
    if not isinstance(text, str):
        raise ValueError(f"{name} must be text, got {text!r}")
    return text


def normalized(text: str) -> str:
    """The text as SQuAD's exact match compares it (arXiv 1606.05250): no case, punctuation, articles, extra spaces."""
    text = "".join(character for character in text.lower() if character not in string.punctuation)
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", text).split())
