"""The passkey prompts of InfiniteBench (arXiv 2402.13718; github.com/OpenBMB/InfiniteBench), word for word.

They are those of landmark attention on lines, with a key of five digits that may begin with 0. What is around the
context is the template of its base model, YaRN-Mistral.
"""

import numpy as np

from mla_jax.data.needle import vocabulary as v
from mla_jax.data.needle.text_prompt import TextPrompt

_PROMPT = (
    "There is an important info hidden inside a lot of irrelevant text. Find it and memorize it. "
    "I will quiz you about the important information.\n\n{context}\n\nWhat is the pass key?\n\nThe pass key is"
)


def infinitebench_passkey(rng: np.random.Generator, size: int, depth: float) -> TextPrompt:
    """A prompt of `size` lines of noise; the key is behind a share `depth` of them, 0 to 1."""
    key = "".join(str(digit) for digit in rng.integers(10, size=5))
    noise, before = "".join(v.NOISE) + "\n", round(depth * size)
    needle = f"The pass key is {key}. Remember it. {key} is the pass key.\n"
    return TextPrompt(_PROMPT.format(context=noise * before + needle + noise * (size - before)), (key,))
