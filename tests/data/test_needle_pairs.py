"""Needle pairs, checked by reading their haystacks as a person would."""

import re
from collections import Counter, defaultdict

import numpy as np
import pytest

from mla_jax.config import NeedlePairsConfig, StageConfig
from mla_jax.config.preference import REJECTED
from mla_jax.data.needle import vocabulary
from mla_jax.data.needle.generator import passkey_prompt
from mla_jax.data.pipeline import make_pipeline
from mla_jax.data.preference.needle_pairs import NeedlePairs
from mla_jax.data.preference.pipeline import make_preference_pipeline
from mla_jax.data.preference.questions import SUITABLE
from mla_jax.data.tokenizer import load_tokenizer, train_bpe
from mla_jax.errors import UsageError
from preference_rows import read_row, text_pairs

TASKS = ("passkey", "single", "multi_key", "multi_value", "multi_query", "variable_tracking", "absent_key")
HAYSTACKS = ("noise", "words", "needles")
MIXTURE = {
    "near_key": 0.4,
    "digit_edit": 0.2,
    "random_value": 0.15,
    "false_refusal": 0.1,
    "wrong_order": 0.05,
    "absent_key": 0.1,
}
TOKENIZERS = {
    "bytes": load_tokenizer("bytes"),
    "needle-bpe": load_tokenizer("needle-bpe"),
    "small": train_bpe(vocabulary.PIECES, 400, "small"),
}


def _config(rejected=MIXTURE, tasks=TASKS, haystacks=HAYSTACKS, tokenizer="needle-bpe", **kwargs) -> NeedlePairsConfig:
    kwargs = {"branch_tokens": 256, "pairs_per_row": 4} | kwargs
    return NeedlePairsConfig(
        tokenizer=tokenizer,
        rejected=dict(rejected) if isinstance(rejected, dict) else dict.fromkeys(rejected, 1.0),
        tasks=dict.fromkeys(tasks, 1.0),
        haystacks=dict.fromkeys(haystacks, 1.0),
        **kwargs,
    )


def _batches(config, length=512, rows=8, count=1, seed=0, **stage):
    stages = [StageConfig(seq_len=length, batch_size=rows, steps=1, learning_rate=1.0, **stage)]
    pipeline = make_preference_pipeline(config, TOKENIZERS[config.tokenizer], stages, 0, seed)
    batches = [next(pipeline) for _ in range(count)]
    pipeline.close()
    return batches


def _pairs(config, **kwargs):
    """(haystack, question line, chosen, rejected) of all rows."""
    for batch in _batches(config, **kwargs):
        for i in range(len(batch["tokens"])):
            for prompt, chosen, rejected in text_pairs(TOKENIZERS[config.tokenizer], batch, i, config.branch_tokens):
                haystack, _, question = prompt.rpartition("\n")
                yield haystack, question, chosen, rejected


def _numbers(haystack: str) -> dict[str, list[str]]:
    numbers = defaultdict(list)
    for key, value in re.findall(r" One of the special magic numbers for ([a-z ]+) is: (\d{5})\.", haystack):
        numbers[key].append(value)
    return numbers


def _truth(haystack: str, question: str) -> list[str]:
    """What the haystack answers, from its text alone; empty if the key is not there."""
    if "pass key" in question:
        return [*re.findall(r"^The pass key is (\d+)\. Remember it\. \1 is the pass key\.$", haystack, re.M)]
    numbers = _numbers(haystack)
    if match := re.fullmatch(r"The special magic numbers? for ([a-z ,]+) (?:is|are):", question):
        return [value for key in match[1].split(", ") for value in numbers.get(key, [])]
    match = re.fullmatch(r"The variables with value (\d+) are:", question)
    assert match
    chain, source = [], match[1]
    while found := re.findall(rf" VAR ([a-z]+) = {source}\.", haystack):
        (name,) = found
        chain.append(name)
        source = f"VAR {name}"
    return chain


def _near(a: str, b: str) -> bool:
    return sum(x == y for x, y in zip(a.split(), b.split(), strict=True)) == 1


def _kind(haystack: str, question: str, chosen: str, rejected: str) -> str:
    """The kind of a pair, told by reading it; `?` if it is none."""
    truth = _truth(haystack, question)
    assert chosen == (f" {', '.join(truth)}." if truth else " not found.")
    if not truth:
        assert re.fullmatch(r" \d{5}\.", rejected)
        return "absent_key"
    if rejected == " not found.":
        return "false_refusal"
    assert rejected[0] == " " and rejected[-1] == "."
    wrong = rejected[1:-1].split(", ")
    if set(wrong) <= set(truth):
        return "wrong_order"
    key = re.fullmatch(r"The special magic number for ([a-z ]+) is:", question)
    if key and any(wrong == values and _near(key[1], near) for near, values in _numbers(haystack).items()):
        return "near_key"
    assert len(wrong) == len(truth)
    differ = [(a, b) for a, b in zip(truth, wrong, strict=True) if a != b]
    digits = sum(x != y for x, y in zip(*differ[0], strict=False))
    if len(differ) == 1 and differ[0][0].isdigit() and len(differ[0][0]) == len(differ[0][1]) and digits <= 2:
        return "digit_edit"
    return "random_value" if len(differ) == len(truth) else "?"


@pytest.mark.parametrize("tokenizer", TOKENIZERS)
@pytest.mark.parametrize(("kind", "task"), [(kind, task) for kind in REJECTED for task in SUITABLE[kind]])
def test_every_kind_of_pair_is_what_it_says(kind, task, tokenizer):
    rows = 4 if tokenizer == "bytes" else 12
    config = _config([kind], [task], tokenizer=tokenizer, branch_tokens=1024)
    kinds = Counter(_kind(*pair) for pair in _pairs(config, length=3072, rows=rows))
    assert kinds.pop(kind, 0) >= rows * (1 if task in ("passkey", "single") else 4) - 2
    # A number drawn at random may differ by two digits only, or be another number: one in a thousand.
    assert kinds.total() <= (2 if kind == "random_value" else 0), kinds


def test_the_mixture_has_its_shares_with_one_question_or_several():
    for pairs_per_row, count in ((1, 10), (4, 4)):
        config = _config(pairs_per_row=pairs_per_row)
        kinds = Counter(_kind(*pair) for pair in _pairs(config, length=768, rows=50, count=count))
        assert kinds.total() >= 500
        for kind, share in MIXTURE.items():
            deviation = np.sqrt(share * (1 - share) / kinds.total())
            assert abs(kinds[kind] / kinds.total() - share) < 4 * deviation, (kind, kinds)


def test_what_a_kind_without_a_task_would_have_goes_to_the_others_by_their_weights():
    config = _config({"near_key": 0.8, "digit_edit": 0.1, "wrong_order": 0.1}, ["single", "multi_value"])
    kinds = Counter(_kind(*pair) for pair in _pairs(config, rows=100, count=2))
    assert set(kinds) == {"digit_edit", "wrong_order"}
    assert 0.4 < kinds["digit_edit"] / kinds.total() < 0.6


def test_an_absent_key_is_given_the_number_of_a_near_key_or_of_another_or_none_in_the_text():
    near = other = 0
    pairs = list(_pairs(_config(["absent_key"], ["absent_key"], ["noise"]), rows=100))
    for haystack, question, _, rejected in pairs:
        key = question.removeprefix("The special magic number for ").removesuffix(" is:")
        holders = [name for name, values in _numbers(haystack).items() if rejected[1:-1] in values]
        assert key not in _numbers(haystack)
        near += any(_near(key, name) for name in holders)
        other += bool(holders) and not any(_near(key, name) for name in holders)
    assert 0.5 < near / len(pairs) < 0.75 and 0.05 < other / len(pairs) < 0.25


def test_two_keys_of_a_haystack_are_near_as_often_as_wanted():
    """Where no kind of pair needs a near key, `near_duplicate_fraction` decides about the needles nobody asks for."""
    for fraction, lowest, highest in ((0.0, 0, 0.1), (1.0, 0.9, 1)):
        config = _config(
            ["digit_edit"], ["multi_key"], ["noise"], near_duplicate_fraction=fraction, pairs_per_row=1, max_needles=2
        )
        near = [
            any(_near(question.split(" for ")[1][:-4], key) for key in _numbers(haystack))
            for haystack, question, _, _ in _pairs(config, rows=100)
        ]
        assert lowest <= np.mean(near) <= highest


@pytest.mark.parametrize("length", [96, 97, 130, 512, 8192])
def test_prompts_fill_their_region_exactly(length):
    branch_tokens = 40 if length < 130 else 64
    config = _config(branch_tokens=branch_tokens)
    for batch in _batches(config, length, rows=4, count=3):
        assert all(array.shape == (4, length) for array in batch.values())
        assert (batch["prompts"][:, : length - branch_tokens] == 1).all()
        for i in range(4):
            ((ids, answers),) = read_row(batch, i, branch_tokens)
            assert len(ids) == length - branch_tokens and ids[0] == TOKENIZERS["needle-bpe"].bos_id
            assert 1 <= len(answers) // 2 <= 4


def test_batches_depend_on_nothing_but_seed_stage_and_number():
    config = _config()
    stages = [StageConfig(seq_len=512, batch_size=8, steps=1, learning_rate=1.0)] * 2
    tokenizer = TOKENIZERS["needle-bpe"]

    def batch(seed=0, stage=0, number=0, rows=lambda size: np.arange(size)):
        pipeline = make_preference_pipeline(config, tokenizer, stages, stage, seed, rows)
        pipeline.set_state({"next_batch": number})
        made = next(pipeline)
        pipeline.close()
        return made

    third = batch(number=3)
    for name, array in _batches(config, count=4)[3].items():
        np.testing.assert_array_equal(array, third[name])
        np.testing.assert_array_equal(array[2:5], batch(number=3, rows=lambda size: np.arange(2, 5))[name])
    for other in (batch(), batch(1, number=3), batch(stage=1, number=3)):
        assert not (other["tokens"] == third["tokens"]).all(axis=1).any()


def test_workers_make_the_same_batches():
    alone, workers = (_batches(_config(workers=workers), 512, count=2)[1] for workers in (0, 1))
    for name, array in alone.items():
        np.testing.assert_array_equal(array, workers[name])


def test_pairs_are_held_out_from_evaluation():
    tokenizer, config = TOKENIZERS["needle-bpe"], _config(["digit_edit"], ["passkey"], ["noise"])
    keys = {passkey_prompt(tokenizer, 256, 0.5, seed=0, index=i)[1] for i in range(20)}
    asked = {chosen[1:-1] for _, _, chosen, _ in _pairs(config, length=400, rows=40)}
    assert len(asked) > 35 and not asked & keys


def test_positions_skip_in_the_prompt_and_branches_go_on():
    config = _config(branch_tokens=128)
    stage = {"position_skip_fraction": 0.5, "position_skip_max": 1000}
    batches, plain = _batches(config, 256, count=8, **stage), _batches(config, 256, count=8)
    skipping = 0
    for batch, without in zip(batches, plain, strict=True):
        np.testing.assert_array_equal(batch["tokens"], without["tokens"])
        offsets = batch["positions"] - without["positions"]
        assert (np.diff(offsets[:, :128]) >= 0).all() and (offsets[:, 128:] == offsets[:, 127:128]).all()
        assert offsets.min() == 0 and offsets.max() <= 1000
        skipping += offsets.any()
    assert 0 < skipping < 8


@pytest.mark.parametrize(
    ("config", "length", "named"),
    [
        ({"branch_tokens": 512}, 512, r"data.branch_tokens=512 leaves no room for a prompt .*seq_len=512"),
        ({"branch_tokens": 16}, 512, r"data.branch_tokens is 16, too short .* needle-bpe is \d+$"),
        ({"branch_tokens": 64}, 70, r"train.stages.seq_len - data.branch_tokens is 6, too short .* is \d+$"),
        (
            {"rejected": ["near_key"], "tasks": ["single"]},
            512,
            r"none of data.rejected \(near_key\) suits .* \(single\)",
        ),
    ],
)
def test_rows_too_short_for_any_pair_are_named(config, length, named):
    with pytest.raises(UsageError, match=named):
        NeedlePairs(_config(**config), TOKENIZERS["needle-bpe"], length)


@pytest.mark.parametrize("tokenizer", TOKENIZERS)
def test_the_shortest_row_that_is_named_holds_a_pair(tokenizer):
    for kind in REJECTED:
        for task in SUITABLE[kind]:
            short = _config([kind], [task], tokenizer=tokenizer, branch_tokens=2)
            with pytest.raises(UsageError, match="shortest possible") as error:
                NeedlePairs(short, TOKENIZERS[tokenizer], 10_000)
            branch_tokens = int(str(error.value).split()[-1])
            config = _config([kind], [task], tokenizer=tokenizer, branch_tokens=branch_tokens)
            with pytest.raises(UsageError, match="shortest possible") as error:
                NeedlePairs(config, TOKENIZERS[tokenizer], branch_tokens + 1)
            length = branch_tokens + int(str(error.value).split()[-1])
            pairs = [_kind(*pair) for pair in _pairs(config, length=length, rows=4)]
            assert len(pairs) >= 4


def test_fine_tuning_refuses_pairs_and_stages_may_not_mix_lengths():
    tokenizer = TOKENIZERS["needle-bpe"]
    stages = [StageConfig(seq_len=512, batch_size=8, steps=1, learning_rate=1.0, previous_fraction=0.5)]
    with pytest.raises(UsageError, match="data=needle_pairs has preference pairs"):
        make_pipeline(_config(), tokenizer, stages, 0, 0)
    with pytest.raises(UsageError, match="previous_fraction does not work with data=needle_pairs"):
        make_preference_pipeline(_config(), tokenizer, stages, 0, 0)


def test_questions_share_the_needles_that_a_haystack_may_have():
    mixture = {"near_key": 0.1, "digit_edit": 0.2, "random_value": 0.1, "false_refusal": 0.2, "absent_key": 0.4}
    for most in (1, 2, 3):
        kinds, of_haystack = Counter(), defaultdict(set)
        for pair in _pairs(_config(mixture, TASKS[2:], HAYSTACKS[:2], max_needles=most), rows=100):
            kinds[_kind(*pair)] += 1
            of_haystack[pair[0]].add(pair[1])
            keys = [key for key, values in _numbers(pair[0]).items() for _ in values]
            assert 1 <= len(keys) + pair[0].count(" = ") <= most
            if not _truth(*pair[:2]):
                asked = re.fullmatch(r"The special magic number for ([a-z ]+) is:", pair[1])[1]
                assert any(_near(asked, key) for key in keys)
        assert kinds.total() > 250 and max(map(len, of_haystack.values())) >= 3
        assert (kinds["near_key"] > 0) == (most > 1) and kinds["absent_key"] > kinds.total() / 4


def test_too_few_needles_for_any_pair_are_named():
    with pytest.raises(UsageError, match=r"none of data.rejected \(near_key\) suits .* with data.max_needles=1$"):
        NeedlePairs(_config(["near_key"], max_needles=1), TOKENIZERS["needle-bpe"], 512)
