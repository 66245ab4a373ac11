"""Log-probabilities that a reference model gives the answers of a stage's batches: computed once, kept on disk.

RUN/reference/KEY.bin    a record for each batch of a stage, in order: see `ReferenceFile`

KEY is a checksum of all that the numbers depend on: the reference's weights (by their manifest), the model, the data
and the files that it is made of, the tokenizer with its template, the seed, the stage's lengths. So what was computed
before is used only where it is right, and another key is another file.
"""

import contextlib
import dataclasses
import functools
import hashlib
import itertools
import json
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np

from mla_jax.checkpoint.manifest import read_manifest
from mla_jax.checkpoint.run_folder import check_fits, load_params, newest_checkpoint
from mla_jax.config import NUMERICALLY_NEUTRAL_KEYS, DpoConfig, PreferenceDataConfig, StageConfig
from mla_jax.data.pipeline import Pipeline
from mla_jax.data.preference.mined import mined_path
from mla_jax.data.preference.pipeline import PreferencePipeline, make_preference_pipeline
from mla_jax.data.tokenizer import Tokenizer
from mla_jax.data.workers import Batch
from mla_jax.distributed.decisions import broadcast_decision, on_all
from mla_jax.distributed.join import is_main, print_on_main
from mla_jax.distributed.preemption import Stopped, StopRequest
from mla_jax.errors import InputError
from mla_jax.losses.preference import PreferenceLoss
from mla_jax.mesh import fetch_branches, place_batch
from mla_jax.model.transformer import bind
from mla_jax.observability.metrics import ProgressDisplay

FOLDER = "reference"
BeforeStage = Callable[[DpoConfig, Tokenizer, int, Callable[[], None]], None]
"""Makes what the batches of a stage need, given config, tokenizer, number of the stage and what ends it early."""
_DATA_KEYS = ("workers", "cache_dir")
"""Keys of the data that its batches do not depend on."""
_STAGE_KEYS = ("steps", "learning_rate", "accuracy")
"""Keys of a stage that its batches do not depend on."""


class ReferencePipelines:
    """Makes the pipelines of a run: batches of pairs, with the log-probabilities of its reference."""

    def __init__(self, config: DpoConfig, loss: PreferenceLoss, stop: StopRequest, before_stage: BeforeStage):
        """`stop` is asked before each batch that the reference reads; `before_stage` is called before the first."""
        self._config, self._loss, self._stop, self._before_stage = config, loss, stop, before_stage

    def __call__(
        self, data: PreferenceDataConfig, tokenizer: Tokenizer, stages: list[StageConfig], stage: int, seed: int,
        rows_of: Callable[[int], np.ndarray], validation: bool = False,
    ) -> "ReferencePipeline":  # fmt: skip
        """See `make_preference_pipeline`; batches have `reference` besides, float32 [b, T].

        Raises InputError besides, if the reference is no run or has other weights or another tokenizer.
        """
        config = self._config
        batches = make_preference_pipeline(data, tokenizer, stages, stage, seed, rows_of, validation, config.run_dir)
        reference = Reference(
            config, self._loss, self._stop, self._before_stage, data, tokenizer, stages[stage], stage, validation
        )
        check_fits(*reference.run, config.model, tokenizer)  # now, not at the first batch
        return ReferencePipeline(batches, reference, rows_of(stages[stage].batch_size))


class ReferencePipeline(Pipeline):
    """Batches with the reference's log-probabilities, which the first batch waits for."""

    def __init__(self, batches: PreferencePipeline, reference: "Reference", rows: np.ndarray):
        self._inner, self._reference, self._rows = batches, reference, rows
        self._records: np.ndarray | None = None

    def __next__(self) -> Batch:
        if self._records is None:
            with contextlib.closing(self._inner.fresh()) as batches:
                self._records = self._reference.records(batches)
        index = self.get_state()["next_batch"]
        batch = next(self._inner)
        return batch | {"reference": self._reference.of_batch(self._records, index, batch, self._rows)}

    def get_state(self) -> dict[str, Any]:
        """See `Pipeline`."""
        return self._inner.get_state()

    def set_state(self, state: dict[str, Any], restart: bool = False) -> None:
        """See `Pipeline`."""
        self._inner.set_state(state, restart)

    def close(self) -> None:
        """See `Pipeline`."""
        self._inner.close()
        self._records = None


@dataclasses.dataclass(frozen=True)
class Reference:
    """The reference model of a run and the batches of one stage."""

    config: DpoConfig
    loss: PreferenceLoss
    stop: StopRequest
    before_stage: BeforeStage
    data: PreferenceDataConfig
    tokenizer: Tokenizer
    stage: StageConfig
    number: int
    validation: bool

    @property
    def run(self) -> tuple[str, str]:
        """The key that names the reference's run, and the run."""
        config = self.config
        assert config.init_from is not None  # DpoConfig sees to it
        return ("init_from", config.init_from) if config.reference is None else ("reference", config.reference)

    def records(self, batches: PreferencePipeline) -> np.ndarray:
        """The records of all batches that are used of the stage, from the file; computes what is missing first.

        Raises:
            InputError: the reference's run cannot be used, the file cannot be written, or a process cannot read it.
            Stopped: the run was told to stop; what was computed until then is kept.
        """
        if not self.validation:
            self.before_stage(self.config, self.tokenizer, self.number, self._check_stop)
        checkpoint = newest_checkpoint(self.run[1])
        path = Path(self.config.run_dir) / FOLDER / f"{self._key(checkpoint)}.bin"
        file = ReferenceFile(path, self.stage.batch_size, self.loss.branch_tokens)
        done = broadcast_decision(file.check)
        assert done is not None
        wanted = min(self.config.train.validation_batches if self.validation else self.stage.steps, len(batches))
        if done < wanted:
            done = self._compute(file, checkpoint.name, done, wanted, batches)
        return on_all(lambda: file.open(done))

    def of_batch(self, records: np.ndarray, index: int, batch: Batch, rows: np.ndarray) -> np.ndarray:
        """`reference` [b, T] of this process's rows of batch `index`.

        Raises:
            InputError: the batch is not the one that was computed.
        """
        record = records[index]
        if is_main() and record["row"] != _row_checksum(batch):
            raise InputError(
                f"{Path(self.config.run_dir) / FOLDER} holds the reference's log-probabilities of other data (batch "
                f"{index} of stage {self.number + 1} differs): delete that folder and run the same command again"
            )
        reference = np.zeros(batch["tokens"].shape, np.float32)
        reference[:, -self.loss.branch_tokens :] = record["log_probs"][rows]
        return reference

    def _compute(self, file: "ReferenceFile", step: str, done: int, wanted: int, batches: PreferencePipeline) -> int:
        """Appends the records of batches `done` to `wanted`, or to the last there is; returns how many are there.

        A batch whose rows have all come before, as in later epochs, gets what they got.
        """
        params = load_params(*self.run, self.config.model, self.tokenizer, step)
        accumulation = self.config.train.grad_accumulation
        print_on_main(f"Log-probabilities of the reference {self.run[1]}: batches {done + 1} to {wanted}")
        display = ProgressDisplay(wanted, done, is_main(), "reference batch")
        batches.set_state({"next_batch": done})
        places: dict[int | None, tuple[int, int]] = {}  # where a row came first: its batch and its place in it
        for index in range(done):
            _remember(places, batches.row_numbers(index), index)

        @jax.jit
        def log_probs(params: dict, rows: dict[str, jax.Array]) -> jax.Array:
            return self.loss.statistics(bind(self.config.model, params), rows).log_probs_BR

        try:
            for index, rows in enumerate(itertools.islice(batches, wanted - done), done):
                self._check_stop(f"batch {index} of the reference")
                numbers = batches.row_numbers(index)
                if all(number in places for number in numbers):
                    again = [places[number] for number in numbers]
                    broadcast_decision(functools.partial(file.repeat, _row_checksum(rows), again))
                    done = index + 1
                    continue
                _remember(places, numbers, index)
                batch = place_batch(rows, accumulation, self.loss.branch_tokens)
                parts = [log_probs(params, {name: x[a] for name, x in batch.items()}) for a in range(accumulation)]
                found = np.concatenate([fetch_branches(part) for part in parts])
                if not np.isfinite(found).all():
                    raise InputError(
                        f"{self.run[0]}={self.run[1]} gives batch {index} log-probabilities that are not finite: it is "
                        "no model to start from"
                    )
                broadcast_decision(functools.partial(file.append, _row_checksum(rows), found))
                display.show(index + 1, "log-probabilities of the reference")
                done = index + 1
        finally:
            display.close()
        return done

    def _check_stop(self, what: str = "what it prepares") -> None:
        if self.stop.reached(what):
            raise Stopped

    def _key(self, checkpoint: Path) -> str:
        files = on_all(lambda: read_manifest(checkpoint))
        stage = {key: value for key, value in dataclasses.asdict(self.stage).items() if key not in _STAGE_KEYS}
        model = dataclasses.asdict(self.config.model)
        data = {key: value for key, value in dataclasses.asdict(self.data).items() if key not in _DATA_KEYS}
        values = [*data.values(), *data.get("validation", {}).values()]
        texts = [value for value in values if isinstance(value, str)]
        identity = {
            "weights": {name: file for name, file in files.items() if name.startswith("params/")},
            "model": {key: value for key, value in model.items() if key not in NUMERICALLY_NEUTRAL_KEYS},
            "data": data,
            "files": [_content(path) for path in (*map(Path, texts), mined_path(self.config.run_dir, self.number))],
            "tokenizer": [self.tokenizer.fingerprint, self.tokenizer.chat_template],
            "stage": [self.number, stage, None if self.validation else self.config.seed],
        }
        return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:16]


class ReferenceFile:
    """Records of batches, one after the other, each with a checksum.

    A record has `row`, a checksum of the batch's first row, `log_probs` float32 [B, R], of the targets of the branch
    region, and `crc` of both.
    """

    def __init__(self, path: Path, batch_size: int, branch_tokens: int):
        self.path = path
        self._record = np.dtype([("row", "<u4"), ("log_probs", "<f4", (batch_size, branch_tokens)), ("crc", "<u4")])

    def check(self) -> int:
        """The number of batches that are there, after cutting off what is damaged. Raises InputError if it cannot."""
        if not self.path.exists():
            return 0
        with self._errors():
            whole = self.path.stat().st_size // self._record.itemsize
            good = self._good(np.memmap(self.path, self._record, "r", shape=(whole,))) if whole else 0
            if good < whole:
                print(f"warning: {self.path} is damaged at batch {good}; it is computed again from there", flush=True)
            with self.path.open("r+b") as file:
                file.truncate(good * self._record.itemsize)  # a process that was killed left a part of a record
        return good

    def append(self, row: int, log_probs: np.ndarray) -> None:
        """Writes the next record. Raises InputError if it cannot."""
        record = np.zeros((), self._record)
        record["row"], record["log_probs"] = row, log_probs
        record["crc"] = zlib.crc32(record.tobytes()[:-4])
        with self._errors():
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("ab") as file:
                file.write(record.tobytes())

    def repeat(self, row: int, places: list[tuple[int, int]]) -> None:
        """Writes a record of rows that have one, in these batches, at these places. Raises InputError if it cannot."""
        with self._errors():
            records = np.memmap(self.path, self._record, "r")
        self.append(row, np.stack([records[batch]["log_probs"][place] for batch, place in places]))

    def open(self, count: int) -> np.ndarray:
        """The first `count` records, which stay on disk. Raises InputError if they cannot be read."""
        with self._errors():
            records = np.memmap(self.path, self._record, "r", shape=(count,))
            good = self._good(records)
        if good < count:
            raise InputError(f"{self.path} is damaged at batch {good}: delete it and run the same command again")
        return records

    @contextlib.contextmanager
    def _errors(self) -> Iterator[None]:
        try:
            yield
        except (OSError, ValueError) as e:
            raise InputError(
                f"{self.path} cannot be read or written ({e}); what was computed is kept: free space or mend the disk "
                "and run the same command again"
            ) from e

    def _good(self, records: np.ndarray) -> int:
        for index, record in enumerate(records):
            if zlib.crc32(record.tobytes()[:-4]) != record["crc"]:
                return index
        return len(records)


def _remember(places: dict[int | None, tuple[int, int]], numbers: list[int | None], batch: int) -> None:
    """Notes where the rows of these numbers came first."""
    for place, number in enumerate(numbers):
        if number is not None:
            places.setdefault(number, (batch, place))


def _row_checksum(batch: Batch) -> int:
    """CRC-32 of the first row, which is the first process's on every mesh."""
    return zlib.crc32(b"".join(batch[name][0].tobytes() for name in ("tokens", "targets", "positions", "branches")))


def _content(path: Path) -> str | None:
    """A checksum of a file, or of all files in a folder; None if the value names neither."""
    if not path.exists():
        return None
    found = hashlib.sha256()
    for file in sorted(p for p in ([path] if path.is_file() else path.rglob("*")) if p.is_file()):
        with file.open("rb") as opened:
            found.update(hashlib.file_digest(opened, "sha256").digest())
    return found.hexdigest()
