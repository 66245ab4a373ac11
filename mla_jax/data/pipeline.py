"""Batches of a data config: random-access sources of whole batches, which Grain reads ahead.

Batch i of a stage is a pure function of (config, seed, stage, i). So a position in the data is one number, the same
for any number of workers, and a resumed run sees the batches it would have seen. Of a data set, whose rows come in an
order, that number is the row, so that the batch size may change.
"""

import dataclasses
import zlib
from collections.abc import Callable
from typing import Any, Protocol, runtime_checkable

import grain
import numpy as np

from mla_jax.config import DataConfig, JsonlDataConfig, NeedleDataConfig, PreferenceDataConfig, StageConfig
from mla_jax.data.jsonl import load_documents
from mla_jax.data.needle.generator import NeedleGenerator, Purpose, make_rng
from mla_jax.data.packing import pack
from mla_jax.data.tokenizer import Tokenizer
from mla_jax.data.turns import stop_ids
from mla_jax.data.workers import Batch, BatchSource, WorkerProcesses
from mla_jax.errors import InputError, UsageError

Rows = dict[int, np.ndarray]
"""Rows that this process makes, ascending, by batch size."""

ENDLESS = 2**48
"""Batches in a source: more than any run takes."""


@runtime_checkable
class DataSetBatches(BatchSource, Protocol):
    """Batches of the rows of a data set: number i holds `batch_size` of them, from first_row + i * batch_size on."""

    batch_size: int
    first_row: int
    order: dict[str, int]
    """What settles which row is at which place, by the names that messages give it."""


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
        if self._batches is None:
            self._batches = self._start()
        try:
            batch = next(self._batches)
        except BaseException:
            self.close()  # Grain has gone on to the batch after this one
            raise
        self._next += 1
        return batch

    def _start(self) -> grain.DatasetIterator:
        make = self._source.__getitem__
        if self._workers:
            self._processes = WorkerProcesses(self._source, self._workers)
            make = self._processes.__getitem__
        threads = max(self._workers, 1)  # with workers, they read what those have made
        ahead = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=2 * threads)
        return iter(grain.MapDataset.range(self._next, len(self._source)).map(make).to_iter_dataset(ahead))

    def fresh(self) -> "Pipeline":
        """Another iterator over the same batches, from the first on."""
        return Pipeline(self._source, self._workers)

    def get_state(self) -> dict[str, Any]:
        """Position in the data, to save as JSON."""
        source = self._source
        if isinstance(source, DataSetBatches):
            return {"next_row": source.first_row + self._next * source.batch_size, "order": source.order}
        return {"next_batch": self._next, "order": {}}

    def set_state(self, state: dict[str, Any], restart: bool = False) -> None:
        """Goes to a position that `get_state` gave, under any number of workers and any batch size.

        Args:
            state: the position. Those of earlier versions count batches, and say nothing of the order of rows.
            restart: where that position means nothing, go to the first row.

        Raises:
            InputError: rows come in another order now, which would leave out some and repeat others.
        """
        self.close()
        source = self._source
        if not isinstance(source, DataSetBatches):
            self._next = state.get("next_batch", 0)
            return
        if "order" not in state:
            self._next = state["next_batch"]
            return
        before, row = state["order"], state.get("next_row", 0)
        changed = [f"{key} was {before.get(key)} and is {now}" for key, now in source.order.items()
                   if now != before.get(key)]  # fmt: skip
        if row and changed:
            if not restart:
                raise InputError(
                    f"the rows of the data come in another order than the {row} that were trained on "
                    f"({'; '.join(changed)}); put that back, or begin this stage's data anew with "
                    "train.on_data_change=restart"
                )
            row = 0
        self._next, source.first_row = divmod(row, source.batch_size)

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


class JsonlBatches:
    """Packed rows of records. Packing is done once; each epoch takes the rows in an order of its own.

    The rows of `validation` come once, in the same order for every seed.
    """

    def __init__(
        self, data: JsonlDataConfig, tokenizer: Tokenizer, stages: list[StageConfig], stage: int, seed: int,
        rows: Rows, validation: bool = False,
    ):  # fmt: skip
        self._stage = stages[stage]
        require_zero(self._stage, "previous_fraction", data.kind)
        require_zero(self._stage, "position_skip_fraction", data.kind)
        path, fraction = data.path, data.validation.fraction
        if validation and data.validation.path is not None:
            path, fraction = data.validation.path, 0.0
        elif validation and not fraction:
            raise UsageError(
                "train.validate_every needs data to validate on: set data.validation.path=FILE or "
                "data.validation.fraction=0.05, the share of the lines of data.path that are not trained on"
            )
        self._documents = load_documents(path, tokenizer, data.on_bad_line, tuple(data.ignore_fields), data.cache_dir)
        lengths = self._documents.lengths
        chosen = np.arange(len(lengths))
        if fraction:
            chosen = np.flatnonzero(held_out(len(lengths), fraction) == validation)
            if not len(chosen):
                raise InputError(f"{path}: data.validation.fraction={fraction} of {len(lengths)} lines leaves none")
        self._wanted = rows[self._stage.batch_size]
        packed = pack(lengths[chosen], self._stage.seq_len, path)
        self._packed = dataclasses.replace(packed, documents=chosen[packed.documents])
        self._seed, self._number, self._once = 0 if validation else seed, stage, validation
        self.batch_size, self.first_row = self._stage.batch_size, 0
        self.order = {
            "seed": self._seed,
            "seq_len": self._stage.seq_len,
            "the number of packed rows": len(self._packed),
            "the CRC-32 of the documents' lengths": zlib.crc32(lengths[chosen].astype(np.int64)),
        }
        self._pad_id = tokenizer.pad_id
        self._is_text = ~tokenizer.blank
        self._is_text[list(stop_ids(tokenizer))] = False

    def __len__(self) -> int:
        return -(-len(self._packed) // self._stage.batch_size) if self._once else ENDLESS

    def __getitem__(self, index: int) -> Batch:
        shape = len(self._wanted), self._stage.seq_len
        batch: Batch = {
            "tokens": np.full(shape, self._pad_id, np.int32),
            "targets": np.full(shape, self._pad_id, np.int32),
            "weights": np.zeros(shape, np.float32),
            "answers": np.zeros(shape, bool),
            "segments": np.zeros(shape, np.int32),
            "positions": np.zeros(shape, np.int32),
        }
        for i, row in enumerate(self._wanted):
            number = self.first_row + index * self.batch_size + int(row)
            if self._once and number >= len(self._packed):
                break
            packed = self._packed[shuffled(number, len(self._packed), self._seed, self._number)]
            documents = [self._documents[document] for document in packed]
            lengths = [len(ids) for ids, _ in documents]
            ids, loss_mask = (np.concatenate(arrays) for arrays in zip(*documents, strict=True))
            ends, used = np.cumsum(lengths), len(ids)
            targets, learned = np.append(ids[1:], self._pad_id), np.append(loss_mask[1:], False)
            targets[ends - 1], learned[ends - 1] = self._pad_id, False  # never the next document's first token
            batch["tokens"][i, :used] = ids
            batch["targets"][i, :used] = targets
            batch["weights"][i, :used] = learned
            batch["answers"][i, :used] = learned & self._is_text[targets]
            batch["segments"][i, :used] = np.repeat(np.arange(1, len(lengths) + 1), lengths)
            batch["positions"][i, :used] = np.arange(used) - np.repeat(ends - lengths, lengths)
        return batch


def shuffled(number: int, count: int, seed: int, stage: int) -> int:
    """The row that comes as `number` if each epoch takes `count` rows in an order of its own.

    The order is a keyed permutation: a place in it costs the same however many rows there are.
    """
    epoch, place = divmod(number, count)
    key = make_rng(seed, Purpose.EPOCH, stage, epoch).integers(2**32)
    row: Any = grain.MapDataset.range(count).shuffle(seed=int(key))[place]
    return int(row)


def require_zero(stage: StageConfig, name: str, kind: str) -> None:
    """Raises UsageError if the key `name` of a stage is set, which data of this kind cannot follow."""
    if getattr(stage, name) > 0:
        raise UsageError(f"train.stages.{name} does not work with data={kind}; leave it at 0")


def held_out(count: int, fraction: float) -> np.ndarray:
    """Bool [count], true for about `fraction` of documents and for one at least.

    The same ones at every call, and those of a file stay when lines are appended to it.
    """
    draws = make_rng(0, Purpose.VALIDATION).random(count)
    return (draws < fraction) | (draws == draws.min(initial=1.0))


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
