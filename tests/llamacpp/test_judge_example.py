"""The judge on a real language model behind llama.cpp: SmolLM2-135M judges nano's answers, and is found to be weak."""

import json

import pytest

from judge_example import ANSWERS, MODEL, judge
from mla_jax.evals.judge.items import read_items

pytest.importorskip("xllamacpp")
pytestmark = pytest.mark.llamacpp


def test_a_weak_judge_is_said_to_be_one(tmp_path):
    if not MODEL.is_file():
        pytest.skip(f"{MODEL} is not there: make test-llamacpp installs it")
    items = read_items(ANSWERS)
    out = tmp_path / "report.json"
    printed = judge(ANSWERS, out, 0)
    report = json.loads(out.read_text())
    exact = sum(item.exact for item in items)
    assert (report["answers"]["n"], report["answers"]["settled_by_exact_match"]) == (len(items), exact)
    assert report["parse_failures"] == {"asked": len(items) + 8 + 18 + 4, "unscored": 0}, "grammars allow nothing else"
    assert report["retest"]["same"]["rate"] > 0.5, "greedy; only batching changes the last digits"
    planted = report["planted"]
    youden = planted["sensitivity"]["rate"] + planted["specificity"]["rate"] - 1
    assert sum(each["called_so"]["n"] for each in planted["by_class"].values()) == 18
    assert youden < 0.8 and planted["kappa"]["value"] < 0.8, "135 M parameters"
    assert "This judge is not shown to be better than guessing" in printed or "A weak judge" in printed
    (usage,) = report["usage"].values()
    assert usage["replies"] == len(items) + 8 + 18 + 2 * 4
    assert usage["input_tokens"] > 100 * usage["replies"] and usage["cost"] == 0
