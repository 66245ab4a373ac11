"""A position in a data set is a row: another batch size goes on there, another order of rows is refused."""

import json
from collections.abc import Iterator

import numpy as np
import pytest

from mla_jax.config import JsonlDataConfig, NeedleDataConfig, PreferenceJsonlConfig, StageConfig
from mla_jax.data.pipeline import Pipeline, make_pipeline
from mla_jax.data.preference.pipeline import make_preference_pipeline
from mla_jax.data.tokenizer import load_tokenizer
from mla_jax.errors import InputError


@pytest.fixture
def path(tmp_path):
    return write(tmp_path / "data.jsonl", 23)


def write(path, count: int):
    records = [{"prompt": "q" * (i % 7), "completion": f"answer {i}"} for i in range(count)]
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def start(path, batch_size: int = 4, seed: int = 0, seq_len: int = 24, stage: int = 0, workers: int = 0) -> Pipeline:
    stages = [StageConfig(seq_len=seq_len, batch_size=batch_size, steps=1, learning_rate=1)] * 2
    data = JsonlDataConfig(tokenizer="bytes", path=str(path), workers=workers)
    return make_pipeline(data, load_tokenizer("bytes"), stages, stage, seed)


def start_needles(seed: int = 0) -> Pipeline:
    data = NeedleDataConfig(tokenizer="needle-bpe", tasks={"single": 1.0}, haystacks={"noise": 1.0})
    stage = StageConfig(seq_len=48, batch_size=4, steps=1, learning_rate=1)
    return make_pipeline(data, load_tokenizer("needle-bpe"), [stage], 0, seed)


def rows(pipeline: Pipeline) -> Iterator[bytes]:
    for batch in pipeline:
        yield from (row.tobytes() for row in batch["tokens"])


def take(pipeline: Pipeline, count: int) -> list[bytes]:
    source = rows(pipeline)
    return [next(source) for _ in range(count)]


def state_after(pipeline: Pipeline, batches: int) -> dict:
    for _ in range(batches):
        next(pipeline)
    state = json.loads(json.dumps(pipeline.get_state()))
    pipeline.close()
    return state


@pytest.mark.parametrize("workers", [0, 1])
def test_another_batch_size_goes_on_at_the_next_row(path, workers):
    whole = take(start(path), 60)  # several epochs
    resumed = start(path, batch_size=5, workers=workers)
    resumed.set_state(state_after(start(path), 3))
    assert take(resumed, 15) == whole[12:27]
    again = start(path, batch_size=2)
    again.set_state(json.loads(json.dumps(resumed.get_state())))
    resumed.close()
    assert take(again, 10) == whole[27:37]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"seed": 7}, r"up to row 12, which was trained on \(seed was 0 and is 7\)"),
        ({"seq_len": 48}, r"seq_len was 24 and is 48; the number of packed rows was \d+ and is"),
    ],
)
def test_another_order_of_rows_is_refused_or_begins_anew(path, change, message):
    state = state_after(start(path), 3)
    with pytest.raises(InputError, match=rf"{message}.*train\.on_data_change=restart"):
        start(path, **change).set_state(state)
    resumed = start(path, **change)
    resumed.set_state(state, restart=True)
    assert take(resumed, 8) == take(start(path, **change), 8)
    kept = start(path)
    kept.set_state(state, restart=True)  # nothing has changed
    assert take(kept, 4) == take(start(path), 16)[12:]


def test_another_file_is_another_order_and_a_copy_is_not(path, tmp_path):
    state = state_after(start(path), 3)
    copy = tmp_path / "copy.jsonl"
    copy.write_bytes(path.read_bytes())
    start(copy).set_state(state)
    with pytest.raises(InputError, match="the CRC-32 of the documents' lengths was"):
        start(write(path, 24)).set_state(state)


def test_at_the_first_row_of_a_stage_anything_may_have_changed(path):
    state = json.loads(json.dumps(start(path).get_state()))
    resumed = start(path, seed=7, batch_size=2)
    resumed.set_state(state)
    assert take(resumed, 4) == take(start(path, seed=7), 4)


def test_needles_never_repeat_so_they_go_on_under_any_change(path):
    needles = start_needles()
    state = state_after(needles, 3)
    resumed = start_needles(seed=7)
    resumed.set_state(state)
    whole = take(start_needles(seed=7), 16)
    assert take(resumed, 4) == whole[12:]
    changed = start(path)
    changed.set_state(state)  # another kind of data begins at its first row
    assert take(changed, 4) == take(start(path), 4)
    back = start_needles()
    back.set_state(state_after(start(path), 3))
    assert take(back, 4) == take(start_needles(), 4)


def test_positions_of_earlier_versions_count_batches(path):
    resumed = start(path)
    resumed.set_state({"next_batch": 3})
    np.testing.assert_array_equal(take(resumed, 4), take(start(path), 16)[12:])


def start_pairs(path, batch_size: int = 4, seed: int = 0, branch_tokens: int = 16) -> Pipeline:
    data = PreferenceJsonlConfig(tokenizer="bytes", path=str(path), branch_tokens=branch_tokens)
    stage = StageConfig(seq_len=40, batch_size=batch_size, steps=1, learning_rate=1)
    return make_preference_pipeline(data, load_tokenizer("bytes"), [stage], 0, seed)


@pytest.fixture
def pairs(tmp_path):
    records = [{"prompt": f"say {i}", "chosen": f"{i}", "rejected": f"{i + 1}"} for i in range(23)]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    return tmp_path / "pairs.jsonl"


def test_pairs_go_on_where_they_were(pairs):
    whole = take(start_pairs(pairs), 40)
    resumed = start_pairs(pairs)
    resumed.set_state(state_after(start_pairs(pairs), 3))
    assert take(resumed, 20) == whole[12:32]


@pytest.mark.parametrize(("change", "named"), [({"seed": 1}, "seed was 0 and is 1"), ({"batch_size": 5}, "batch_size")])
def test_pairs_in_another_order_are_refused_or_begun_anew(pairs, change, named):
    state, other = state_after(start_pairs(pairs), 3), start_pairs(pairs, **change)
    with pytest.raises(InputError, match=rf"up to batch 3, .*{named}.*train\.on_data_change=restart"):
        other.set_state(state)
    other.set_state(state, restart=True)
    assert take(other, 5) == take(start_pairs(pairs, **change), 5)
    start_pairs(pairs, **change).set_state(state_after(start_pairs(pairs), 0))  # nothing was trained on yet


def test_pairs_of_another_file_are_refused(pairs):
    state = state_after(start_pairs(pairs), 2)
    pairs.write_text(pairs.read_text() + json.dumps({"prompt": "say", "chosen": "a", "rejected": "b"}) + "\n")
    with pytest.raises(InputError, match="CRC-32 of the pairs' lengths"):
        start_pairs(pairs).set_state(state)
