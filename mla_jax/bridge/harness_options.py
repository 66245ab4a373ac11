"""The `generation_kwargs` of lm-evaluation-harness' tasks, as our generation takes them."""

import dataclasses
from typing import Any

from lm_eval.models.utils import handle_stop_sequences, normalize_gen_kwargs

from mla_jax.errors import InputError
from mla_jax.inference.sampling import SamplingParams

_MAX_NEW_TOKENS = 256
"""Of tasks that do not say how many; as the harness' `hf`."""
_OF_SAMPLES = ("temperature", "top_k", "top_p", "min_p")
"""What `hf` ignores, too, where a task does not sample."""


@dataclasses.dataclass(frozen=True)
class GenerationOptions:
    """A task's `generation_kwargs`."""

    max_new_tokens: int
    stops: tuple[str, ...]
    sampling: SamplingParams

    @classmethod
    def of(cls, generation_kwargs: dict[str, Any]) -> "GenerationOptions":
        """Raises InputError for what our generation does not have."""
        given: dict[str, Any] = {**normalize_gen_kwargs(generation_kwargs, _MAX_NEW_TOKENS)}
        stops, max_new_tokens = handle_stop_sequences(given.pop("until"), eos=None), given.pop("max_gen_toks")
        samples = given.pop("do_sample")
        if unknown := given.keys() - {*_OF_SAMPLES, "repetition_penalty"}:
            raise InputError(f"generation_kwargs has {', '.join(sorted(unknown))}, which the model mla_jax does not")
        if samples and not given.get("temperature"):
            raise InputError("generation_kwargs has do_sample=True, which needs a temperature above 0")
        sampling = {name: value for name, value in given.items() if samples or name not in _OF_SAMPLES}
        return cls(max_new_tokens, tuple(filter(None, stops)), SamplingParams(**sampling))
