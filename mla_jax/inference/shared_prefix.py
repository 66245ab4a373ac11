"""Generation for prompts that begin alike, many questions about one long text: the common part is read once."""

from collections.abc import Sequence

import numpy as np

from mla_jax import mesh
from mla_jax.inference.generator import Generator
from mla_jax.inference.sampling import SamplingParams
from mla_jax.inference.session import Session


def generate_sharing_prefix(
    generator: Generator, prompts: Sequence[Sequence[int]], *, max_new_tokens: int,
    eos_id: int | Sequence[int] | None = None, sampling: SamplingParams | None = None, batch_size: int = 16,
) -> list[list[int]]:  # fmt: skip
    """Continues prompts of which the common prefix is read once, in copies of its cache.

    On a mesh of several devices, which cannot copy caches, every prompt is read whole.

    Args:
        generator: the model.
        prompts: token ids; they may be equal, and may have nothing in common.
        max_new_tokens: see `Generator.generate`.
        eos_id: see `Generator.generate`.
        sampling: see `Generator.generate`.
        batch_size: prompts continued at one time; fewer where the copies do not fit in memory.

    Returns:
        The new tokens of each prompt, as `Generator.generate` gives them.

    Raises:
        InputError: see `Generator.generate`.
    """
    options = {"max_new_tokens": max_new_tokens, "eos_id": eos_id, "sampling": sampling}
    shared = common_prefix(prompts)
    if mesh.size() > 1 or len(prompts) < 2 or shared == 0:
        starts = range(0, len(prompts), batch_size)
        return [row for i in starts for row in generator.generate(prompts[i : i + batch_size], **options)]
    session, capacity = Session.empty(1), max(map(len, prompts)) + max_new_tokens
    prefix = list(prompts[0][: min(shared, min(map(len, prompts)) - 1)])
    generator.read(session, [prefix], capacity=capacity)
    wanted = min(batch_size, len(prompts))
    rows = generator.most_copies(session, wanted) if wanted > 1 else 1
    new: list[list[int]] = []
    while len(new) < len(prompts):
        group = prompts[len(new) : len(new) + max(rows, 1)]
        # One at a time needs no copy: `generate` drops what was appended for the prompt before.
        new += generator.generate(
            group, session=generator.fork(session, len(group)) if rows > 1 else session, **options
        )
    return new


def common_prefix(prompts: Sequence[Sequence[int]]) -> int:
    """Number of tokens with which all prompts begin; 0 of none."""
    if not prompts:
        return 0
    shortest = min(map(len, prompts))
    first = np.asarray(prompts[0][:shortest])
    same = np.ones(shortest, bool)
    for prompt in prompts[1:]:
        same &= first == np.asarray(prompt[:shortest])
    return shortest if same.all() else int(np.argmin(same))
