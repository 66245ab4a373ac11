"""Prompts of a task put to a model: in batches, haystack by haystack, or as texts whose likelihood is asked for."""

import itertools
from collections.abc import Iterator
from dataclasses import dataclass, field

from mla_jax.data.tokenizer import Tokenizer
from mla_jax.evals.answers import Answer
from mla_jax.evals.task import Params, Prompt, Task
from mla_jax.inference.generator import PREFILL_CHUNK, Generator
from mla_jax.inference.score import score
from mla_jax.inference.session import Session
from mla_jax.inference.shared_prefix import generate_sharing_prefix

LONG = 8 * PREFILL_CHUNK
"""Tokens of a prompt above which it pays to read only what it does not share with the one before it."""

Place = tuple[int, int]
"""Numbers of a cell and of a sample in it."""


@dataclass(frozen=True)
class Outcome:
    """The answer to a prompt."""

    prompt: Prompt
    scores: dict[str, float]
    answer: Answer | None = None
    """None where nothing was generated."""
    measures: dict[str, float] = field(default_factory=dict)


def ask(task: Task, cells: list[Params], generator: Generator, tokenizer: Tokenizer) -> Iterator[dict[Place, Outcome]]:
    """Puts all prompts of some cells to a model.

    Args:
        task: prompts and scoring.
        cells: of one length, whose answers may be equally long.
        generator: the model.
        tokenizer: the model's.

    Yields:
        The outcomes of a few prompts at a time, by the numbers of their cells and samples.
    """
    if task.likelihood is not None:
        yield from _read_texts(task, cells, generator)
        return
    answered = _by_haystack if task.haystack is not None else _in_batches
    for places, prompts, new in answered(task, cells, generator, tokenizer.eos_id):
        texts = map(tokenizer.decode, new)
        yield {  # what fills up a batch is there twice, and merges
            place: _outcome(task, prompt, text) for place, prompt, text in zip(places, prompts, texts, strict=True)
        }


def _outcome(task: Task, prompt: Prompt, text: str) -> Outcome:
    assert task.score is not None
    return Outcome(prompt, task.score(prompt, text), Answer.of(prompt, text))


def _places(task: Task, cells: list[Params]) -> list[Place]:
    return list(itertools.product(range(len(cells)), range(task.samples)))


def _in_batches(
    task: Task, cells: list[Params], generator: Generator, eos_id: int | None
) -> Iterator[tuple[list[Place], list[Prompt], list[list[int]]]]:
    """Prompts in batches of one size, so that one shape is compiled, and the new tokens of each.

    The last batch is filled up by repeating its last prompt. Of long prompts, what one begins with as the one before it
    in its row did is not read again. Those that differ from the needle on, as in repeated noise, share the more the
    deeper it is; so the deepest come first.
    """
    places = _places(task, cells)
    long = cells[0]["length"] > LONG  # else many lengths that are left, shorter than a chunk, would be compiled
    if long:
        places.sort(key=lambda place: -cells[place[0]].get("depth", 0))
    batches = -(-len(places) // task.batch_size)
    size = -(-len(places) // batches)  # evenly filled: little is computed twice
    session = Session.empty(size)
    for start in range(0, len(places), size):
        batch = places[start : start + size]
        batch += batch[-1:] * (size - len(batch))
        prompts = [task.prompt(cells[cell], sample) for cell, sample in batch]
        new = generator.generate(
            [prompt.ids for prompt in prompts],
            max_new_tokens=task.max_new_tokens(cells[0]), eos_id=eos_id, session=session if long else None,
        )  # fmt: skip
        yield batch, prompts, new


def _by_haystack(
    task: Task, cells: list[Params], generator: Generator, eos_id: int | None
) -> Iterator[tuple[list[Place], list[Prompt], list[list[int]]]]:
    """Prompts haystack by haystack: what those of one begin with is read once, and copied for each question."""
    assert task.haystack is not None
    groups: dict[int, list[Place]] = {}
    for cell, sample in _places(task, cells):
        groups.setdefault(task.haystack(cells[cell], sample), []).append((cell, sample))
    for group in groups.values():
        prompts = [task.prompt(cells[cell], sample) for cell, sample in group]
        new = generate_sharing_prefix(
            generator, [prompt.ids for prompt in prompts],
            max_new_tokens=task.max_new_tokens(cells[0]), eos_id=eos_id, batch_size=task.batch_size,
        )  # fmt: skip
        yield group, prompts, new


def _read_texts(task: Task, cells: list[Params], generator: Generator) -> Iterator[dict[Place, Outcome]]:
    """Texts in batches, each for all cells; they are as long as each other."""
    assert task.likelihood is not None
    for start in range(0, task.samples, task.batch_size):
        batch = range(start, min(start + task.batch_size, task.samples))
        prompts = [task.prompt(cells[0], sample) for sample in batch]
        scored = score(generator, [prompt.ids[:1] for prompt in prompts], [prompt.ids[1:] for prompt in prompts])
        found: dict[Place, Outcome] = {}
        for sample, prompt, each in zip(batch, prompts, scored, strict=True):
            for cell, params in enumerate(cells):
                scores, measures = task.likelihood(params, each)
                found[cell, sample] = Outcome(prompt, scores, measures=measures)
        yield found
