"""Configuration of `experiments.evaluate`: which run, and the evaluation."""

from typing import Optional

from omegaconf import MISSING

from mla_jax.config.schema import require, require_at_least, require_choice, schema
from mla_jax.errors import UsageError

CACHE_DTYPES = ("int8", "bfloat16", "float16", "float32")


@schema
class EvalConfig:
    """Keys that every evaluation has."""

    lengths: list[int] = MISSING
    """Prompt lengths in tokens."""
    samples: int = MISSING
    """Prompts in each cell."""
    batch_size: int = 8
    cache_dtype: Optional[str] = None
    """`int8` for the 8-bit cache; None for the model's compute type."""
    seed: int = 1_000_003
    """Seed of the prompts; keep it apart from the training seed, so that prompts are held out."""

    def __post_init__(self):
        require(len(self.lengths) > 0, "eval.lengths needs at least one length")
        require(len(set(self.lengths)) == len(self.lengths), f"eval.lengths must not repeat, got {self.lengths}")
        require_at_least(1, **{"eval.samples": self.samples, "eval.batch_size": self.batch_size})
        if self.cache_dtype is not None:
            require_choice("eval.cache_dtype", self.cache_dtype, CACHE_DTYPES)


@schema
class AnswerConfig(EvalConfig):
    """Keys of evaluations in which all answers have the same limit."""

    max_new_tokens: int = 10

    def __post_init__(self):
        super().__post_init__()
        require_at_least(1, **{"eval.max_new_tokens": self.max_new_tokens})


@schema
class DepthConfig(AnswerConfig):
    """Keys of evaluations with a needle at each depth of prompts of each length."""

    depths: list[float] = MISSING
    """Positions of the needle in the prompt: 0 at the start, 1 at the end."""

    def __post_init__(self):
        super().__post_init__()
        require(len(self.depths) > 0, "eval.depths needs at least one depth")
        require(len(set(self.depths)) == len(self.depths), f"eval.depths must not repeat, got {self.depths}")
        require(all(0 <= d <= 1 for d in self.depths), f"eval.depths must be in [0, 1], got {self.depths}")


@schema
class PasskeyConfig(DepthConfig):
    """The passkey grid: the key at each depth of prompts of each length."""

    format: str = "landmark"
    """`landmark` (prompts of exactly each length) or `infinitebench` (whole lines up to it)."""

    def __post_init__(self):
        super().__post_init__()
        require_choice("eval.format", self.format, ("landmark", "infinitebench"))


@schema
class NiahConfig(DepthConfig):
    """A needle in the user's texts; `{key}` and `{number}` stand for what is drawn for each prompt."""

    text_folder: str = MISSING
    """Folder of .txt and .md files."""
    needle: str = "One of the special magic numbers for {key} is: {number}."
    question: str = "The special magic number for {key} is:"
    """The last line of the prompt, up to where the answer begins."""
    answer: str = "{number}"

    def __post_init__(self):
        super().__post_init__()
        for name in ("needle", "question", "answer"):
            text = getattr(self, name)
            try:
                text.format(key="", number="")
            except (KeyError, IndexError, ValueError) as e:
                raise UsageError(
                    f"eval.{name}={text!r} may have {{key}} and {{number}} in braces, and nothing else"
                ) from e
        require(bool(self.answer), "eval.answer must not be empty")


@schema
class HallucinationConfig(AnswerConfig):
    """Questions about keys that are in a haystack and about keys that are not."""

    questions: int = MISSING
    """Questions of each kind about one haystack; `samples` of each kind at each length make so many haystacks."""
    needles: int = MISSING
    """Needles in a haystack; their keys come in pairs one word apart, of an odd number one is alone."""
    haystack: str = "noise"
    """`noise` (the same five sentences) or `words` (random words)."""

    def __post_init__(self):
        super().__post_init__()
        require_at_least(1, **{"eval.questions": self.questions, "eval.needles": self.needles})
        require(
            self.questions <= self.needles, f"eval.questions={self.questions} is more than eval.needles={self.needles}"
        )
        require_choice("eval.haystack", self.haystack, ("noise", "words"))


@schema
class MultikeyConfig(AnswerConfig):
    """Questions about some of many keys, each one word apart from another."""

    keys: list[int] = MISSING
    """Keys in a haystack: even numbers, half of them one word apart from one of the other half."""
    questions: int = MISSING
    """Questions about one haystack; `samples` of each cell make so many haystacks."""
    haystack: str = "noise"
    """`noise` (the same five sentences) or `words` (random words)."""

    def __post_init__(self):
        super().__post_init__()
        require(len(self.keys) > 0, "eval.keys needs at least one number")
        require(len(set(self.keys)) == len(self.keys), f"eval.keys must not repeat, got {self.keys}")
        require(all(n > 0 and n % 2 == 0 for n in self.keys), f"eval.keys must be even and positive, got {self.keys}")
        require_at_least(1, **{"eval.questions": self.questions})
        require(
            self.questions <= min(self.keys), f"eval.questions={self.questions} is more than eval.keys={min(self.keys)}"
        )
        require_choice("eval.haystack", self.haystack, ("noise", "words"))


@schema
class HashHopConfig(EvalConfig):
    """Chains of random hashes to be followed over some hops."""

    hops: list[int] = MISSING
    """Lines from the hash that is asked about to the one that is the answer."""
    questions: int = MISSING
    """Questions about one set of chains; `samples` of each cell make so many sets."""
    hash_length: int = 16
    """Letters of a hash."""
    chain_of_thought: bool = False
    """Ask for all hashes of the chain instead of the last."""

    def __post_init__(self):
        super().__post_init__()
        require(len(self.hops) > 0, "eval.hops needs at least one number")
        require(len(set(self.hops)) == len(self.hops), f"eval.hops must not repeat, got {self.hops}")
        require(all(1 <= n <= 255 for n in self.hops), f"eval.hops must be in [1, 255], got {self.hops}")
        require_at_least(1, **{"eval.questions": self.questions})
        require_at_least(4, **{"eval.hash_length": self.hash_length})


@schema
class PerplexityConfig(EvalConfig):
    """The likelihood of the user's texts; `samples` are windows of each length, and the seed has no meaning."""

    text_folder: str = MISSING
    """Folder of .txt and .md files."""
    parts: int = MISSING
    """Parts of a window, the rows of the grid."""

    def __post_init__(self):
        super().__post_init__()
        require_at_least(1, **{"eval.parts": self.parts})
        require_at_least(2, **{"eval.samples": self.samples})  # one window tells nothing about another


RULER_WITH_TEXT = ("niah_single_2", "niah_single_3", "niah_multikey_1", "niah_multivalue", "niah_multiquery")
"""The tasks of RULER whose haystack is a text."""
RULER_TASKS = ("niah_single_1", "niah_multikey_2", "niah_multikey_3", *RULER_WITH_TEXT, "vt", "cwe", "fwe")


@schema
class RulerConfig(EvalConfig):
    """The synthetic tasks of RULER; `lengths` are those of prompt and answer together, as RULER counts."""

    tasks: list[str] = MISSING
    """Names of RULER_TASKS."""
    text_folder: Optional[str] = None
    """Folder of .txt and .md files, the haystack of RULER_WITH_TEXT."""

    def __post_init__(self):
        super().__post_init__()
        require(len(self.tasks) > 0, f"eval.tasks needs at least one of {', '.join(RULER_TASKS)}")
        require(len(set(self.tasks)) == len(self.tasks), f"eval.tasks must not repeat, got {self.tasks}")
        for task in self.tasks:
            require_choice("eval.tasks", task, RULER_TASKS)
            require(
                self.text_folder is not None or task not in RULER_WITH_TEXT,
                f"eval.tasks has {task}, whose haystack is a text: set eval.text_folder=FOLDER of .txt or .md files",
            )


@schema
class EvaluateConfig:
    """Configuration of `python -m experiments.evaluate run=FOLDER`."""

    run: str = MISSING
    """Folder of a run, or of a dense DeepSeek-V2 or -V3 in Hugging Face format."""
    step: str = "latest"
    """Which checkpoint of a run: `latest`, `best` by its `train.best_metric`, or a step."""
    out: Optional[str] = None
    """Folder of the results; None for `eval` in that of the run, where other tools look for them."""
    eval: EvalConfig = MISSING
    """Its type chooses the task."""

    def __post_init__(self):
        require(
            self.step in ("latest", "best") or self.step.isdigit(),
            f"step must be latest, best or a number, got {self.step!r}",
        )
