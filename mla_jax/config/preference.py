"""Data sets of preference pairs, for `experiments.dpo`."""

from dataclasses import field
from typing import ClassVar

from omegaconf import MISSING

from mla_jax.config.data import DataConfig, NeedleMixtureConfig, ValidationConfig, require_weights
from mla_jax.config.schema import require, require_at_least, require_choice, schema

REJECTED = ("near_key", "digit_edit", "random_value", "false_refusal", "wrong_order", "absent_key")
"""Kinds of rejected answers to questions about needles."""


@schema
class PreferenceDataConfig(DataConfig):
    """Keys that all data sets of pairs have: the shape of a row, see `mla_jax.data.preference.layout`."""

    packed: ClassVar[bool] = False
    """True if a row may hold more than one prompt."""

    kind: str = MISSING
    branch_tokens: int = 128
    """The last tokens of each row of `seq_len`, which hold the answers; a multiple of 128 is fastest on a GPU."""
    pairs_per_row: int = 1
    """The most pairs in a row."""

    def __post_init__(self):
        super().__post_init__()
        require_at_least(2, **{"data.branch_tokens": self.branch_tokens})
        require_at_least(1, **{"data.pairs_per_row": self.pairs_per_row})


@schema
class NeedlePairsConfig(NeedleMixtureConfig, PreferenceDataConfig):
    """Questions about needles, each with its answer and a wrong one; several of them about one haystack."""

    kind: str = "needle_pairs"
    rejected: dict[str, float] = field(default_factory=dict)
    """Weight of each kind of pair: near_key (the value of a key that differs by a word), digit_edit (one or two digits
    changed), random_value, false_refusal (`not found`), wrong_order (or a part of the values), absent_key (chosen is
    `not found`, rejected a number)."""

    def __post_init__(self):
        super().__post_init__()
        require_weights("rejected", self.rejected, REJECTED)


@schema
class PreferenceJsonlConfig(PreferenceDataConfig):
    """Pairs in TRL's formats, as JSONL or Parquet: `chosen`, `rejected` and, unless both begin with it, `prompt`."""

    packed: ClassVar[bool] = True

    kind: str = "preference_jsonl"
    path: str = MISSING
    """See `JsonlDataConfig`."""
    on_bad_line: str = "error"
    """`error` ends the run at a pair that is none or is too long; `skip` counts such pairs and leaves them out."""
    ignore_fields: list[str] = field(default_factory=list)
    """Keys of records and of their messages to leave out."""
    validation: ValidationConfig = field(default_factory=ValidationConfig)

    def __post_init__(self):
        super().__post_init__()
        require_choice("data.on_bad_line", self.on_bad_line, ("error", "skip"))


@schema
class MinedPairsConfig(NeedlePairsConfig):
    """Questions as of needle pairs, each with its answer and a wrong one that the run `init_from` wrote.

    `rejected` says what is asked: questions that can be answered wrongly in such ways.
    """

    kind: str = "mined"
    prompts: int = 256
    """Haystacks of each stage's length that are asked about, `pairs_per_row` questions each."""
    samples: int = 4
    """Answers to each question."""
    temperature: float = 1.0
    """At which they are sampled."""
    max_new_tokens: int = 32
    """The longest answer; what goes on is cut."""

    def __post_init__(self):
        super().__post_init__()
        for key in ("prompts", "samples", "max_new_tokens"):
            require_at_least(1, **{f"data.{key}": getattr(self, key)})
        require(self.temperature > 0, f"data.temperature must be above 0, got {self.temperature}")
