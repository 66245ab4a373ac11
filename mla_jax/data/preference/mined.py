"""Pairs of which a model wrote the rejected answers, as they are kept in a run's folder.

    RUN/mined/stage1.json

Prompts, questions and right answers are made again from their numbers, so the file is small whatever the length.
`mla_jax.evals.mining` makes it.
"""

import functools
import json
import zlib
from pathlib import Path
from typing import Any

import numpy as np

from mla_jax.data.needle.generator import Purpose, make_rng
from mla_jax.data.preference.layout import Prompt
from mla_jax.data.preference.needle_pairs import NeedlePairs
from mla_jax.errors import InputError

FOLDER = "mined"


def mined_path(run_dir: str, stage: int) -> Path:
    """The file of a stage, which count from 0."""
    return Path(run_dir) / FOLDER / f"stage{stage + 1}.json"


def asked_prompt(pairs: NeedlePairs, seed: int, stage: int, number: int) -> Prompt:
    """Prompt `number` of a stage with its questions, as pairs whose rejected answers nobody wrote."""
    return pairs.prompt(make_rng(seed, Purpose.MINED, stage, number))


def read_mined(path: Path) -> dict[str, Any] | None:
    """The content of the file; None if there is none.

    Keys: `made_from`, what decides the answers; `asked`, how many prompts were; `answers`, `wrong` and `empty`, numbers
    of answers; `rows`, [prompt, [[question, [token id, ...]], ...]] each.

    Raises:
        InputError: it is damaged or cannot be read.
    """
    try:
        content = json.loads(path.read_bytes())
        return {key: content[key] for key in ("made_from", "asked", "answers", "wrong", "empty", "rows")}
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError) as e:
        raise InputError(f"{path} cannot be used ({e}); delete it to mine again") from e


class MinedPairs:
    """The rows of a file, which is read when the first of them is asked for."""

    def __init__(self, pairs: NeedlePairs, path: Path, seed: int, stage: int):
        self._pairs, self._path, self._seed, self._stage = pairs, path, seed, stage

    @functools.cached_property
    def _rows(self) -> list[Any]:
        content = read_mined(self._path)
        if content is None or not content["rows"]:
            raise InputError(f"{self._path} has no pairs; they are mined before training starts")
        return content["rows"]

    @property
    def order(self) -> dict[str, int]:
        """See `OrderedBatches`; empty before the file is there."""
        rows = self._rows if self._path.exists() else None
        return {} if rows is None else {"the CRC-32 of the mined rows": zlib.crc32(json.dumps(rows).encode())}

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, row: int) -> list[Prompt]:
        """One prompt with its pairs."""
        number, mistakes = self._rows[row]
        prompt = asked_prompt(self._pairs, self._seed, self._stage, number)
        pairs = [prompt.pairs[question]._replace(rejected=np.array(ids, np.int32)) for question, ids in mistakes]
        return [Prompt(prompt.ids, pairs)]
