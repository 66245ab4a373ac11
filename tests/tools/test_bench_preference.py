"""The benchmark of steps on pairs: its three ways compute the same."""

import json

import numpy as np
import pytest

from mla_jax.errors import UsageError
from tiny import MODEL
from tools.bench import preference, steps
from tools.bench.steps import Shape


def test_three_ways_find_the_same_loss_and_gradients(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(steps, "SECONDS", 0.0)
    small = (
        "model.num_hidden_layers=1 model.hidden_size=64 model.intermediate_size=64 model.num_attention_heads=2".split()
    )
    arguments = ["model=nano", *small, "--shapes", "2x96", "--answer", "16", "--out", str(tmp_path / "found.json")]
    monkeypatch.setattr("sys.argv", ["preference", *arguments])
    preference.main()
    found = json.loads((tmp_path / "found.json").read_text())
    rows = {row["way"]: row for row in found["rows"]}
    assert list(rows) == ["one pass", "two passes at once", "two passes in turn"]
    assert len({round(row["loss"], 5) for row in rows.values()}) == 1 and rows["one pass"]["loss"] != np.log(2)
    for way in ("two passes at once", "two passes in turn"):
        assert rows[way]["difference"] < 1e-4 and abs(1 - rows[way]["cosine"]) < 1e-6
    fastest = min(row["seconds"] for way, row in rows.items() if way != "one pass")
    assert rows["one pass"]["times"] == pytest.approx(fastest / rows["one pass"]["seconds"])
    out = capsys.readouterr().out
    assert "| 2 x 96, two passes in turn, full" in out and "tokens/s counts each token" in out and "failed" not in out


def test_other_gradients_are_told_apart():
    grads = {"a": np.array([3.0, 0.0]), "b": np.array([[4.0]])}
    others = {"a": np.array([3.0, 0.0]), "b": np.array([[0.0]])}
    assert preference.difference(grads, grads) == {"cosine": 1.0, "difference": 0.0}
    found = preference.difference(grads, others)
    assert found["cosine"] == pytest.approx(0.6) and found["difference"] == pytest.approx(4 / 3)


def test_answers_must_leave_room_for_a_prompt():
    with pytest.raises(UsageError, match="1 x 32 leaves no room for a prompt and two answers of 16 tokens"):
        preference.random_pairs(MODEL, Shape(1, 32), 16)
