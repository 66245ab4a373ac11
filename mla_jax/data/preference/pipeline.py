"""Batches of preference pairs, from any of their sources."""

import dataclasses
from collections.abc import Callable
from typing import Protocol

import numpy as np

from mla_jax.config import MinedPairsConfig, NeedlePairsConfig, PreferenceDataConfig, PreferenceJsonlConfig, StageConfig
from mla_jax.data.jsonl_batches import require_zero, shuffled
from mla_jax.data.needle.generator import Purpose, make_rng
from mla_jax.data.pipeline import Pipeline, position_skips
from mla_jax.data.preference.jsonl import JsonlPairs
from mla_jax.data.preference.layout import Prompt, lay_out, prompt_tokens
from mla_jax.data.preference.mined import MinedPairs, mined_path
from mla_jax.data.preference.needle_pairs import NeedlePairs
from mla_jax.data.tokenizer import Tokenizer
from mla_jax.data.workers import ENDLESS, Batch


def make_preference_pipeline(
    data: PreferenceDataConfig, tokenizer: Tokenizer, stages: list[StageConfig], stage: int, seed: int,
    rows_of: Callable[[int], np.ndarray] = np.arange, validation: bool = False, run_dir: str | None = None,
) -> "PreferencePipeline":  # fmt: skip
    """Batches of `stages[stage]` as `lay_out` makes them, of which this process makes the rows `rows_of(batch_size)`.

    Those of `validation` come from random generators that training never uses, and are the same for every seed; of a
    file, they are what `data.validation` holds out, once; with data=mined, they are needle pairs about the same
    questions. Mined pairs are read from `run_dir` at the first batch: `mla_jax.evals.mining` must have put them there
    by then.

    Raises:
        InputError: a data file or folder that cannot be used.
        UsageError: rows too short for any pair, or stage keys that the data cannot follow.
    """
    this = stages[stage]
    if validation:
        this, seed = dataclasses.replace(this, position_skip_fraction=0), 0
    rows = _source(data, tokenizer, this, stage, seed, validation, run_dir)
    batches = PreferenceBatches(data, rows, this, stage, seed, rows_of(this.batch_size), tokenizer.pad_id)
    return PreferencePipeline(batches, data.workers)


class PreferencePipeline(Pipeline):
    """Batches of preference pairs, some rows of which may come again in a later epoch."""

    def __init__(self, source: "PreferenceBatches", workers: int):
        super().__init__(source, workers)
        self._source, self._workers = source, workers
        self.row_numbers = source.row_numbers

    def __len__(self) -> int:
        return len(self._source)

    def fresh(self) -> "PreferencePipeline":
        """See `Pipeline`."""
        return PreferencePipeline(self._source, self._workers)


class RowSource(Protocol):
    """A source of the prompts of a row."""

    @property
    def order(self) -> dict[str, int]:
        """See `OrderedBatches`; empty where rows are made by their number and never repeat."""
        ...

    def row(self, batch: int, row: int) -> list[Prompt]:
        """The prompts, with their pairs, of a row of a batch of the stage."""
        ...

    def __len__(self) -> int:
        """The batches that rows are there for."""
        ...

    def number(self, batch: int, row: int) -> int | None:
        """A number that rows have in common if and only if they are the same; None where no two are."""
        ...


def _source(
    data: PreferenceDataConfig, tokenizer: Tokenizer, stage: StageConfig, number: int, seed: int, validation: bool,
    run_dir: str | None,
) -> RowSource:  # fmt: skip
    if isinstance(data, PreferenceJsonlConfig):
        return EpochRows(
            JsonlPairs(data, tokenizer, stage.seq_len, validation), stage.batch_size, number, seed, once=validation
        )
    if not isinstance(data, NeedlePairsConfig):
        raise TypeError(type(data))
    pairs = NeedlePairs(data, tokenizer, stage.seq_len)
    if isinstance(data, MinedPairsConfig) and not validation:
        assert run_dir is not None
        return EpochRows(MinedPairs(pairs, mined_path(run_dir, number), seed, number), stage.batch_size, number, seed)
    return NeedleRows(pairs, number, seed, Purpose.VALIDATION if validation else Purpose.PAIRS)


class NeedleRows:
    """A haystack a row, of which no two are alike."""

    def __init__(self, pairs: NeedlePairs, number: int, seed: int, purpose: Purpose):
        self._pairs, self._number, self._seed, self._purpose = pairs, number, seed, purpose
        self.order: dict[str, int] = {}

    def row(self, batch: int, row: int) -> list[Prompt]:
        """One prompt."""
        return [self._pairs.prompt(make_rng(self._seed, self._purpose, self._number, batch, row))]

    def number(self, batch: int, row: int) -> None:
        """See `RowSource`."""

    def __len__(self) -> int:
        return ENDLESS


class EpochRows:
    """Rows of a list, each epoch in an order of its own; with `once`, of one epoch."""

    def __init__(self, rows: JsonlPairs | MinedPairs, batch_size: int, number: int, seed: int, once: bool = False):
        self._rows, self._batch_size, self._number, self._seed, self._once = rows, batch_size, number, seed, once

    @property
    def order(self) -> dict[str, int]:
        """See `OrderedBatches`. The reference's log-probabilities are kept batch by batch, hence the batch size."""
        return {"seed": self._seed, "batch_size": self._batch_size, **self._rows.order}

    def row(self, batch: int, row: int) -> list[Prompt]:
        """The prompts of the row that follows the one before it; none after the last."""
        number = self.number(batch, row)
        return [] if number is None else self._rows[number]

    def number(self, batch: int, row: int) -> int | None:
        """See `RowSource`."""
        place = batch * self._batch_size + row
        if self._once and place >= len(self._rows):
            return None
        return shuffled(place, len(self._rows), self._seed, self._number)

    def __len__(self) -> int:
        return -(-len(self._rows) // self._batch_size) if self._once else ENDLESS


class PreferenceBatches:
    """Batches of a stage; where a row has one prompt, some of them with positions that skip in it."""

    def __init__(
        self, data: PreferenceDataConfig, rows: RowSource, stage: StageConfig, number: int, seed: int,
        wanted: np.ndarray, pad_id: int,
    ):  # fmt: skip
        require_zero(stage, "previous_fraction", data.kind)
        if data.packed:
            require_zero(stage, "position_skip_fraction", data.kind)
        self._data, self._rows, self._stage, self._wanted = data, rows, stage, wanted
        self._number, self._seed, self._pad_id = number, seed, pad_id

    @property
    def order(self) -> dict[str, int]:
        """See `OrderedBatches`."""
        return self._rows.order

    def row_numbers(self, index: int) -> list[int | None]:
        """The number of each row of a whole batch, the same for equal rows; None for a row that no other equals."""
        if self._stage.position_skip_fraction > 0:
            return [None] * self._stage.batch_size
        return [self._rows.number(index, row) for row in range(self._stage.batch_size)]

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> Batch:
        data, stage = self._data, self._stage
        rows = [self._rows.row(index, int(row)) for row in self._wanted]
        batch = lay_out(rows, stage.seq_len, data.branch_tokens, data.pairs_per_row, self._pad_id)
        skips = self._rng(Purpose.BATCH, index).random() < stage.position_skip_fraction
        if skips and stage.position_skip_max > 0:
            region = prompt_tokens(stage.seq_len, data.branch_tokens)
            for positions, row in zip(batch["positions"], self._wanted, strict=True):
                offsets = position_skips(self._rng(Purpose.SKIPS, index, int(row)), region, stage.position_skip_max)
                positions[:region] += offsets
                positions[region:] += offsets[-1]
        return batch

    def _rng(self, purpose: Purpose, *index: int) -> np.random.Generator:
        return make_rng(self._seed, purpose, self._number, *index)
