"""Mining: a model answers questions about needles, and what it gets wrong becomes the rejected answers of pairs."""

import dataclasses
import hashlib
import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np

from mla_jax.checkpoint.manifest import read_manifest
from mla_jax.checkpoint.run_folder import load_params, newest_checkpoint
from mla_jax.config import NUMERICALLY_NEUTRAL_KEYS, MinedPairsConfig, RunConfig
from mla_jax.data.needle.generator import Purpose, make_rng
from mla_jax.data.preference.layout import Prompt
from mla_jax.data.preference.mined import asked_prompt, mined_path, read_mined
from mla_jax.data.preference.needle_pairs import NeedlePairs
from mla_jax.data.tokenizer import Tokenizer
from mla_jax.distributed.decisions import on_all
from mla_jax.distributed.join import is_main, print_on_main
from mla_jax.errors import InputError
from mla_jax.evals.passkey import first_integer
from mla_jax.files import write_json
from mla_jax.inference.generator import Generator
from mla_jax.inference.sampling import SamplingParams
from mla_jax.inference.shared_prefix import generate_sharing_prefix
from mla_jax.observability.metrics import ProgressDisplay

_AT_ONE_TIME = 16
"""Answers that are written together, at least those to one question."""
_SAVE_S = 10.0
"""Seconds after which what is found is written."""


def mine_pairs(
    config: RunConfig, tokenizer: Tokenizer, stage: int, check_stop: Callable[[], None] = lambda: None
) -> None:
    """Makes the pairs of a stage with data=mined, unless they are there; with other data, does nothing.

    The run `init_from` answers the questions on the mesh that is set, prompt by prompt. If that is ended early, what
    was found is kept, and the same call goes on from there.

    Args:
        config: of the run that is to train on the pairs; they go into its folder, see `mined_path`.
        tokenizer: of the run.
        stage: number of the stage, from 0.
        check_stop: called before each prompt; what it raises ends the mining.

    Raises:
        InputError: no answer was wrong, the run cannot be used, the file cannot be written, or there are several
            processes and no pairs yet.
        UsageError: rows are too short for any pair.
    """
    data = config.data
    if not isinstance(data, MinedPairsConfig):
        return
    assert config.init_from is not None
    path, checkpoint = mined_path(config.run_dir, stage), newest_checkpoint(config.init_from)
    made_from = _made_from(config, data, tokenizer, stage, checkpoint)
    found = on_all(lambda: read_mined(path))
    if found is None or found["made_from"] != made_from:
        found = {"made_from": made_from, "asked": 0, "answers": 0, "wrong": 0, "empty": 0, "rows": []}
    if found["asked"] < data.prompts:
        if jax.process_count() > 1:
            raise InputError(
                f"there are no pairs in {path} yet, and only a single process can mine them: start the same command "
                "as one process until training begins, then as many"
            )
        params = load_params("init_from", config.init_from, config.model, tokenizer, checkpoint.name)
        miner = _Miner(config, data, tokenizer, stage, Generator(config.model, params))
        _save_meanwhile(path, found, miner.mine(found, check_stop))
    pairs = sum(len(mistakes) for _, mistakes in found["rows"])
    of_all = f"{found['wrong']:,} of {found['answers']:,} answers of {config.init_from} were wrong"
    if not pairs:
        raise InputError(
            f"data=mined has no pairs for stage {stage + 1}: {of_all} ({found['empty']:,} empty); raise "
            "data.prompts or data.temperature, or take data=needle_pairs"
        )
    print_on_main(
        f"Mined {pairs:,} pairs: {of_all} ({found['empty']:,} empty, the same mistake about a question counts once); "
        f"they are in {path}"
    )


def _made_from(config: RunConfig, data: MinedPairsConfig, tokenizer: Tokenizer, stage: int, checkpoint: Path) -> str:
    """A hash of all that decides the answers."""
    model, of_data = dataclasses.asdict(config.model), dataclasses.asdict(data)
    content = {
        "weights": on_all(lambda: read_manifest(checkpoint)),
        "model": {key: value for key, value in model.items() if key not in NUMERICALLY_NEUTRAL_KEYS},
        "data": {key: value for key, value in of_data.items() if key not in ("workers", "cache_dir")},
        "tokenizer": tokenizer.fingerprint,
        "stage": [stage, config.train.stages[stage].seq_len, config.seed],
    }
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _save_meanwhile(path: Path, found: dict[str, Any], steps: Iterator[None]) -> None:
    """Goes through all steps and writes what they find to the file, now and then and however they end."""
    saved = time.monotonic()
    try:
        for _ in steps:
            if time.monotonic() - saved > _SAVE_S:
                write_json(path, found, indent=None)
                saved = time.monotonic()
    finally:
        write_json(path, found, indent=None)


class _Miner:
    """Asks a model the questions of a stage."""

    def __init__(
        self, config: RunConfig, data: MinedPairsConfig, tokenizer: Tokenizer, stage: int, generator: Generator
    ):
        self._data, self._tokenizer, self._generator = data, tokenizer, generator
        self._seed, self._stage = config.seed, stage
        self._pairs = NeedlePairs(data, tokenizer, config.train.stages[stage].seq_len)

    def mine(self, found: dict[str, Any], check_stop: Callable[[], None]) -> Iterator[None]:
        """Adds to `found` prompt by prompt."""
        display = ProgressDisplay(self._data.prompts, found["asked"], is_main())
        try:
            for number in range(found["asked"], self._data.prompts):
                check_stop()
                prompt = asked_prompt(self._pairs, self._seed, self._stage, number)
                mistakes = self._mistakes(prompt, self._answers(prompt, number), found)
                found["rows"] += [[number, row] for row in self._rows(prompt, mistakes)]
                found["asked"] = number + 1
                display.show(number + 1, "prompts whose questions were asked")
                yield
        finally:
            display.close()

    def _answers(self, prompt: Prompt, number: int) -> list[list[list[int]]]:
        """For each question the sampled answers: token ids, with eos if they ended."""
        data, eos_id = self._data, self._tokenizer.eos_id
        room = data.branch_tokens - max(len(pair.prompt_end) for pair in prompt.pairs)
        most = min(data.max_new_tokens, room)
        asked = [
            [*prompt.ids.tolist(), *pair.prompt_end.tolist()] for pair in prompt.pairs for _ in range(data.samples)
        ]
        seed = int(make_rng(self._seed, Purpose.MINED, self._stage, number, 1).integers(2**31))
        new = generate_sharing_prefix(
            self._generator, asked, max_new_tokens=most, eos_id=eos_id,
            sampling=SamplingParams(temperature=data.temperature, seed=seed),
            batch_size=max(_AT_ONE_TIME // data.samples, 1) * data.samples,
        )  # fmt: skip
        ended = [ids if len(ids) == most else [*ids, eos_id] for ids in new]
        return [ended[i : i + data.samples] for i in range(0, len(ended), data.samples)]

    def _mistakes(
        self, prompt: Prompt, answers: list[list[list[int]]], found: dict[str, Any]
    ) -> list[tuple[int, list[int]]]:
        """The question and the tokens of each wrong answer that a branch holds, none twice; counts all."""
        mistakes: dict[tuple[int, tuple[int, ...]], None] = {}
        for question, (pair, texts) in enumerate(zip(prompt.pairs, answers, strict=True)):
            chosen = pair.chosen.tolist()
            room = self._data.branch_tokens - 2 * (len(pair.prompt_end) - 1) - len(chosen)
            for ids in texts:
                text = self._tokenizer.decode(ids)
                wrong = not is_right(self._tokenizer.decode(chosen), text)
                found["answers"] += 1
                found["wrong"] += wrong
                found["empty"] += wrong and not text.strip()
                if wrong and text.strip() and ids[:room] != chosen[: len(ids[:room])]:
                    mistakes[question, tuple(ids[:room])] = None
        return [(question, list(ids)) for question, ids in mistakes]

    def _rows(self, prompt: Prompt, mistakes: list[tuple[int, list[int]]]) -> list[list[Any]]:
        """The mistakes in as many rows as they take."""
        rows: list[list[Any]] = []
        room = 0
        for question, ids in mistakes:
            need = prompt.pairs[question]._replace(rejected=np.array(ids)).tokens
            if not rows or need > room or len(rows[-1]) == self._data.pairs_per_row:
                rows.append([])
                room = self._data.branch_tokens
            rows[-1].append([question, ids])
            room -= need
        return rows


def is_right(answer: str, text: str) -> bool:
    """Whether a generated text gives the answer: its first number if that is one, else the words up to a full stop."""
    answer, given = (x.partition(".")[0].strip() for x in (answer, text))
    return first_integer(text) == int(answer) if answer.isdigit() else given == answer
