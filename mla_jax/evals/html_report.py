"""RUN/eval/report.html: all results of a run on one page without scripts, which opens from disk without a network."""

import dataclasses
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jinja2
from matplotlib import colormaps
from matplotlib.colors import to_hex

from mla_jax.evals.answers import Answer
from mla_jax.evals.cells import CORRECT, Cell
from mla_jax.evals.report import (
    COLORS,
    format_interval,
    format_percent,
    format_value,
    grid,
    measure_title,
    measured,
)
from mla_jax.evals.results import Results, results_in
from mla_jax.files import atomic_file, locked
from mla_jax.lengths import format_length

REPORT = "report.html"
WRONG_SHOWN = 3
"""Wrong answers of a cell that are shown."""
_LONGEST_TEXT = 1000
"""Characters of a question or an answer that are shown."""
_NEUTRAL = "#dfe5ec"
"""Color of squares whose value is no share."""
_TEMPLATE = Path(__file__).with_name("report.html.jinja")


@dataclasses.dataclass(frozen=True)
class Square:
    """A cell of a heatmap."""

    rate: str
    counts: str
    interval: str
    color: str
    ink: str


@dataclasses.dataclass(frozen=True)
class Column:
    """A length of prompts."""

    text: str
    note: str


@dataclasses.dataclass(frozen=True)
class Row:
    """A value of the other parameter, or the total."""

    title: str
    squares: list[Square | None]
    """One for each length; None where the cell does not have the score."""


@dataclasses.dataclass(frozen=True)
class Heatmap:
    """A score of all cells."""

    caption: str
    row_title: str
    columns: list[Column]
    rows: list[Row]


def report_on(folder: Path) -> Path:
    """Writes FOLDER/report.html about all results in the folder, of which there is one at least; returns its path.

    Of evaluations that end together the last to write has the results of all.

    Raises:
        InputError: results that cannot be read, or a file that cannot be written.
    """
    path = folder / REPORT
    with locked(path):
        write_report(results_in(folder), path)
    return path


def write_report(results: Sequence[Results], path: Path) -> None:
    """Writes the page about results, at least one, of one model.

    Raises:
        InputError: the file cannot be written.
    """
    environment = jinja2.Environment(
        autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined
    )
    template = environment.from_string(_TEMPLATE.read_text(encoding="utf-8"))
    newest = max(results, key=lambda each: str(each.provenance.get("date", ""))).model
    page = template.render(
        title=f"Evaluation of {newest['name']}",
        subtitle=", ".join(_model(newest)),
        colors=[to_hex(colormaps[COLORS](i / 8)) for i in range(9)],
        tasks=[_task(each) for each in results],
    )
    with atomic_file(path) as partial:
        partial.write_text(page, encoding="utf-8")


def _model(model: dict[str, Any]) -> Iterator[str]:
    yield f"step {model['step']:,}"
    if "parameters" in model:
        yield f"{model['parameters'] / 1e6:.3g} M parameters"
    if "cache_bytes_per_token" in model:
        yield f"{model['cache_bytes_per_token']:,} bytes of KV cache a token"
    if model.get("trained_lengths"):
        yield f"trained at up to {max(model['trained_lengths']):,} tokens"


def _task(results: Results) -> dict[str, Any]:
    """Values of the template for a task."""
    total, lengths = results.total, [cell.length for cell in results.by_length]
    return {
        "id": results.task,
        "title": results.title,
        "description": results.description,
        "step": f"{results.model['step']:,}",
        "date": str(results.provenance.get("date", ""))[:10],
        "lengths": ", ".join(map(format_length, lengths)),
        "lines": [*_lines(total)],
        "grids": [_heatmap(results, name) for name in (*total.means, *total.all_rates)],
        "answered": any(cell.answers for cell in results.cells) or len(results.failures) > 0 or not total.means,
        "failures": [group for cell in results.cells if (group := _wrong(results, cell))["failures"]],
        "provenance": [*_provenance(results)],
        "config": [(key, _text(value)) for key, value in results.config.items()],
    }


def _lines(total: Cell) -> Iterator[dict[str, str]]:
    """The rows of a task in the table of all tasks."""
    for name, mean in total.means.items():
        middle, low, high = measured(name, mean)
        interval = f"{low:.4g} to {high:.4g}"
        yield {"score": measure_title(name), "rate": f"{middle:.4g}", "interval": interval, "n": f"{mean.n:,}"}
    for name, rate in total.all_rates.items():
        value, interval = format_percent(rate.rate), format_interval(rate)
        yield {"score": _words(name), "rate": value, "interval": interval, "n": f"{rate.n:,}"}


def _provenance(results: Results) -> Iterator[tuple[str, Any]]:
    names = {"git_revision": "commit", "jax": "JAX", "python": "Python"}
    for key, value in results.provenance.items():
        yield names.get(key, key), _text(value)
    yield "duration", f"{results.seconds:,.0f} s, compilation included"
    for key, value in results.model.items():
        yield f"model: {_words(key)}", _text(value)


def _heatmap(results: Results, score: str) -> Heatmap:
    lengths, name, values, cells = grid(results.cells)
    trained = max(results.model.get("trained_lengths") or [0])
    return Heatmap(
        caption=f"{results.title}, {measure_title(score)}, by {name} and tokens of the prompt",
        row_title=name,
        columns=[Column(format_length(n), "beyond training" if 0 < trained < n else "") for n in lengths],
        rows=[
            Row(format_value(name, value), [_square(cells[length, value], score) for length in lengths])
            for value in values
        ],
    )


def _square(cell: Cell, score: str) -> Square | None:
    if score in cell.measures:
        middle, low, high = measured(score, cell.means[score])
        return Square(f"{middle:.4g}", f"of {cell.n}", f"{low:.4g} to {high:.4g}", _NEUTRAL, _ink(_NEUTRAL))
    rate = cell.all_rates.get(score)
    if rate is None:
        return None
    color = to_hex(colormaps[COLORS](rate.rate))
    whole = score == CORRECT and isinstance(cell.correct, int)  # where answers are right or wrong
    counts = f"{cell.correct}/{cell.n}" if whole else f"of {rate.n}"
    return Square(format_percent(rate.rate), counts, format_interval(rate), color, _ink(color))


def _ink(color: str) -> str:
    """Black or white, whichever has more contrast with the color (WCAG 2.2, relative luminance)."""
    channels = [int(color[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    luminance = 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]
    return "#000000" if (luminance + 0.05) ** 2 > 1.05 * 0.05 else "#ffffff"


def _wrong(results: Results, cell: Cell) -> dict[str, Any]:
    """The first wrong answers of a cell; `failures` are the same ones, with what makes their prompts again."""
    answers = [answer for answer, right in zip(cell.answers, cell.scores[CORRECT], strict=False) if right < 1]
    failures = [failure for failure in results.failures if failure.params == cell.params]
    if not answers:  # of results before version 3
        answers = [Answer("", failure.expected, (), failure.generated) for failure in failures]
    sources = [f"{failure.seed}, {failure.index}" for failure in failures]
    sources += [""] * (len(answers) - len(sources))
    shown = [
        {
            "question": _shortened(answer.question),
            "expected": _shortened(answer.expected),
            "generated": _shortened(answer.generated),
            "near": _shortened(", ".join(answer.near)),
            "source": source,
        }
        for answer, source in zip(answers[:WRONG_SHOWN], sources, strict=False)
    ]
    wrong = sum(right < 1 for right in cell.scores[CORRECT])
    (name,) = cell.params.keys() - {"length"}
    where = f"{format_length(cell.length)} tokens, {name} {format_value(name, cell.params[name])}"
    return {
        "title": f"{where}: {wrong} wrong" + (f", the first {len(shown)}" if len(shown) < wrong else ""),
        "failures": shown,
    }


def _shortened(text: str) -> str:
    """The beginning of a text, in one line: answers may be little but line breaks."""
    text = text.replace("\n", "\N{DOWNWARDS ARROW WITH CORNER LEFTWARDS}")
    return text if len(text) <= _LONGEST_TEXT else text[:_LONGEST_TEXT] + " ..."


def _text(value: Any) -> str:
    return ", ".join(map(str, value)) if isinstance(value, list) else "none" if value is None else str(value)


def _words(name: str) -> str:
    return name.replace("_", " ")
