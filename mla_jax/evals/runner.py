"""Runs a task on a model, cell by cell; the results are written as they grow."""

import contextlib
import dataclasses
import hashlib
import itertools
import json
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import jax

from mla_jax.checkpoint.manager import CHECKPOINTS
from mla_jax.checkpoint.manifest import MANIFEST
from mla_jax.checkpoint.run_folder import Run
from mla_jax.data.tokenizer import Tokenizer
from mla_jax.errors import InputError
from mla_jax.evals.answers import Failure
from mla_jax.evals.asking import Outcome, ask
from mla_jax.evals.cells import CORRECT, Cell
from mla_jax.evals.curves import plot_curves
from mla_jax.evals.progress import Progress
from mla_jax.evals.provenance import provenance
from mla_jax.evals.report import format_rates, format_table, plot_heatmap
from mla_jax.evals.results import Results, read_results, require_grid
from mla_jax.evals.task import Params, Task
from mla_jax.files import write_json
from mla_jax.inference.generator import Generator
from mla_jax.model.cache import bytes_per_token

FAILURES_KEPT = 3
"""Wrong answers that are reported for each cell."""


def measure(
    task: Task, generator: Generator, tokenizer: Tokenizer, *, finished: Sequence[Params] = (), progress: bool = False
) -> Iterator[tuple[Cell, list[Failure]]]:
    """Generates and scores the answers to all prompts of a task, one length after another.

    Cells of one length whose answers may be equally long share batches or haystacks.

    Args:
        task: prompts and scoring.
        generator: the model.
        tokenizer: the model's.
        finished: cells of the task to skip.
        progress: show a bar on a terminal, a line now and then elsewhere.

    Yields:
        The scores of a cell as soon as all its prompts are answered, and at most FAILURES_KEPT of its wrong answers.
    """
    left = [cell for cell in task.cells if cell not in finished]
    by_length = itertools.groupby(left, key=lambda cell: (cell["length"], task.max_new_tokens(cell)))
    together = [list(cells) for _, cells in by_length]
    tokens = sum(_tokens_to_read(task, cells) for cells in together)
    shown = Progress(task.name, len(left) * task.samples, tokens, progress)
    with contextlib.closing(shown):
        for cells in together:
            shown.at(cells[0]["length"])
            yield from _of_one_length(task, cells, generator, tokenizer, shown)


def _tokens_to_read(task: Task, cells: list[Params]) -> int:
    """Tokens of the prompts of cells of one length, each haystack counted once."""
    prompts = itertools.product(cells, range(task.samples))
    reads = len(cells) * task.samples if task.haystack is None else len({task.haystack(*prompt) for prompt in prompts})
    return reads * cells[0]["length"]


def _of_one_length(
    task: Task, cells: list[Params], generator: Generator, tokenizer: Tokenizer, progress: Progress
) -> Iterator[tuple[Cell, list[Failure]]]:
    """Scores and wrong answers of cells whose prompts have the same length, and so may share batches or haystacks.

    Cells come in the order in which they are finished.
    """
    outcomes: list[dict[int, Outcome]] = [{} for _ in cells]
    tokens, prompts = _tokens_to_read(task, cells), len(cells) * task.samples
    for found in ask(task, cells, generator, tokenizer):
        for (cell, sample), outcome in found.items():
            outcomes[cell][sample] = outcome
        progress.add(len(found), tokens * len(found) / prompts)
        for cell in dict.fromkeys(cell for cell, _ in found):
            if len(outcomes[cell]) == task.samples:
                yield _finished(task, cells[cell], [outcomes[cell][sample] for sample in range(task.samples)])


def _finished(task: Task, params: Params, outcomes: list[Outcome]) -> tuple[Cell, list[Failure]]:
    """The cell of the outcomes of all its samples, and some of its wrong answers."""
    scores = {name: tuple(float(each.scores[name]) for each in outcomes) for name in outcomes[0].scores}
    haystacks = {}
    if task.haystack is not None:
        haystacks = dict.fromkeys(scores, tuple(task.haystack(params, sample) for sample in range(task.samples)))
    answers = [each.answer for each in outcomes if each.answer is not None]
    measures = {name: tuple(each.measures[name] for each in outcomes) for name in outcomes[0].measures}
    failures = [
        Failure(params, each.prompt.seed, each.prompt.index, each.prompt.answer, each.answer.generated)
        for each in outcomes
        if each.answer is not None and each.scores[CORRECT] < 1
    ]
    return Cell(params, scores, haystacks, tuple(answers), measures), failures[:FAILURES_KEPT]


def evaluate(run: Run, task: Task, out_dir: Path) -> Results:
    """Evaluates a run, writes OUT/TASK.json (`results` says what is in it) and OUT/TASK.png and prints the table.

    An evaluation that is ended early leaves what it has finished in OUT/TASK.json.unfinished, and the same evaluation
    started again goes on from there.

    Args:
        run: a trained or imported model.
        task: prompts and scoring.
        out_dir: a folder, created if missing; older results in it are replaced.

    Raises:
        InputError: the folder cannot be written.
        ValueError: the cells of the task are not a whole grid.
    """
    require_grid(task.cells)
    try:
        out_dir.mkdir(parents=True, exist_ok=True)
    except OSError as e:
        raise InputError(f"could not create {out_dir} ({e.strerror}); name a folder that can be written") from e
    path, plot = out_dir / f"{task.name}.json", out_dir / f"{task.name}.png"
    unfinished = path.with_name(path.name + ".unfinished")
    results = _resume(_empty(run, task), unfinished)
    generator = Generator(run.model, run.params, cache_dtype=task.cache_dtype)
    finished, start = [cell.params for cell in results.cells], time.perf_counter() - results.seconds
    for cell, failures in measure(task, generator, run.tokenizer, finished=finished, progress=True):
        results = dataclasses.replace(
            results,
            seconds=round(time.perf_counter() - start, 1),
            cells=(*results.cells, cell),
            failures=(*results.failures, *failures),
        )
        write_json(unfinished, results.to_json())
    in_order = sorted(results.cells, key=lambda cell: task.cells.index(cell.params))
    places = {json.dumps(cell): place for place, cell in enumerate(task.cells)}
    failures = sorted(results.failures, key=lambda failure: places[json.dumps(failure.params)])
    results = dataclasses.replace(results, cells=tuple(in_order), failures=tuple(failures))
    write_json(path, results.to_json())
    unfinished.unlink(missing_ok=True)
    (plot_heatmap if task.likelihood is None else plot_curves)(
        results.cells,
        plot,
        title=f"{task.title}: {results.model['name']}",
        subtitle=f"step {run.step:,}, {results.model['parameters'] / 1e6:.3g} M parameters, "
        f"{results.model['cache_bytes_per_token']:,} bytes of cache a token",
        trained_lengths=run.trained_lengths,
    )
    what = "correct/n [95 % interval in %]" if task.likelihood is None else "value [95 % interval]"
    rates = format_rates(results.cells)
    print(f"{task.title}: {what}\n\n{format_table(results.cells)}\n" + (f"\n{rates}\n" if rates else ""))
    print(f"Written: {path} and {plot}")
    return results


def _empty(run: Run, task: Task) -> Results:
    """Results without any cell yet."""
    model = {
        "name": run.path.resolve().name,
        "step": run.step,
        "parameters": sum(x.size for x in jax.tree.leaves(run.params)),
        "cache_bytes_per_token": bytes_per_token(run.model, task.cache_dtype or "bfloat16"),
        "trained_lengths": sorted(set(run.trained_lengths)),
        "fingerprint": _fingerprint(run),
        "tokenizer": run.tokenizer.fingerprint,
    }
    return Results(task.name, task.title, task.description, model, provenance(), 0.0, task.config, (), ())


def _fingerprint(run: Run) -> str:
    """A hash of the model's config and of its weights.

    For the latter stands the manifest of a run's checkpoint, which has their checksums; without one (earlier versions
    wrote none) it is of the config alone. The files of a Hugging Face folder are read.
    """
    digest = hashlib.sha256(json.dumps(dataclasses.asdict(run.model)).encode())
    manifest = run.path / CHECKPOINTS / str(run.step) / MANIFEST
    if manifest.is_file():
        digest.update(manifest.read_bytes())
    for path in sorted(run.path.glob("*.safetensors")):
        with path.open("rb") as weights:
            digest.update(hashlib.file_digest(weights, "sha256").digest())
    return digest.hexdigest()[:16]


def _resume(empty: Results, unfinished: Path) -> Results:
    """`empty` with the cells that an interrupted evaluation finished, if model, task and source are the same."""
    try:
        left = read_results(unfinished, finished=False)
    except InputError:  # none, usually
        return empty

    def identity(results: Results) -> tuple:
        source = {key: results.provenance.get(key) for key in empty.provenance if key not in ("date", "command")}
        return results.task, results.model, results.config, source

    if identity(left) != identity(empty) or str(empty.provenance["git_revision"]).endswith("-dirty"):
        return empty
    print(f"{unfinished} has {len(left.cells)} finished cells: going on from there")
    return dataclasses.replace(empty, seconds=left.seconds, cells=left.cells, failures=left.failures)
