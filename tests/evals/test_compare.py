"""Differences of two results: Newcombe's published interval, coverage of paired ones, and the command."""

import dataclasses
import json
import subprocess
import sys

import numpy as np
import pytest
from scipy.stats import ttest_ind, ttest_rel

from mla_jax.errors import InputError
from mla_jax.evals.cells import Cell, Rate
from mla_jax.evals.compare import are_paired, compare, difference_interval, format_comparison
from mla_jax.evals.results import Results
from mla_jax.evals.stats import wilson_interval


def rate(correct: int, n: int) -> Rate:
    return Rate(n, correct / n, wilson_interval(correct, n))


def results(scores: dict[int, dict[str, tuple]], haystacks=None, **changes) -> Results:
    cells = tuple(
        Cell({"length": length, "question": "all"}, named, dict.fromkeys(named, haystacks) if haystacks else {})
        for length, named in scores.items()
    )
    model = {"name": "a", "step": 1, "trained_lengths": [], "tokenizer": "t"}
    made = Results("hops", "Hops", "one after another", model, {}, 1.0, {"seed": 1}, cells, ())
    return dataclasses.replace(made, **changes)


def test_the_published_interval_of_independent_proportions():
    """Newcombe 1998, Statistics in Medicine 17, p. 873, table II: 56/70 - 48/80, method 10."""
    low, high = difference_interval(rate(48, 80), rate(56, 70))
    assert (round(low, 4), round(high, 4)) == (0.0524, 0.3339)


def test_the_ends_are_no_further_than_one_and_nothing_is_certain():
    assert difference_interval(rate(0, 3), rate(3, 3))[1] == 1.0
    low, high = difference_interval(rate(5, 5), rate(5, 5))
    assert low < 0 < high


def test_pairs_narrow_the_interval_and_it_covers_the_truth():
    """Pairs of answers that agree more often than not, with true rates 0.6 and 0.7, in haystacks of 4."""
    rng = np.random.default_rng(0)
    covered, widths, unpaired = 0, [], []
    for _ in range(300):
        ability = np.repeat(rng.normal(size=50), 4)
        threshold = ability + rng.normal(size=200)
        one, other = (
            tuple((threshold + 0.4 * rng.normal(size=200) < z * np.sqrt(2.16)).astype(int).tolist())
            for z in (0.2533, 0.5244)
        )
        haystacks = tuple(range(50)) * 4
        haystacks = tuple(sorted(haystacks))
        before, after = (results({64: {"correct": x}}, haystacks) for x in (one, other))
        (paired,) = compare(before, after)
        (apart,) = compare(before, dataclasses.replace(after, config={"seed": 2}))
        covered += paired.interval[0] <= 0.1 <= paired.interval[1]
        widths.append(paired.interval[1] - paired.interval[0])
        unpaired.append(apart.interval[1] - apart.interval[0])
    assert covered >= 0.92 * 300
    assert np.mean(widths) < 0.7 * np.mean(unpaired)


def test_all_scores_at_each_common_length_and_in_all():
    before = results({64: {"correct": (1, 0), "made_up": (0, 1)}, 128: {"correct": (0, 0), "made_up": (1, 1)}})
    after = results({128: {"correct": (1, 0), "made_up": (0, 1)}, 256: {"correct": (1, 1), "made_up": (0, 0)}})
    found = compare(before, after)
    assert [(d.score, d.length, d.before.rate, d.after.rate, d.difference) for d in found] == [
        ("correct", 128, 0, 0.5, 0.5),
        ("made_up", 128, 1, 0.5, -0.5),
    ]
    whole = compare(before, before)
    assert [(d.score, d.length) for d in whole] == [(s, n) for n in (64, 128, None) for s in ("correct", "made_up")]
    assert all(d.difference == 0 for d in whole)
    table = format_comparison(whole)
    assert len({len(line) for line in table.splitlines()}) <= 3 and "made up" in table and "all" in table


@pytest.mark.parametrize("same", [True, False])
def test_measures_are_compared_as_students_t_does(same):
    rng = np.random.default_rng(0)
    one, other = rng.normal(3, 1, 20), rng.normal(3, 1, 20)
    other = one + 0.1 * other
    before, after = (
        dataclasses.replace(
            made := results({64: {"correct": (1,) * 20}}, config={"seed": seed}),
            cells=(dataclasses.replace(made.cells[0], measures={"nats": tuple(values.tolist())}),),
        )
        for seed, values in ((1, one), (1 if same else 2, other))
    )
    _, found = compare(before, after)
    assert (found.score, found.difference) == ("nats", pytest.approx(other.mean() - one.mean()))
    if same:
        expected = ttest_rel(other, one).confidence_interval(0.95)
    else:
        expected = ttest_ind(other, one, equal_var=False).confidence_interval(0.95)
    assert found.interval == pytest.approx((expected.low, expected.high), abs=1e-9 if same else 0.02)
    assert "nats" in format_comparison([found]) and found.to_json()["before"]["mean"] == round(one.mean(), 6)


def test_what_makes_prompts_the_same():
    one = results({64: {"correct": (1, 0)}})
    assert are_paired(one, one) and are_paired(one, dataclasses.replace(one, config={"seed": 1, "batch_size": 3}))
    assert not are_paired(one, dataclasses.replace(one, config={"seed": 2}))
    assert not are_paired(one, dataclasses.replace(one, model=one.model | {"tokenizer": "u"}))
    old = dataclasses.replace(one, model={"step": 1})
    assert not are_paired(old, old), "of before tokenizers were written"
    assert not are_paired(one, results({64: {"correct": (1, 0, 1)}}))


def test_what_cannot_be_compared():
    one = results({64: {"correct": (1,)}})
    with pytest.raises(InputError, match="results of hops and of skips cannot be compared"):
        compare(one, dataclasses.replace(one, task="skips"))
    with pytest.raises(InputError, match="no length of prompts in common"):
        compare(one, results({128: {"correct": (1,)}}))


def command(*arguments, **options):
    return subprocess.run(
        [sys.executable, "-m", "tools.compare_runs", *map(str, arguments)], capture_output=True, text=True, **options
    )


def test_the_command_prints_and_writes(tmp_path):
    for name, correct in (("a", (1, 0, 0, 0)), ("b", (1, 1, 1, 0))):
        (tmp_path / name / "eval").mkdir(parents=True)
        made = results({64: {"correct": correct, "made_up": tuple(1 - x for x in correct)}})
        (tmp_path / name / "eval" / "hops.json").write_text(json.dumps(made.to_json()))
    ran = command(tmp_path / "a", tmp_path / "b", "--task", "hops", "--json", tmp_path / "compare.json", check=True)
    assert "the same prompts" in ran.stdout and "+50.0 [" in ran.stdout and "compare.json" in ran.stdout
    written = json.loads((tmp_path / "compare.json").read_text())
    assert written["before"]["made_up"] == {"n": 4, "rate": 0.75, "interval": [0.300642, 0.954413]}
    assert written["after"]["made_up"]["rate"] == 0.25 and written["paired"] is True
    assert [d["difference"] for d in written["differences"]] == [0.5, -0.5]
    failed = command(tmp_path / "a", tmp_path / "b", "--task", "skips")
    assert failed.returncode == 1 and len(failed.stderr.splitlines()) == 1
    assert "has no results of skips; evaluate it first" in failed.stderr
