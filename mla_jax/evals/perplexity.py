"""Perplexity by position on the user's texts: whether what stands far behind helps to predict what follows, or hurts.

A model that uses its context predicts the later parts of a text better than the first; one whose positions go further
than it was trained for predicts them worse. Nothing is generated: the likelihood of the texts is computed in one pass.
"""

import dataclasses

import numpy as np

from mla_jax.config import ModelConfig, PerplexityConfig
from mla_jax.data.needle.haystack import TextHaystack
from mla_jax.data.text_folder import fingerprint
from mla_jax.data.tokenizer import Tokenizer
from mla_jax.errors import UsageError
from mla_jax.evals.cells import CORRECT, NATS
from mla_jax.evals.task import Params, Prompt, Task, require_room
from mla_jax.inference.score import Score

NAME = "perplexity"
TITLE = "Perplexity by position"
DESCRIPTION = "the user's texts, part by part of what the model reads at once; correct is the most likely next token"


def perplexity_task(model: ModelConfig, tokenizer: Tokenizer, config: PerplexityConfig) -> Task:
    """Windows of the texts at each length, which do not overlap, in parts of equal size.

    Of each part `correct` is the share of tokens that greedy decoding would write, and the measure `nats_per_token` the
    mean negative log-likelihood, whose exponential is the perplexity. A cell's `position` is the end of its part: 1 is
    that of the window.

    Args:
        model: the model to evaluate.
        tokenizer: the model's.
        config: texts, lengths, windows and parts.

    Raises:
        InputError: a length that does not fit the model, or a text folder that cannot be read.
        UsageError: texts that are too short for the windows, or windows for the parts.
    """
    require_room(model, config.lengths, 0)
    bos = [] if tokenizer.bos_id is None else [tokenizer.bos_id]
    if min(config.lengths) <= config.parts:
        raise UsageError(f"eval.lengths has {min(config.lengths)}, too few tokens for eval.parts={config.parts}")
    text, longest = TextHaystack(tokenizer, config.text_folder), max(config.lengths) - len(bos)
    if text.tokens < config.samples * longest:
        raise UsageError(
            f"eval.text_folder={config.text_folder} has {text.tokens} tokens with tokenizer {tokenizer.source}, but "
            f"eval.samples={config.samples} windows of {longest} take {config.samples * longest}; add texts, or take "
            "fewer or shorter windows"
        )

    def prompt(cell: Params, sample: int) -> Prompt:
        start = sample * text.tokens // config.samples
        return Prompt([*bos, *text.window(start, cell["length"] - len(bos)).tolist()], "", 0, sample)

    def likelihood(cell: Params, score: Score) -> tuple[dict[str, float], dict[str, float]]:
        part = round(cell["position"] * config.parts) - 1
        nats, greedy = (np.array_split(each, config.parts)[part] for each in (-score.log_probs, score.greedy))
        return {CORRECT: float(greedy.mean())}, {NATS: float(nats.mean(dtype=np.float64))}

    return Task(
        name=NAME,
        title=TITLE,
        description=DESCRIPTION,
        config=dataclasses.asdict(config) | {"text_fingerprint": fingerprint(config.text_folder)},
        cells=tuple(
            {"length": length, "position": (part + 1) / config.parts}
            for length in config.lengths
            for part in range(config.parts)
        ),
        samples=config.samples,
        prompt=prompt,
        score=None,
        max_new_tokens=lambda _: 0,
        batch_size=config.batch_size,
        cache_dtype=config.cache_dtype,
        haystack=lambda _, sample: sample,
        likelihood=likelihood,
    )
