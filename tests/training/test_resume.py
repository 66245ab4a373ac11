"""Resuming a run whose data, seed or batch size is another: it is said, and no row is skipped or repeated unasked."""

import json

import pytest

from mla_jax.config import JsonlDataConfig
from mla_jax.errors import InputError
from tiny import make_config, train


@pytest.fixture
def data(tmp_path):
    path = tmp_path / "data.jsonl"
    path.write_text("".join(json.dumps({"prompt": f"{i}?", "completion": f" {i}!"}) + "\n" for i in range(400)))
    return JsonlDataConfig(tokenizer="needle-bpe", path=str(path))


def config(tmp_path, steps: int, batch_size: int = 8, **changes):
    stages = [{"seq_len": 24, "steps": steps, "batch_size": batch_size}]
    return make_config(tmp_path / "run", stages, checkpoint_every=50, **changes)


def position(tmp_path, step: int) -> dict:
    return json.loads((tmp_path / "run" / "checkpoints" / str(step) / "position" / "metadata").read_bytes())["data"]


def test_another_batch_size_is_said_and_the_next_row_is_next(tmp_path, data, capsys):
    train(config(tmp_path, 3, data=data))
    capsys.readouterr()
    train(config(tmp_path, 4, batch_size=16, data=data))
    assert "at step 3; train.stages.0.batch_size was 8 and is 16" in capsys.readouterr().out
    assert position(tmp_path, 4)["next_row"] == 3 * 8 + 16


def test_another_seed_is_refused_unless_the_data_may_begin_anew(tmp_path, data, capsys):
    train(config(tmp_path, 3, data=data))
    with pytest.raises(InputError, match=r"seed was 0 and is 7.*train\.on_data_change=restart"):
        train(config(tmp_path, 4, data=data, seed=7))
    train(config(tmp_path, 4, data=data, seed=7, on_data_change="restart"))
    assert "; seed was 0 and is 7" in capsys.readouterr().out
    assert position(tmp_path, 4)["next_row"] == 8
    train(config(tmp_path, 5, data=data, seed=7, on_data_change="restart"))  # a requeue goes on
    assert position(tmp_path, 5)["next_row"] == 16


def test_nothing_is_said_where_nothing_changed(tmp_path, data, capsys):
    train(config(tmp_path, 1, data=data))
    train(config(tmp_path, 2, data=data))
    assert capsys.readouterr().out.count("at step 1\n") == 1
