"""The progress of an evaluation: what is counted, the lines of a log, and the bar of a terminal."""

import io
import re
import sys

import pytest

from key_reader import TOKENIZER, KeyReader
from mla_jax.config import MultikeyConfig, PasskeyConfig
from mla_jax.evals import progress, runner
from mla_jax.evals.multikey import multikey_task
from mla_jax.evals.passkey import passkey_task
from mla_jax.evals.progress import Progress
from tiny import MODEL


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.fixture
def clock(monkeypatch):
    """The seconds that have passed, to be set."""
    seconds = [100.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: seconds[0])
    return seconds


def test_a_log_gets_a_line_now_and_then_with_the_time_that_is_left(clock, capsys):
    shown = Progress("ruler", 8, 4000)
    shown.at(500)
    for seconds in (110, 129, 131, 150, 165, 220):
        clock[0] = seconds
        shown.add(1, 500)
    shown.close()
    lines = capsys.readouterr().err.splitlines()
    assert lines == [
        "ruler at 500 tokens: 3/8 prompts, 38 % of the tokens in 00:31, about 00:51 left",
        "ruler at 500 tokens: 5/8 prompts, 62 % of the tokens in 01:05, about 00:39 left",
        "ruler at 500 tokens: 6/8 prompts, 75 % of the tokens in 02:00, about 00:40 left",
    ]


def test_a_terminal_gets_a_bar(monkeypatch):
    monkeypatch.setattr(sys, "stderr", terminal := Terminal())
    shown = Progress("ruler", 2, 2000)
    shown.at(500)
    shown.add(1, 1000)
    shown.close()
    assert re.search(r"ruler at 500 tokens: +50%.*1.00k/2.00k \[\d\d:\d\d<\d\d:\d\d", terminal.getvalue())


def test_nothing_is_shown_unless_asked_for(clock, capsys):
    shown = Progress("ruler", 2, 2000, shown=False)
    clock[0] += 1000
    shown.add(1, 1000)
    shown.close()
    assert capsys.readouterr() == ("", "")


class Counted(Progress):
    made: "list[Counted]" = []  # noqa: RUF012

    def __init__(self, task, prompts, tokens, shown):
        super().__init__(task, prompts, tokens, shown)
        self.expected, self.prompts, self.tokens = (prompts, tokens), 0, 0.0
        self.made.append(self)

    def add(self, prompts, tokens):
        self.prompts, self.tokens = self.prompts + prompts, self.tokens + tokens


@pytest.mark.parametrize(
    ("task", "reads"),
    [
        (passkey_task(MODEL, TOKENIZER, PasskeyConfig(lengths=[96, 192], depths=[0.5], samples=3)), 3 * 96 + 3 * 192),
        (
            multikey_task(MODEL, TOKENIZER, MultikeyConfig(lengths=[128, 192], keys=[2], samples=4, questions=2)),
            2 * 128 + 2 * 192,
        ),
    ],
)
def test_tokens_are_counted_once_a_haystack(task, reads, monkeypatch):
    monkeypatch.setattr(runner, "Progress", Counted)
    reader = KeyReader(lambda key, numbers: "1")
    if task.haystack is None:
        reader.generate = lambda prompts, **_: [[1] for _ in prompts]
    list(runner.measure(task, reader, TOKENIZER))
    counted = Counted.made.pop()
    assert counted.expected == (len(task.cells) * task.samples, reads)
    assert (counted.prompts, round(counted.tokens)) == counted.expected
