"""Batches: what is in them, and that nothing but the position in the data decides which comes next."""

import concurrent.futures
import contextlib
import dataclasses
import json
import multiprocessing
import time

import numpy as np
import pytest
import tokenizers

from mla_jax.config import JsonlDataConfig, NeedleDataConfig, StageConfig
from mla_jax.data.jsonl import load_documents
from mla_jax.data.pipeline import Pipeline, make_pipeline
from mla_jax.data.tokenizer import Tokenizer, load_tokenizer
from mla_jax.errors import InputError, UsageError

TOKENIZER = load_tokenizer("needle-bpe")
STAGES = [
    StageConfig(seq_len=48, batch_size=4, steps=1, learning_rate=1),
    StageConfig(
        seq_len=96,
        batch_size=2,
        steps=1,
        learning_rate=1,
        previous_fraction=0.3,
        position_skip_fraction=0.5,
        position_skip_max=1000,
    ),
]
CHAT_STAGE = StageConfig(seq_len=24, batch_size=4, steps=1, learning_rate=1)
DTYPES = {"tokens": "int32", "targets": "int32", "weights": "float32", "answers": "bool", "positions": "int32"}


@pytest.fixture
def start(tmp_path):
    """Makes pipelines by the kind of data and ends their processes."""
    path = tmp_path / "data.jsonl"
    records = [{"prompt": "q" * (i % 7), "completion": f"answer {i}"} for i in range(23)]
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    started = []

    def make(kind: str, workers: int = 0, stage: int = 1, seed: int = 0, rows_of=np.arange) -> Pipeline:
        if kind == "needle":
            data = NeedleDataConfig(
                tokenizer="needle-bpe",
                tasks={"single": 1.0, "multi_key": 1.0},
                haystacks={"noise": 1.0, "words": 1.0},
                workers=workers,
                lm_loss_weight=0.5,
            )
            pipeline = make_pipeline(data, TOKENIZER, STAGES, stage, seed, rows_of)
        else:
            data = JsonlDataConfig(tokenizer="bytes", path=str(path), workers=workers)
            pipeline = make_pipeline(data, load_tokenizer("bytes"), [CHAT_STAGE] * 2, stage, seed, rows_of)
        started.append(pipeline)
        return pipeline

    make.path = str(path)
    yield make
    for pipeline in started:
        pipeline.close()


def _take(pipeline: Pipeline, count: int) -> list[dict]:
    return [next(pipeline) for _ in range(count)]


def _same(left: list[dict], right: list[dict]) -> bool:
    return len(left) == len(right) and all(
        a.keys() == b.keys() and all(np.array_equal(a[key], b[key]) for key in a)
        for a, b in zip(left, right, strict=True)
    )


@pytest.mark.parametrize("kind", ["needle", "jsonl"])
def test_the_layout_of_batches(start, kind):
    for batch in _take(start(kind), 6):
        segmented = {"segments": "int32"} if kind == "jsonl" else {}
        assert {key: str(x.dtype) for key, x in batch.items()} == DTYPES | segmented
        assert len({x.shape for x in batch.values()}) == 1
        batch.setdefault("segments", np.ones_like(batch["tokens"]))
        same = batch["segments"][:, 1:] == batch["segments"][:, :-1]
        learned = batch["weights"] > 0
        assert not learned[:, -1].any() and learned.any(axis=1).all()
        assert not (learned[:, :-1] & ~same).any()  # never across documents
        assert (batch["targets"][:, :-1] == batch["tokens"][:, 1:])[learned[:, :-1]].all()
        assert not learned[batch["segments"] == 0].any()


@pytest.mark.parametrize("kind", ["needle", "jsonl"])
def test_a_process_makes_its_own_rows_as_any_other_would(start, kind):
    whole = _take(start(kind), 6)  # of both stages' sizes
    for half in (0, 1):

        def rows_of(size, half=half):
            return np.arange(size).reshape(2, -1)[half]

        own = [{key: x[rows_of(len(x))] for key, x in batch.items()} for batch in whole]
        assert _same(_take(start(kind, rows_of=rows_of), 6), own)


@pytest.mark.parametrize("kind", ["needle", "jsonl"])
def test_stages_seeds_and_batches_differ(start, kind):
    first = _take(start(kind, stage=0), 3)
    assert not _same(first[:1], first[1:2])
    assert not _same(first, _take(start(kind, stage=0, seed=1), 3))
    assert not _same(first, _take(start(kind, stage=1), 3))
    assert _same(first, _take(start(kind, stage=0), 3))


@pytest.mark.parametrize(("kind", "workers"), [("needle", 2), ("jsonl", 1)])
def test_workers_change_nothing_and_their_position_resumes_without_them(start, kind, workers):
    whole = _take(start(kind), 12)
    pipeline = start(kind, workers)
    assert _same(_take(pipeline, 5), whole[:5])
    alone = start(kind)
    alone.set_state(json.loads(json.dumps(pipeline.get_state())))
    assert _same(_take(alone, 4), whole[5:9])


def test_going_back_under_workers_that_are_ahead(start):
    pipeline = start("needle", workers=1)
    first = _take(pipeline, 3)
    pipeline.set_state({"next_batch": 1})
    assert pipeline.get_state()["next_batch"] == 1
    assert _same(_take(pipeline, 2), first[1:])


@pytest.mark.parametrize("seq_len", [128, 8192], ids=["small batches", "batches larger than a pipe"])
def test_after_a_worker_has_died_the_same_batch_comes_next(seq_len):
    data = NeedleDataConfig(tokenizer="needle-bpe", tasks={"passkey": 1.0}, haystacks={"noise": 1.0}, workers=1)
    stage = StageConfig(seq_len=seq_len, batch_size=4, steps=1, learning_rate=1)
    whole = _take(make_pipeline(dataclasses.replace(data, workers=0), TOKENIZER, [stage], 0, 0), 50)
    with contextlib.closing(make_pipeline(data, TOKENIZER, [stage], 0, 0)) as pipeline:
        taken = _take(pipeline, 1)
        time.sleep(1)  # the worker gets ahead
        (worker,) = multiprocessing.active_children()
        worker.kill()
        with pytest.raises(InputError, match="worker process died"):
            for _ in range(50):
                taken += _take(pipeline, 1)
        taken += _take(pipeline, 1)
    assert _same(taken, whole[: len(taken)])


def test_after_ctrl_c_the_same_batch_comes_next(start, monkeypatch):
    whole = _take(start("needle"), 3)
    pipeline = start("needle")
    taken = _take(pipeline, 1)
    with monkeypatch.context() as patch:
        patch.setattr(concurrent.futures.Future, "result", _interrupted)
        with pytest.raises(KeyboardInterrupt):
            next(pipeline)
    assert _same(taken + _take(pipeline, 2), whole)


def _interrupted(*_) -> None:
    raise KeyboardInterrupt


def test_closing_ends_the_workers(start):
    pipeline = start("needle", workers=2)
    next(pipeline)
    assert len(multiprocessing.active_children()) == 2
    pipeline.close()
    assert not multiprocessing.active_children()


def test_earlier_lengths_stay_in_the_mix(start):
    shapes = [batch["tokens"].shape for batch in _take(start("needle"), 200)]
    assert set(shapes) == {(4, 48), (2, 96)}
    assert 35 < shapes.count((4, 48)) < 90


def test_positions_skip_in_some_batches(start):
    batches = _take(start("needle"), 200)
    plain = np.arange(96)
    skipping = [b for b in batches if not (b["positions"] == plain[: b["positions"].shape[1]]).all()]
    assert 60 < len(skipping) < 140
    jumps = np.concatenate([(np.diff(b["positions"], axis=1) - 1).ravel() for b in skipping])
    assert jumps.min() == 0
    for batch in skipping:
        inner = (np.diff(batch["positions"], axis=1) > 1).sum(axis=1)
        assert inner.max() <= 3 and batch["positions"].min() >= 0
        assert batch["positions"].max() <= 95 + 1000  # the longest position of the stage
    totals = np.concatenate([b["positions"][:, -1] - b["positions"].shape[1] + 1 for b in skipping])
    assert totals.max() > 300 and np.mean(totals < 32) > 0.3  # log-uniform


def test_the_first_stage_has_no_skips(start):
    batch = next(start("needle", stage=0))
    assert (batch["positions"] == np.arange(48)).all()


def test_too_short_a_stage_fails_at_once():
    data = NeedleDataConfig(tokenizer="needle-bpe", tasks={"passkey": 1.0}, haystacks={"noise": 1.0})
    with pytest.raises(UsageError, match="48 tokens are too short .* shortest possible .* is 77"):
        make_pipeline(data, TOKENIZER, STAGES, 0, 0)


def test_packed_rows_are_whole_documents_and_an_epoch_has_each_once(start):
    documents = load_documents(start.path, load_tokenizer("bytes"))
    expected = sorted(documents[i][0].tolist() for i in range(23))
    learned = {tuple(ids): mask.sum() for ids, mask in (documents[i] for i in range(23))}
    rows = [
        [(batch[key][row]) for key in ("tokens", "segments", "positions", "weights")]
        for batch in _take(start("jsonl"), 40)
        for row in range(4)
    ]
    found, epochs = [], []
    for tokens, segments, positions, weights in rows:
        for segment in range(1, segments.max() + 1):
            here = segments == segment
            assert (positions[here] == np.arange(here.sum())).all()
            assert weights[here].sum() == learned[tuple(tokens[here])]
            found.append(tokens[here].tolist())
        if len(found) == len(expected):
            epochs.append(found)
            found = []
    assert len(epochs) >= 3
    assert all(sorted(epoch) == expected for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2]


def test_the_accuracy_counts_what_is_said_and_not_how_it_ends(tmp_path):
    """In chats the end of turn is no part of the answer, in completions <eos> is none; all of it is learned."""
    path = tmp_path / "data.jsonl"
    chat = [
        {"role": "user", "content": "5?"},
        {"role": "assistant", "content": "a b."},
        {"role": "user", "content": "6"},
        {"role": "assistant", "content": "c\n<think>"},
    ]
    path.write_text(
        "".join(json.dumps(record) + "\n" for record in ({"messages": chat}, {"prompt": "q", "completion": " d, e"}))
    )
    template = (
        "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    bytes_ = load_tokenizer("bytes")
    backend = tokenizers.Tokenizer.from_str(bytes_._backend.to_str())
    backend.add_special_tokens(["<|im_start|>"])
    backend.add_tokens(["<|im_end|>", "<think>"])  # ends a turn, though it counts as text; and a mark that is text
    tokenizer = Tokenizer(backend, bytes_._config | {"chat_template": template}, "im")
    data = JsonlDataConfig(tokenizer="im", path=str(path))
    stage = StageConfig(seq_len=128, batch_size=1, steps=1, learning_rate=1)
    batch = next(make_pipeline(data, tokenizer, [stage], 0, 0))
    texts = {
        name: [backend.id_to_token(token) for token in batch["targets"][batch[mask] > 0]]
        for name, mask in (("learned", "weights"), ("counted", "answers"))
    }
    turns = ["a", "Ġ", "b", ".", "<|im_end|>", "Ċ", "c", "Ċ", "<think>", "<|im_end|>", "Ċ"]
    assert texts["learned"] == [*turns, "Ġ", "d", ",", "Ġ", "e", "<|eos|>"]
    assert texts["counted"] == ["a", "b", ".", "c", "<think>", "d", ",", "e"]


@pytest.mark.parametrize("key", ["previous_fraction", "position_skip_fraction"])
def test_stage_keys_that_need_needles_are_refused(start, key):
    stage = dataclasses.replace(CHAT_STAGE, **{key: 0.5})
    data = JsonlDataConfig(tokenizer="bytes", path=start.path)
    with pytest.raises(UsageError, match=f"{key} does not work with data=jsonl"):
        make_pipeline(data, load_tokenizer("bytes"), [CHAT_STAGE, stage], 1, 0)
