"""Pairs of a file: encoded as TRL encodes them, packed so that each is there once, refused by line and key."""

import json
import logging
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from transformers import AutoTokenizer

from chat_templates import NAMES, chat_tokenizer
from mla_jax.config import PreferenceJsonlConfig, StageConfig
from mla_jax.config.data import ValidationConfig
from mla_jax.data.preference.jsonl import JsonlPairs, pack_pairs
from mla_jax.data.preference.pipeline import make_preference_pipeline
from mla_jax.data.preference.records import encode_pair
from mla_jax.data.tokenizer import Tokenizer, load_tokenizer
from mla_jax.errors import InputError, UsageError
from preference_rows import read_row

BYTES = load_tokenizer("bytes")


def _user(text):
    return {"role": "user", "content": text}


def _assistant(text):
    return {"role": "assistant", "content": text}


SKY = [_user("What color is the sky?")]
TEXTS = [
    {"prompt": "The sky is", "chosen": " blue.", "rejected": " green."},
    {"prompt": "The sky is ", "chosen": "blue", "rejected": "black<|eos|>"},
    {"prompt": "Prüfe: ", "chosen": "\U0001f642 gut", "rejected": "日本"},
    {"chosen": "The sky is blue.", "rejected": "The sky is green."},
    {"chosen": "The sky is blue.", "rejected": "The sky is black."},
    {"chosen": "Say hi. Hello", "rejected": "Say hi. Hello there"},
]
CHATS = [
    {"prompt": SKY, "chosen": [_assistant("It is blue.")], "rejected": [_assistant("It is green.")]},
    {"chosen": [*SKY, _assistant("It is blue.")], "rejected": [*SKY, _assistant("Blue is it.")]},
    {
        "chosen": [_user("a"), _assistant("b"), _user("c"), _assistant("d")],
        "rejected": [_user("a"), _assistant("b"), _user("c"), _assistant("de")],
    },
    {"chosen": [_user("a"), _assistant("b")], "rejected": [_user("a"), _assistant("c"), _user("d"), _assistant("e")]},
]


def _as_trl(records, tokenizer, folder) -> list[list[list[int]]]:
    """What TRL's trainer makes of records of one format: ids of prompt, chosen and rejected answer."""
    trainer_of = pytest.importorskip("trl.trainer.dpo_trainer", reason="needs pip install '.[dev]'").DPOTrainer
    rows_of = pytest.importorskip("datasets", reason="needs pip install '.[dev]'").Dataset.from_list
    tokenizer.save(folder)
    theirs: Any = AutoTokenizer.from_pretrained(folder)
    trainer, args = SimpleNamespace(_tokenizer=theirs), SimpleNamespace(dataset_num_proc=None, max_length=None)
    rows = trainer_of._prepare_dataset(trainer, rows_of(records), theirs, args, "train")
    return [[row[f"{key}_ids"] for key in ("prompt", "chosen", "rejected")] for row in rows]


def _ours(records, tokenizer):
    return [[ids.tolist() for ids, _ in encode_pair(record, tokenizer)] for record in records]


@pytest.mark.parametrize("explicit", [True, False])
@pytest.mark.parametrize("spec", ["bytes", "needle-bpe"])
def test_texts_are_encoded_as_trl_does(tmp_path, spec, explicit):
    tokenizer = load_tokenizer(spec)
    records = [record for record in TEXTS if ("prompt" in record) == explicit]
    assert _ours(records, tokenizer) == _as_trl(records, tokenizer, tmp_path)


@pytest.mark.parametrize("explicit", [True, False])
@pytest.mark.parametrize("name", ["bytes", *NAMES])
def test_conversations_are_encoded_as_trl_does(tmp_path, name, explicit):
    tokenizer = BYTES if name == "bytes" else chat_tokenizer(name)
    records = [record for record in CHATS if ("prompt" in record) == explicit]
    assert _ours(records, tokenizer) == _as_trl(records, tokenizer, tmp_path)


def test_an_answer_is_learned_with_its_end_and_a_prompt_is_not():
    (prompt, of_prompt), *answers = encode_pair(TEXTS[0], BYTES)
    assert BYTES.decode(prompt) == "The sky is" and prompt[0] == BYTES.bos_id and not of_prompt.any()
    for (ids, of_answer), text in zip(answers, (" blue.", " green."), strict=True):
        assert of_answer.all() and BYTES.decode(ids) == text and ids[-1] == BYTES.eos_id and ids.dtype == np.int32


ANSWERS = {"chosen": "a", "rejected": "b"}
BAD = [
    ('{"prompt": "p", "chosen": "a"}', "no `rejected` answer; expected"),
    ('{"prompt": "p", "chosen": "a", "rejected": null}', "no `rejected` answer; expected"),
    ('{"prompt": "p", "rejected": "a"}', "no `chosen` answer; expected"),
    ('{"prompt": "p", "chosen": "a", "rejected": "a"}', "`chosen` and `rejected` are equal"),
    ('{"prompt": "p", "chosen": "a", "rejected": "a<|eos|>"}', "are the same tokens"),
    ('{"prompt": "p", "chosen": "", "rejected": "a"}', "`chosen` is an empty answer"),
    ('{"prompt": "p", "chosen": "a", "rejected": " \\n"}', "`rejected` is an empty answer"),
    ('{"prompt": "p", "chosen": 1, "rejected": "a"}', "`chosen` must be text or a list of at least one message"),
    ('{"prompt": [], "chosen": "a", "rejected": "b"}', "`prompt` must be text or a list of at least one message"),
    ('{"prompt": "p", "chosen": "a", "rejected": "b", "score": 3}', "unknown field `score`; take it out or name it"),
    ('{"prompt": "p", "chosen": "a", "rejected": "b", "tools": []}', "unknown field `tools`"),
    ("[1]", "a list, expected"),
    ("{", "not JSON"),
    (
        '{"prompt": "p", "chosen": [{"role": "assistant", "content": "a"}], "rejected": "b"}',
        "`prompt` is text and others",
    ),
    (json.dumps({"chosen": [_user("a")], "rejected": [_user("b")]}), "must begin with the same message"),
    (json.dumps({"prompt": SKY, "chosen": [_assistant("")], "rejected": [_assistant("b")]}), "`chosen` is an empty"),
    (json.dumps({"prompt": SKY, "chosen": [{"role": "assistant"}], "rejected": SKY}), "`chosen`: message 1 must have"),
    (
        json.dumps({"prompt": SKY, "chosen": [*SKY, _assistant("a")], "rejected": [_assistant("b")]}),
        "leave `prompt` out",
    ),
    (json.dumps({"prompt": SKY, "chosen": [{"role": "robot", "content": "a"}], "rejected": SKY}), "unknown role robot"),
]


def _write(path, *lines) -> str:
    path.write_text("".join(f"{line if isinstance(line, str) else json.dumps(line)}\n" for line in lines))
    return str(path)


def _config(path, **kwargs) -> PreferenceJsonlConfig:
    return PreferenceJsonlConfig(
        **{"tokenizer": "bytes", "path": path, "branch_tokens": 32, "pairs_per_row": 4} | kwargs
    )


@pytest.mark.parametrize(("line", "named"), BAD, ids=[named for _, named in BAD])
def test_a_bad_line_is_named_or_skipped_and_counted(tmp_path, caplog, line, named):
    path = _write(tmp_path / "pairs.jsonl", TEXTS[0], "", line, TEXTS[3])
    with pytest.raises(InputError) as error:
        JsonlPairs(_config(path), BYTES, 96)
    assert str(error.value).startswith(f"{path}, line 3: ") and named in str(error.value)
    assert "\n" not in str(error.value)
    with caplog.at_level(logging.WARNING):
        pairs = JsonlPairs(_config(path, on_bad_line="skip"), BYTES, 96)
    assert "skipped 1 of 3 lines that cannot be used; the first is line 3: " in caplog.text
    assert sum(len(pairs[row]) for row in range(len(pairs))) == 2


def test_a_prompt_needs_a_token_that_predicts_the_answers():
    (prompt, _), *_ = encode_pair({"prompt": "", **ANSWERS}, BYTES)
    assert prompt.tolist() == [BYTES.bos_id]
    without_bos = Tokenizer(BYTES._backend, {**BYTES._config, "bos_token": None}, "mine")
    with pytest.raises(InputError, match="the prompt is empty and tokenizer mine has no bos token"):
        encode_pair({"prompt": "", **ANSWERS}, without_bos)


@pytest.mark.parametrize(
    ("record", "seq_len", "named"),
    [
        (
            {"prompt": "p" * 65, **ANSWERS},
            96,
            "the prompt has 66 tokens, but train.stages.seq_len - data.branch_tokens + 1 is 65",
        ),
        (
            {"prompt": "p", "chosen": "c" * 20, "rejected": "r" * 11},
            96,
            "the answers have 33 tokens, but data.branch_tokens is 32",
        ),
    ],
)
def test_too_long_a_pair_is_named_or_skipped_and_counted(tmp_path, caplog, record, seq_len, named):
    path = _write(tmp_path / "pairs.jsonl", TEXTS[0], "", record, record)
    with pytest.raises(InputError) as error:
        JsonlPairs(_config(path), BYTES, seq_len)
    assert str(error.value).startswith(f"{path}, line 3: {named}")
    with caplog.at_level(logging.WARNING):
        pairs = JsonlPairs(_config(path, on_bad_line="skip"), BYTES, seq_len)
    assert f"skipped 2 of 3 pairs that are too long; of the first, {named}" in caplog.text
    assert len(pairs) == 1
    with pytest.raises(InputError, match=f"none of the 2 pairs fits; of the first, {named.split(',')[0]}"):
        JsonlPairs(_config(_write(tmp_path / "bad.jsonl", record, record), on_bad_line="skip"), BYTES, seq_len)


def test_a_pair_that_just_fits_is_used(tmp_path):
    record = {"prompt": "p" * 64, "chosen": "c" * 19, "rejected": "r" * 11}
    pairs = JsonlPairs(_config(_write(tmp_path / "pairs.jsonl", record)), BYTES, 96)
    ((prompt,),) = [pairs[0]]
    assert len(prompt.ids) == 64 and prompt.pairs[0].tokens == 32


def test_empty_files_and_stages_that_skip_are_refused(tmp_path):
    with pytest.raises(InputError, match=r"is empty; expected .*\"chosen\".* on each line"):
        JsonlPairs(_config(_write(tmp_path / "empty.jsonl")), BYTES, 96)
    stage = StageConfig(seq_len=96, batch_size=2, steps=1, learning_rate=1.0, position_skip_fraction=0.5)
    with pytest.raises(UsageError, match="position_skip_fraction does not work with data=preference_jsonl"):
        config = _config(_write(tmp_path / "a.jsonl", TEXTS[0]))
        make_preference_pipeline(config, BYTES, [stage], 0, 0)
    with pytest.raises(UsageError, match=r"train.validate_every needs data to validate on: set data.validation.path"):
        make_preference_pipeline(config, BYTES, [stage], 0, 0, validation=True)
    config.validation.fraction = 0.1
    with pytest.raises(InputError, match=r"data.validation.fraction=0.1 of 1 lines leaves none"):
        JsonlPairs(config, BYTES, 96)


def test_what_is_held_out_comes_once_in_one_order_and_is_not_trained_on(tmp_path):
    def prompts(config, seed=0, **split) -> list[list[int]]:
        stage = StageConfig(seq_len=96, batch_size=4, steps=1, learning_rate=1.0)
        pipeline = make_preference_pipeline(config, BYTES, [stage], 0, seed, **split)
        batches = list(pipeline) if split else [next(pipeline) for _ in range(20)]
        assert len(batches) == min(len(pipeline), 20)
        return [[*ids] for batch in batches for i in range(4) for ids, _ in read_row(batch, i, 32)]

    records = [{"prompt": f"prompt {i}:", "chosen": "a", "rejected": "b"} for i in range(60)]
    path = _write(tmp_path / "pairs.jsonl", *records)
    config = _config(path, validation=ValidationConfig(fraction=0.3))
    held_out, trained = prompts(config, validation=True), prompts(config)
    assert held_out == prompts(config, seed=1, validation=True) != sorted(held_out)
    assert 8 < len(held_out) < 30 and not {*map(tuple, held_out)} & {*map(tuple, trained)}
    assert len({*map(tuple, held_out)}) == len(held_out) == 60 - len({*map(tuple, trained)})
    other = _config(path, validation=ValidationConfig(path=_write(tmp_path / "other.jsonl", *records[:5])))
    assert len(prompts(other, validation=True)) == 5 and len({*map(tuple, prompts(other))}) == 60


def test_each_epoch_has_each_pair_once_in_an_order_of_its_own(tmp_path):
    rng = np.random.default_rng(0)
    records = [
        {
            "prompt": f"{i} " * rng.integers(1, 6),
            "chosen": "c" * rng.integers(1, 9),
            "rejected": "r" * rng.integers(1, 9),
        }
        for i in range(40)
    ]
    config = _config(_write(tmp_path / "pairs.jsonl", *records))
    stage = StageConfig(seq_len=96, batch_size=4, steps=1, learning_rate=1.0)
    pipeline = make_preference_pipeline(config, BYTES, [stage], 0, 0)
    expected = sorted((r["prompt"], r["chosen"], r["rejected"]) for r in records)
    epochs, found, rows = [], [], 0
    while len(epochs) < 2:
        batch = next(pipeline)
        for i in range(4):
            rows += not epochs
            for ids, answers in read_row(batch, i, 32):
                ((end, chosen), (_, rejected)) = answers.values()
                assert chosen[-1] == rejected[-1] == BYTES.eos_id
                found.append((BYTES.decode(ids + end), BYTES.decode(chosen), BYTES.decode(rejected)))
            if len(found) == len(expected):
                epochs.append(found)
                found = []
    pipeline.close()
    assert all(sorted(epoch) == expected for epoch in epochs) and epochs[0] != epochs[1]
    assert rows < 20  # several pairs share a row


@pytest.mark.parametrize("pairs_per_row", [1, 3, 8])
def test_packing_puts_each_pair_into_one_row_that_holds_it(pairs_per_row):
    rng = np.random.default_rng(pairs_per_row)
    prompts, answers = rng.integers(0, 101, 3000), rng.integers(2, 41, 3000)
    packing = pack_pairs(prompts, answers, 100, 40, pairs_per_row)
    rows = [packing[row] for row in range(len(packing))]
    assert sorted(np.concatenate(rows).tolist()) == list(range(3000))
    assert all(prompts[row].sum() <= 100 and answers[row].sum() <= 40 and 0 < len(row) <= pairs_per_row for row in rows)
    least = max(prompts.sum() / 100, answers.sum() / 40, 3000 / pairs_per_row)
    assert len(rows) < 1.15 * least


def test_packing_no_pair_gives_no_row():
    assert len(pack_pairs(np.empty(0, np.int64), np.empty(0, np.int64), 100, 40, 3)) == 0
