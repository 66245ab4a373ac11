"""Batches of a data config: random-access sources of whole batches, which Grain reads ahead.

Batch i of a stage is a pure function of (config, seed, stage, i). So a position in the data is one number, the same
for any number of workers, and a resumed run sees the batches it would have seen. Of a data set, whose rows come in an
order, that number is the row, so that the batch size may change.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, Protocol, runtime_checkable

import grain
import numpy as np

from mla_jax.config import DataConfig, JsonlDataConfig, NeedleDataConfig, PreferenceDataConfig, StageConfig
from mla_jax.data.jsonl_batches import JsonlBatches
from mla_jax.data.needle.generator import NeedleGenerator, Purpose, make_rng
from mla_jax.data.tokenizer import Tokenizer
from mla_jax.data.workers import ENDLESS, Batch, BatchSource, Rows, WorkerProcesses
from mla_jax.errors import InputError, UsageError


@runtime_checkable
class OrderedBatches(BatchSource, Protocol):
    """Batches of the rows of a data set, which come in an order."""

    @property
    def order(self) -> dict[str, int]:
        """The numbers that decide which row is at which place, by the names that messages give them."""
        ...


@runtime_checkable
class DataSetBatches(OrderedBatches, Protocol):
    """Ordered batches of any size: number i holds `batch_size` rows, from first_row + i * batch_size on."""

    batch_size: int
    first_row: int


class Pipeline:
    """Endless iterator over the batches of a source, made ahead by a thread, or by `workers` processes."""

    def __init__(self, source: BatchSource, workers: int):
        self._source = source
        self._workers = workers
        self._next = 0
        self._batches: grain.DatasetIterator | None = None
        self._processes: WorkerProcesses | None = None

    def __iter__(self) -> "Pipeline":
        return self

    def __next__(self) -> Batch:
        try:
            batch = next(self.start())
        except BaseException:
            self.close()  # Grain has gone on to the batch after this one
            raise
        self._next += 1
        return batch

    def start(self) -> grain.DatasetIterator:
        """Starts threads and worker processes, unless they run; the first batch does it too."""
        if self._batches is None:
            make = self._source.__getitem__
            if self._workers:
                self._processes = WorkerProcesses(self._source, self._workers)
                make = self._processes.__getitem__
            threads = max(self._workers, 1)  # with workers, they read what those have made
            ahead = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=2 * threads)
            batches = grain.MapDataset.range(self._next, len(self._source)).map(make).to_iter_dataset(ahead)
            self._batches = iter(batches)
        return self._batches

    def fresh(self) -> "Pipeline":
        """Another iterator over the same batches, from the first on."""
        return Pipeline(self._source, self._workers)

    def get_state(self) -> dict[str, Any]:
        """Position in the data, to save as JSON."""
        source = self._source
        if isinstance(source, DataSetBatches):
            return {"next_row": source.first_row + self._next * source.batch_size, "order": source.order}
        return {"next_batch": self._next, "order": source.order if isinstance(source, OrderedBatches) else {}}

    def set_state(self, state: dict[str, Any], restart: bool = False) -> None:
        """Goes to a position that `get_state` gave, under any number of workers and any batch size.

        Args:
            state: the position. Those of earlier versions count batches, and say nothing of the order of rows.
            restart: where that position means nothing, go to the first row.

        Raises:
            InputError: rows come in another order now, which would leave out some and repeat others.
        """
        self.close()
        source, before = self._source, state.get("order")
        order = source.order if isinstance(source, OrderedBatches) else {}
        by_row = source if isinstance(source, DataSetBatches) and before is not None else None
        unit = "row" if by_row is not None else "batch"
        position = state.get(f"next_{unit}", 0)
        changed = [f"{key} was {before.get(key)} and is {now}" for key, now in order.items()
                   if now != before.get(key)] if before is not None else []  # fmt: skip
        if position and changed:
            if not restart:
                raise InputError(
                    f"the data come in another order than up to {unit} {position}, which was trained on "
                    f"({'; '.join(changed)}); put that back, or begin this stage's data anew with "
                    "train.on_data_change=restart"
                )
            position = 0
        if by_row is not None:
            self._next, by_row.first_row = divmod(position, by_row.batch_size)
        else:
            self._next = position

    def close(self) -> None:
        """Ends threads and worker processes; the iterator starts them again if it is used again."""
        if self._batches is not None:
            self._batches.close()
        if self._processes is not None:
            self._processes.close()
        self._batches = self._processes = None


class MakePipeline(Protocol):
    """A function such as `make_pipeline`, from which the training loop gets the batches of a stage."""

    def __call__(
        self, data: Any, tokenizer: Tokenizer, stages: list[StageConfig], stage: int, seed: int,
        rows_of: Callable[[int], np.ndarray], validation: bool = False,
    ) -> Pipeline:  # fmt: skip
        """Batches of `stages[stage]`: arrays [b, T], with `tokens`; `rows_of` works in the caller's thread only.

        Those of `validation` come from data that training never sees, do not depend on the seed, and may end.
        """
        ...


def make_pipeline(
    data: DataConfig, tokenizer: Tokenizer, stages: list[StageConfig], stage: int, seed: int,
    rows_of: Callable[[int], np.ndarray] = np.arange, validation: bool = False,
) -> Pipeline:  # fmt: skip
    """Batches of `stages[stage]`, of which this process makes the rows `rows_of(batch_size)` only.

    Those of `validation` hold nothing that training sees and are the same for every seed, at the stage's length,
    without skips: endless needles, or each held-out document once, the last batch filled up with empty rows.

    Keys of a batch, all [b, T]: `tokens`; `targets`, the next token of each; `weights`, the loss weight of each target
    (0 on the last position of a row or document and on padding); `answers`, true where the target is part of an answer
    itself, which the accuracy counts, not white space or what only ends it; `positions` for RoPE, from 0 in each
    document unless they skip; where rows hold several documents `segments`, the document each token is of, from 1, 0 on
    padding.

    Raises:
        InputError: a data file or folder that cannot be used.
        UsageError: a sequence length too short for any example, or stage keys that the data cannot follow.
    """
    sizes = {s.batch_size for s in stages[max(stage - 1, 0) : stage + 1]}
    rows = {size: rows_of(size) for size in sizes}
    if isinstance(data, NeedleDataConfig):
        if validation:
            plain = dataclasses.replace(stages[stage], previous_fraction=0, position_skip_fraction=0)
            stages, seed = [*stages[:stage], plain, *stages[stage + 1 :]], 0
        purpose = Purpose.VALIDATION if validation else Purpose.EXAMPLE
        return Pipeline(NeedleBatches(data, tokenizer, stages, stage, seed, rows, purpose), data.workers)
    if isinstance(data, JsonlDataConfig):
        return Pipeline(JsonlBatches(data, tokenizer, stages, stage, seed, rows, validation), data.workers)
    if isinstance(data, PreferenceDataConfig):
        raise UsageError(f"data={data.kind} has preference pairs, which experiments.dpo trains on")
    raise TypeError(type(data))


class NeedleBatches:
    """Needle batches of a stage, some of them of the previous stage's shape, some with positions that skip."""

    def __init__(
        self, data: NeedleDataConfig, tokenizer: Tokenizer, stages: list[StageConfig], stage: int, seed: int,
        rows: Rows, purpose: Purpose,
    ):  # fmt: skip
        self._rows, self._purpose = rows, purpose
        self._generator = NeedleGenerator(data, tokenizer)
        self._lm_share = data.lm_loss_weight
        self._stage = stages[stage]
        self._previous = stages[stage - 1] if stage else stages[stage]
        self._seed, self._number = seed, stage
        self._pad_id = tokenizer.pad_id
        self._generator.check_length(self._stage.seq_len)

    def __len__(self) -> int:
        return ENDLESS

    def __getitem__(self, index: int) -> Batch:
        rng = make_rng(self._seed, Purpose.BATCH, self._number, index)
        previous, skips = rng.random(2) < (self._stage.previous_fraction, self._stage.position_skip_fraction)
        shape = self._previous if previous else self._stage
        rows, length = self._rows[shape.batch_size], shape.seq_len
        tokens = np.empty((len(rows), length), np.int32)
        learned, answers = (np.empty((len(rows), length), bool) for _ in range(2))
        for i, row in enumerate(rows):
            example = make_rng(self._seed, self._purpose, self._number, index, row)
            tokens[i], learned[i], answers[i] = self._generator.example(example, length)
        positions = np.tile(np.arange(length, dtype=np.int32), (len(rows), 1))
        # The stage's longest position bounds the jumps of the previous stage's batches too.
        most = min(self._stage.position_skip_max, self._stage.seq_len + self._stage.position_skip_max - length)
        if skips and most > 0:
            for i, row in enumerate(rows):
                positions[i] += position_skips(
                    make_rng(self._seed, Purpose.SKIPS, self._number, index, row), length, most
                )
        return {
            "tokens": tokens,
            "targets": shifted(tokens, self._pad_id),
            "weights": loss_weights(shifted(learned, False), self._lm_share),
            "answers": shifted(answers, False),
            "positions": positions,
        }


def loss_weights(learned_BT: np.ndarray, lm_share: float) -> np.ndarray:
    """Loss weights float32 [B, T] of targets: 1 for each learned one, 0 in the last column, which has no target.

    The others of a row weigh alike, together `lm_share` of the row. A row without learned targets has weight 0.
    """
    learned = learned_BT.sum(axis=1, keepdims=True)
    others = np.maximum(learned_BT.shape[1] - 1 - learned, 1)
    weights_BT = np.where(learned_BT, 1, lm_share / (1 - lm_share) * learned / others).astype(np.float32)
    weights_BT[:, -1] = 0
    return weights_BT


def shifted(x: np.ndarray, last: float) -> np.ndarray:
    """[B, T] shifted one to the left, with `last` in the last column."""
    return np.concatenate([x[:, 1:], np.full_like(x[:, :1], last)], axis=1)


def position_skips(rng: np.random.Generator, length: int, most: int) -> np.ndarray:
    """Offsets to add to `length` positions: 1 to 3 jumps at random places, log-uniformly 1 to `most` in all; int32."""
    total = int(np.exp(rng.uniform(0, np.log(most + 1))))
    jumps = rng.multinomial(total, rng.dirichlet(np.ones(rng.integers(1, 4))))
    skips = np.zeros(length, np.int64)
    np.add.at(skips, rng.integers(length, size=len(jumps)), jumps)
    return np.cumsum(skips).astype(np.int32)
