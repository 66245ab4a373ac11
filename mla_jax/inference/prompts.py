"""What generation asks of prompts, and reads off them."""

import numpy as np

from mla_jax.config import ModelConfig
from mla_jax.errors import InputError


def common_prefix(held: list[int], wanted: list[int]) -> list[int]:
    """The tokens with which both begin."""
    same = next((i for i, pair in enumerate(zip(held, wanted, strict=False)) if pair[0] != pair[1]), None)
    return held[: min(len(held), len(wanted)) if same is None else same]


def seen_tokens(prompts: list[list[int]], rows: int, vocabulary: int) -> np.ndarray:
    """Which tokens each prompt has, bool [rows, X]; rows beyond the prompts have none."""
    seen_BX = np.zeros((rows, vocabulary), bool)
    for row, prompt in enumerate(prompts):
        seen_BX[row, prompt] = True
    return seen_BX


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
        if min(prompt) < 0 or max(prompt) >= config.vocab_size:
            raise InputError(
                f"prompt {i} has token {min(prompt) if min(prompt) < 0 else max(prompt)}, outside the vocabulary of "
                f"{config.vocab_size}; was it made with this model's tokenizer?"
            )
