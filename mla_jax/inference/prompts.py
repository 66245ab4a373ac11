"""Checks of the token ids that inference is asked to read."""

from mla_jax.config import ModelConfig
from mla_jax.errors import InputError


def check_prompts(config: ModelConfig, prompts: list[list[int]], max_new_tokens: int) -> None:
    """Raises InputError for a prompt that is empty, too long for the model, or not of its vocabulary."""
    if max_new_tokens < 1:
        raise InputError(f"max_new_tokens must be at least 1, got {max_new_tokens}")
    limit = config.max_position_embeddings
    for i, prompt in enumerate(prompts):
        if len(prompt) == 0:
            raise InputError(f"prompt {i} is empty; it needs at least one token")
        if len(prompt) + max_new_tokens > limit:
            raise InputError(
                f"prompt {i} of {len(prompt)} tokens and {max_new_tokens} new ones exceed the model's "
                f"max_position_embeddings {limit}; shorten the prompt or generate fewer"
            )
        _check_vocabulary(config, f"prompt {i}", prompt)


def check_continuations(config: ModelConfig, contexts: list[list[int]], continuations: list[list[int]]) -> None:
    """Raises InputError for contexts or continuations that are empty, too long, or not of the model's vocabulary."""
    if len(contexts) != len(continuations):
        raise InputError(f"{len(contexts)} contexts do not go with {len(continuations)} continuations")
    limit = config.max_position_embeddings
    for i, (context, continuation) in enumerate(zip(contexts, continuations, strict=True)):
        if len(context) == 0:
            raise InputError(
                f"context {i} is empty, but nothing predicts the first token of a text; start with bos, for instance"
            )
        if len(continuation) == 0:
            raise InputError(f"continuation {i} is empty; it needs at least one token")
        if len(context) + len(continuation) - 1 > limit:  # the last token is predicted, but never read
            raise InputError(
                f"context {i} of {len(context)} tokens and its continuation of {len(continuation)} exceed the model's "
                f"max_position_embeddings {limit} by more than the last token, which is not read; shorten one of them"
            )
        _check_vocabulary(config, f"context {i}", context)
        _check_vocabulary(config, f"continuation {i}", continuation)


def _check_vocabulary(config: ModelConfig, name: str, tokens: list[int]) -> None:
    if min(tokens) < 0 or max(tokens) >= config.vocab_size:
        raise InputError(
            f"{name} has token {min(tokens) if min(tokens) < 0 else max(tokens)}, outside the vocabulary of "
            f"{config.vocab_size}; was it made with this model's tokenizer?"
        )
