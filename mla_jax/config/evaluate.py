"""Configuration of `experiments.evaluate`: which run, and the evaluation."""

from typing import Optional

from omegaconf import MISSING

from mla_jax.config.schema import require, require_at_least, require_choice, schema


@schema
class EvalConfig:
    """Keys that every evaluation has: prompts of each length, answered by generation."""

    lengths: list[int] = MISSING
    """Prompt lengths in tokens."""
    samples: int = MISSING
    """Prompts in each cell."""
    batch_size: int = 8
    max_new_tokens: int = 10
    cache_dtype: Optional[str] = None
    """`int8` for the 8-bit cache; None for the model's compute type."""
    seed: int = 1_000_003
    """Seed of the prompts; keep it apart from the training seed, so that prompts are held out."""

    def __post_init__(self):
        require(len(self.lengths) > 0, "eval.lengths needs at least one length")
        for name in ("samples", "batch_size", "max_new_tokens"):
            require_at_least(1, **{f"eval.{name}": getattr(self, name)})
        if self.cache_dtype is not None:
            require_choice("eval.cache_dtype", self.cache_dtype, ("int8", "bfloat16", "float16", "float32"))


@schema
class PasskeyConfig(EvalConfig):
    """The passkey grid: the key at each depth of prompts of each length."""

    depths: list[float] = MISSING
    """Positions of the key in the prompt: 0 at the start, 1 at the end."""

    def __post_init__(self):
        super().__post_init__()
        require(len(self.depths) > 0, "eval.depths needs at least one depth")
        require(all(0 <= d <= 1 for d in self.depths), f"eval.depths must be in [0, 1], got {self.depths}")


@schema
class HallucinationConfig(EvalConfig):
    """Questions about keys that are in a haystack and about keys that are not."""

    questions: int = MISSING
    """Questions of each kind about one haystack; `samples` of each kind at each length make so many haystacks."""
    pairs: int = MISSING
    """Pairs of needles in a haystack, the keys of a pair one word apart."""
    haystack: str = "noise"
    """`noise` (the same five sentences) or `words` (random words)."""

    def __post_init__(self):
        super().__post_init__()
        require_at_least(1, **{"eval.questions": self.questions, "eval.pairs": self.pairs})
        require(self.questions <= self.pairs, f"eval.questions={self.questions} is more than eval.pairs={self.pairs}")
        require_choice("eval.haystack", self.haystack, ("noise", "words"))
        require(len(set(self.lengths)) == len(self.lengths), f"eval.lengths must not repeat, got {self.lengths}")


@schema
class EvaluateConfig:
    """Configuration of `python -m experiments.evaluate run=RUN_DIR`."""

    run: str = MISSING
    step: str = "latest"
    """Which checkpoint: `latest`, `best` by the run's `train.best_metric`, or a step."""
    eval: EvalConfig = MISSING
    """Its type chooses the task."""

    def __post_init__(self):
        require(
            self.step in ("latest", "best") or self.step.isdigit(),
            f"step must be latest, best or a number, got {self.step!r}",
        )
