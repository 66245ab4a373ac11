"""Training data sets."""

from dataclasses import field
from typing import ClassVar, Optional

from omegaconf import MISSING

from mla_jax.config.schema import require, require_at_least, require_choice, schema


@schema
class DataConfig:
    """Keys that every data set has. `seq_len` and batch size belong to the training stages."""

    tokenizer: str = MISSING
    """`bytes`, `needle-bpe` (built in, see `mla_jax.data.tokenizer`), or the path of a tokenizer.json / HF folder."""
    workers: int = 0
    """Processes that make batches; 0 makes them in a thread of the training process."""
    cache_dir: Optional[str] = None
    """Folder of encoded files for all runs; by default infinitecontext/tokens in $XDG_CACHE_HOME or ~/.cache."""

    def __post_init__(self):
        require_at_least(0, **{"data.workers": self.workers})


def require_weights(group: str, weights: dict[str, float], known: tuple[str, ...]) -> None:
    """Raises UsageError unless `weights` of data.`group` are weights of some of the `known` names."""
    for name in weights:
        require_choice(f"data.{group} key", name, known)
    require(
        min(weights.values(), default=0) >= 0 and sum(weights.values()) > 0,
        f"data.{group} needs non-negative weights with a positive sum, got {weights}",
    )


NEEDLE_TASKS = ("passkey", "single", "multi_key", "multi_value", "multi_query", "variable_tracking", "absent_key")
TEXT_TASKS = ("hashhop", "ruler_vt")
"""Tasks of training that have the formats of evaluations; see `mla_jax.data.needle.text_tasks`."""


@schema
class NeedleMixtureConfig(DataConfig):
    """Synthetic needles in haystacks; weights are relative and need not sum to one."""

    known_tasks: ClassVar[tuple[str, ...]] = NEEDLE_TASKS

    tasks: dict[str, float] = MISSING
    """Weight of each task: passkey, single, multi_key, multi_value, multi_query, variable_tracking, absent_key; of
    data=needle also hashhop and ruler_vt."""
    haystacks: dict[str, float] = MISSING
    """Weight of each haystack: noise (repeated sentences), words (random words), needles (only needles), text."""
    text_folder: Optional[str] = None
    """Folder of .txt / .md files for the `text` haystack."""
    max_needles: int = 64
    """Most needles in one sequence; as many as fit are drawn log-uniformly from 1 to this."""
    near_duplicate_fraction: float = 0.5
    """Share of multi_key sequences whose keys differ from another key by one word only."""

    def __post_init__(self):
        super().__post_init__()
        require_weights("tasks", self.tasks, self.known_tasks)
        require_weights("haystacks", self.haystacks, ("noise", "words", "needles", "text"))
        require(
            not self.haystacks.get("text") or self.text_folder is not None,
            "data.haystacks.text needs data.text_folder=FOLDER",
        )
        require_at_least(1, **{"data.max_needles": self.max_needles})
        require(
            0 <= self.near_duplicate_fraction <= 1,
            f"data.near_duplicate_fraction must be in [0, 1], got {self.near_duplicate_fraction}",
        )


@schema
class NeedleDataConfig(NeedleMixtureConfig):
    """Sequences of needles, then questions with their answers."""

    known_tasks: ClassVar[tuple[str, ...]] = (*NEEDLE_TASKS, *TEXT_TASKS)

    kind: str = "needle"
    lm_loss_weight: float = 0.0
    """Share of each sequence's loss weight that its tokens other than answers have together, whatever its length: 0.1
    is a tenth. Each token of an answer, its full stop and <eos> has weight 1."""

    def __post_init__(self):
        super().__post_init__()
        require(0 <= self.lm_loss_weight < 1, f"data.lm_loss_weight must be in [0, 1), got {self.lm_loss_weight}")


@schema
class ValidationConfig:
    """Data held out of training, for `train.validate_every`; one of both keys at most."""

    path: Optional[str] = None
    """A file as `data.path` is, all of it."""
    fraction: float = 0.0
    """Share of the lines of `data.path` that are not trained on, whatever the seed."""

    def __post_init__(self):
        require(0 <= self.fraction < 1, f"data.validation.fraction must be in [0, 1), got {self.fraction}")
        require(self.path is None or not self.fraction, "set one of data.validation.path and data.validation.fraction")


@schema
class JsonlDataConfig(DataConfig):
    """Chats ({"messages": [...]}) or completions ({"prompt": ..., "completion": ...}), as JSONL or Parquet."""

    kind: str = "jsonl"
    path: str = MISSING
    """A file, or a folder of them: .jsonl, .jsonl.gz, .jsonl.zst, .parquet."""
    on_bad_line: str = "error"
    """`error` ends the run at a line that is no chat or completion; `skip` leaves such lines out and counts them."""
    ignore_fields: list[str] = field(default_factory=list)
    """Keys of lines and messages to leave out, such as ids; others that change nothing are refused by name."""
    validation: ValidationConfig = field(default_factory=ValidationConfig)

    def __post_init__(self):
        super().__post_init__()
        require_choice("data.on_bad_line", self.on_bad_line, ("error", "skip"))
