"""Passkey retrieval: a number hidden at a known depth of a prompt of a known length, read back by generation.

The format is that of landmark attention (arXiv 2305.16300), which LongLoRA and YaRN report too; an answer is correct
when the first integer in the new tokens is the pass key. Nothing is teacher-forced: the prompt goes through the latent
cache and the model writes on greedily.
"""

import dataclasses
import re
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import jax
from tqdm import tqdm

from mla_jax.checkpoint.run_folder import Run
from mla_jax.config import ModelConfig, PasskeyConfig
from mla_jax.data.needle.generator import passkey_prompt
from mla_jax.data.tokenizer import Tokenizer
from mla_jax.errors import InputError
from mla_jax.evals.provenance import provenance
from mla_jax.evals.report import Cell, format_table, over_depths, plot_heatmap, write_json
from mla_jax.inference.generator import Generator
from mla_jax.model.cache import bytes_per_token

FAILURES_KEPT = 3
"""Failed prompts reported for each cell."""


@dataclass(frozen=True)
class Failure:
    """A wrong answer; `passkey_prompt(tokenizer, length, depth, seed, index)` makes its prompt again."""

    length: int
    depth: float
    seed: int
    index: int
    expected: str
    generated: str


@dataclass(frozen=True)
class PasskeyReport:
    """What was measured on a length x depth grid."""

    config: PasskeyConfig
    cells: tuple[Cell, ...]
    failures: tuple[Failure, ...]
    """At most FAILURES_KEPT of each cell."""

    @property
    def by_length(self) -> list[Cell]:
        """One cell for each length, over all depths."""
        return over_depths(self.cells)

    def to_json(self) -> dict:
        """The part of passkey.json that `evaluate_passkey` measures."""
        return {
            "config": dataclasses.asdict(self.config),
            "by_length": [cell.to_json() for cell in self.by_length],
            "cells": [cell.to_json() for cell in self.cells],
            "failures": [dataclasses.asdict(failure) for failure in self.failures],
        }


def first_integer(text: str) -> int | None:
    """The first run of digits as a number, None without any."""
    found = re.search(r"[0-9]+", text)
    return None if found is None else int(found.group())


def evaluate_passkey(
    config: ModelConfig,
    params: dict,
    tokenizer: Tokenizer,
    grid: PasskeyConfig,
    *,
    progress: bool = False,
) -> PasskeyReport:
    """Passkey accuracy of a model in every cell of a grid.

    Args:
        config: the model.
        params: its parameters, see `transformer.init_params`.
        tokenizer: the model's.
        grid: lengths, depths, prompts a cell and their seed.
        progress: show a bar on a terminal, a line now and then elsewhere.

    Raises:
        InputError: a length that does not fit the model or holds no passkey prompt; found before anything is computed.
    """
    _check(config, tokenizer, grid)
    generator = Generator(config, params, cache_dtype=grid.cache_dtype)
    correct = {(length, depth): 0 for length in grid.lengths for depth in grid.depths}
    failures: list[Failure] = []
    pause = 0.1 if sys.stderr.isatty() else 30.0  # seconds between lines of a log
    total = len(correct) * grid.samples
    with tqdm(total=total, unit=" prompts", disable=not progress, mininterval=pause) as bar:
        for length in grid.lengths:
            bar.set_description(f"passkey at {length} tokens")
            for batch in _batches(length, grid):
                prompts, answers = zip(*(_prompt(tokenizer, length, *place, grid) for place in batch), strict=True)
                new = generator.generate(prompts, max_new_tokens=grid.max_new_tokens, eos_id=tokenizer.eos_id)
                fresh = dict(zip(batch, zip(answers, new, strict=True), strict=True))  # without the padding
                for (depth, sample), (answer, ids) in fresh.items():
                    text = tokenizer.decode(ids)
                    if first_integer(text) == int(answer):
                        correct[length, depth] += 1
                    else:
                        index = _index(length, depth, sample)
                        failures.append(Failure(length, depth, grid.seed, index, answer, text))
                bar.update(len(fresh))
    cells = tuple(Cell(length, depth, grid.samples, right) for (length, depth), right in correct.items())
    return PasskeyReport(grid, cells, tuple(_first_of_each_cell(failures)))


def _check(config: ModelConfig, tokenizer: Tokenizer, grid: PasskeyConfig) -> None:
    """Raises InputError unless every prompt of the grid can be made and answered."""
    for name, values in (("lengths", grid.lengths), ("depths", grid.depths)):
        if len(set(values)) < len(values):
            raise InputError(f"eval.{name} must not repeat, got {values}")
    longest = config.max_position_embeddings - grid.max_new_tokens
    for length in grid.lengths:
        if length > longest:
            raise InputError(
                f"eval.lengths has {length}, but with max_position_embeddings {config.max_position_embeddings} and "
                f"{grid.max_new_tokens} new tokens the longest prompt is {longest} tokens"
            )
    shortest = min(grid.lengths)  # if all prompts of this length can be made, longer ones can be too
    for depth in grid.depths:
        for sample in range(grid.samples):
            _prompt(tokenizer, shortest, depth, sample, grid)


def _batches(length: int, grid: PasskeyConfig) -> Iterator[list[tuple[float, int]]]:
    """(depth, sample) of all prompts of one length in batches of one size, so that one shape is compiled.

    The last batch is filled up by repeating its last prompt.
    """
    places = [(depth, sample) for depth in grid.depths for sample in range(grid.samples)]
    batches = -(-len(places) // grid.batch_size)
    size = -(-len(places) // batches)  # evenly filled: little is computed twice
    for start in range(0, len(places), size):
        batch = places[start : start + size]
        yield batch + batch[-1:] * (size - len(batch))


def _prompt(tokenizer: Tokenizer, length: int, depth: float, sample: int, grid: PasskeyConfig) -> tuple[list[int], str]:
    """Prompt ids and answer of one sample of a cell."""
    return passkey_prompt(tokenizer, length, depth, grid.seed, _index(length, depth, sample))


def _index(length: int, depth: float, sample: int) -> int:
    """A number for each sample of each cell, whatever else is in the grid: cells are independent and repeatable."""
    return ((length * 1001 + round(depth * 1000)) << 20) + sample


def _first_of_each_cell(failures: list[Failure]) -> Iterator[Failure]:
    kept: dict[tuple[int, float], int] = {}
    for failure in failures:
        cell = failure.length, failure.depth
        kept[cell] = kept.get(cell, 0) + 1
        if kept[cell] <= FAILURES_KEPT:
            yield failure


def run_passkey(run: Run, grid: PasskeyConfig, out_dir: Path) -> PasskeyReport:
    """Evaluates a run, writes OUT/passkey.json and OUT/passkey.png and prints the table.

    passkey.json holds:

        task              "passkey"
        model             name, step, parameters, cache_bytes_per_token (16 bits unless configured), trained_lengths
        provenance        date, command, git_revision, hardware, python, jax
        seconds           duration of the evaluation, compilation included
        config            the grid as configured
        by_length, cells  length (tokens), depth (null: all), n, correct, accuracy, interval [low, high] (Wilson 95 %)
        failures          a few wrong answers of each cell: length, depth, seed, index, expected, generated

    Args:
        run: a trained or imported model.
        grid: what to measure.
        out_dir: a folder, created if missing; older results in it are replaced.

    Raises:
        InputError: as `evaluate_passkey`, or the folder cannot be written.
    """
    try:
        out_dir.mkdir(parents=True, exist_ok=True)
    except OSError as e:
        raise InputError(f"could not create {out_dir} ({e.strerror}); name a folder that can be written") from e
    name = run.path.resolve().name
    parameters = sum(x.size for x in jax.tree.leaves(run.params))
    cache_bytes = bytes_per_token(run.model, grid.cache_dtype or "bfloat16")
    start = time.perf_counter()
    report = evaluate_passkey(run.model, run.params, run.tokenizer, grid, progress=True)
    measured = {
        "task": "passkey",
        "model": {
            "name": name,
            "step": run.step,
            "parameters": parameters,
            "cache_bytes_per_token": cache_bytes,
            "trained_lengths": sorted(set(run.trained_lengths)),
        },
        "provenance": provenance(),
        "seconds": round(time.perf_counter() - start, 1),
        **report.to_json(),
    }
    write_json(out_dir / "passkey.json", measured)
    plot_heatmap(
        report.cells,
        out_dir / "passkey.png",
        title=f"Passkey retrieval: {name}",
        subtitle=f"step {run.step:,}, {parameters / 1e6:.3g} M parameters, {cache_bytes:,} bytes of cache a token",
        trained_lengths=run.trained_lengths,
    )
    print("Passkey accuracy: correct/n [Wilson 95 % interval in %] by prompt length and depth of the key\n")
    print(format_table(report.cells))
    print(f"\nWritten: {out_dir / 'passkey.json'} and {out_dir / 'passkey.png'}")
    return report
