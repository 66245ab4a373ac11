"""Pairs from a model's own mistakes."""

import dataclasses
import json

import jax
import numpy as np
import pytest

import tiny
from mla_jax.checkpoint.run_folder import save_imported
from mla_jax.config import MeshConfig, MinedPairsConfig, StageConfig
from mla_jax.data.preference.mined import asked_prompt, mined_path
from mla_jax.data.preference.needle_pairs import NeedlePairs
from mla_jax.data.preference.pipeline import make_preference_pipeline
from mla_jax.data.tokenizer import load_tokenizer
from mla_jax.errors import InputError
from mla_jax.evals import mining
from mla_jax.evals.mining import is_right, mine_pairs
from mla_jax.mesh import make_mesh
from mla_jax.model.transformer import init_params
from preference_rows import read_row

TOKENIZER = load_tokenizer("needle-bpe")
EOS = TOKENIZER.eos_id
LENGTH, BRANCH = 256, 128
DATA = MinedPairsConfig(
    tokenizer="needle-bpe",
    tasks={"multi_key": 1.0, "absent_key": 1.0, "multi_value": 1.0},
    haystacks={"noise": 1.0, "words": 1.0},
    rejected={"near_key": 1.0, "absent_key": 1.0, "wrong_order": 1.0},
    branch_tokens=BRANCH,
    pairs_per_row=2,
    prompts=6,
    samples=3,
    max_new_tokens=10,
)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run whose model knows nothing."""
    return save_imported(tmp_path_factory.mktemp("runs") / "sft", tiny.MODEL, init_params(tiny.MODEL, 0), TOKENIZER)


def _config(tmp_path, run, data=DATA):
    config = tiny.make_config(tmp_path / "dpo", [{"seq_len": LENGTH, "steps": 5}])
    return dataclasses.replace(config, data=data, init_from=str(run))


def _rows(config, batches=2):
    stage = StageConfig(seq_len=LENGTH, batch_size=4, steps=1, learning_rate=1.0)
    pipeline = make_preference_pipeline(config.data, TOKENIZER, [stage], 0, config.seed, run_dir=config.run_dir)
    made = [next(pipeline) for _ in range(batches)]
    pipeline.close()
    return [read_row(batch, i, BRANCH) for batch in made for i in range(4)]


def _file(config):
    return json.loads(mined_path(config.run_dir, 0).read_text())


def _prompts(config):
    pairs = NeedlePairs(config.data, TOKENIZER, LENGTH)
    return [asked_prompt(pairs, config.seed, 0, number) for number in range(config.data.prompts)]


@pytest.fixture
def scripted(monkeypatch):
    """Lets a function of (prompt, chosen ids) write the answers to a question, in place of the model."""

    def script(config, write):
        by_prompt = {
            (*prompt.ids.tolist(), *pair.prompt_end.tolist()): pair.chosen.tolist()
            for prompt in _prompts(config)
            for pair in prompt.pairs
        }

        def generate(generator, prompts, *, max_new_tokens, **options):
            counts = dict.fromkeys(map(tuple, prompts), 0)
            answers = []
            for prompt in map(tuple, prompts):
                answers.append(write(by_prompt[prompt], counts[prompt])[:max_new_tokens])
                counts[prompt] += 1
            return answers

        monkeypatch.setattr(mining, "generate_sharing_prefix", generate)

    return script


def test_what_a_model_writes_is_rejected_and_what_is_true_chosen(tmp_path, run, capsys):
    config = _config(tmp_path, run)
    mine_pairs(config, TOKENIZER, 0)
    found, prompts = _file(config), _prompts(config)
    asked = sum(len(prompt.pairs) for prompt in prompts) * DATA.samples
    assert found["asked"] == DATA.prompts and found["answers"] == asked == found["wrong"]
    assert f"{asked} of {asked} answers of {run} were wrong" in capsys.readouterr().out
    expected = set()
    for number, mistakes in found["rows"]:
        assert 1 <= len(mistakes) <= 2
        for question, ids in mistakes:
            pair = prompts[number].pairs[question]
            assert len(ids) <= DATA.max_new_tokens + 1
            text = TOKENIZER.decode([*prompts[number].ids, *pair.prompt_end])
            expected.add((text, TOKENIZER.decode(pair.chosen), tuple(ids)))
    batches = len(found["rows"])
    stage = StageConfig(seq_len=LENGTH, batch_size=1, steps=1, learning_rate=1.0)
    pipeline = make_preference_pipeline(DATA, TOKENIZER, [stage], 0, config.seed, run_dir=config.run_dir)
    seen = set()
    for _ in range(batches):  # an epoch
        batch = next(pipeline)
        row = {name: array[0] for name, array in batch.items()}
        for branch in range(1, row["branches"].max(), 2):
            chosen, rejected = (row["completion"] & (row["branches"] == b) for b in (branch, branch + 1))
            end = (row["branches"] == branch) & (np.cumsum(chosen) == 0)
            last = np.flatnonzero(chosen)[0]
            prompt = TOKENIZER.decode([*row["tokens"][:BRANCH], *row["tokens"][end], row["tokens"][last]])
            seen.add((prompt, TOKENIZER.decode(row["targets"][chosen]), tuple(row["targets"][rejected].tolist())))
    pipeline.close()
    assert seen == expected


def test_what_was_mined_is_not_mined_again_unless_it_would_differ(tmp_path, run, monkeypatch):
    config = _config(tmp_path, run)
    mine_pairs(config, TOKENIZER, 0)
    before, rows = _file(config), _rows(dataclasses.replace(config))
    monkeypatch.setattr(mining, "Generator", lambda *args: pytest.fail("the model was loaded again"))
    mine_pairs(dataclasses.replace(config, data=dataclasses.replace(DATA, workers=1)), TOKENIZER, 0)
    assert _file(config) == before and _rows(config) == rows
    monkeypatch.undo()
    for changes in ({"temperature": 0.5}, {"samples": 2}):
        mine_pairs(dataclasses.replace(config, data=dataclasses.replace(DATA, **changes)), TOKENIZER, 0)
        assert _file(config)["made_from"] != before["made_from"]
    other = save_imported(tmp_path / "other", tiny.MODEL, init_params(tiny.MODEL, 1), TOKENIZER)
    mine_pairs(dataclasses.replace(config, init_from=str(other)), TOKENIZER, 0)
    assert _file(config)["made_from"] != before["made_from"] and _file(config)["rows"] != before["rows"]


class Stopped(Exception):
    pass


def test_mining_that_was_stopped_goes_on_from_there(tmp_path, run):
    whole, stopped = _config(tmp_path / "a", run), _config(tmp_path / "b", run)
    mine_pairs(whole, TOKENIZER, 0)
    calls = []

    def stop_at_third():
        calls.append(0)
        if len(calls) == 3:
            raise Stopped

    with pytest.raises(Stopped):
        mine_pairs(stopped, TOKENIZER, 0, stop_at_third)
    assert _file(stopped)["asked"] == 2 and _file(stopped) != _file(whole)
    mine_pairs(stopped, TOKENIZER, 0, lambda: calls.append(0))
    assert len(calls) == 3 + DATA.prompts - 2 and _file(stopped) == _file(whole)


def test_answers_are_deduplicated_cut_and_left_out_if_they_say_nothing(tmp_path, run, scripted):
    data = dataclasses.replace(DATA, samples=5, max_new_tokens=8)
    config = _config(tmp_path, run, data)
    wrong, long = TOKENIZER.encode(" 1, 2."), TOKENIZER.encode(" no number at all, but words")
    scripted(config, lambda chosen, i: [[], wrong, wrong, long, chosen[:-1]][i])
    mine_pairs(config, TOKENIZER, 0)
    found = _file(config)
    questions = sum(len(prompt.pairs) for prompt in _prompts(config))
    # The answers to long questions that are right are cut before they end, so they are no mistakes to learn from.
    assert found["empty"] == questions and found["answers"] == 5 * questions and found["wrong"] >= 4 * questions
    mistakes = [ids for _, row in found["rows"] for _, ids in row]
    assert len(mistakes) == 2 * questions
    assert sorted(map(tuple, mistakes)) == sorted([(*wrong, EOS)] * questions + [tuple(long[:8])] * questions)


@pytest.mark.parametrize(
    ("answer", "named"), [(lambda chosen, i: chosen[:-1], "0 of "), (lambda chosen, i: [], r"\(\d+ empty\)")]
)
def test_without_a_mistake_there_is_nothing_to_train_on(tmp_path, run, scripted, answer, named):
    data = dataclasses.replace(DATA, max_new_tokens=64)
    config = _config(tmp_path, run, data)
    scripted(config, answer)
    with pytest.raises(InputError, match=f"data=mined has no pairs for stage 1: .*{named}.* raise data.prompts or"):
        mine_pairs(config, TOKENIZER, 0)


@pytest.mark.parametrize("devices", [1, pytest.param(8, marks=pytest.mark.integration)])
def test_a_model_answers_on_a_mesh_too(tmp_path, run, devices):
    with jax.set_mesh(make_mesh(MeshConfig(), jax.devices()[:devices])):
        config = _config(tmp_path, run, dataclasses.replace(DATA, prompts=2))
        mine_pairs(config, TOKENIZER, 0)
    assert _file(config)["wrong"] == _file(config)["answers"] > 0
    assert len(_rows(config)) == 8


def test_a_damaged_or_missing_file_is_named(tmp_path, run, monkeypatch):
    config = _config(tmp_path, run)
    with pytest.raises(InputError, match=r"stage1.json has no pairs; they are mined before training starts"):
        _rows(config)
    path = mined_path(config.run_dir, 0)
    path.parent.mkdir(parents=True)
    path.write_text('{"rows": [')
    with pytest.raises(InputError, match=r"stage1.json cannot be used .* delete it to mine again"):
        mine_pairs(config, TOKENIZER, 0)
    path.unlink()
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    monkeypatch.setattr(mining, "on_all", lambda read: read())
    monkeypatch.setattr(mining, "newest_checkpoint", lambda folder: run / "checkpoints" / "0")
    with pytest.raises(InputError, match="only a single process can mine them: start the same command as one process"):
        mine_pairs(config, TOKENIZER, 0)


def test_other_data_is_left_alone(tmp_path, run):
    config = dataclasses.replace(_config(tmp_path, run), data=tiny.DATA)
    mine_pairs(config, TOKENIZER, 0)
    assert not mined_path(config.run_dir, 0).exists()


@pytest.mark.parametrize(
    ("answer", "text", "right"),
    [
        (" 12345.", " 12345.", True),
        (" 12345.", "is 12345 and not 6", True),
        (" 12345.", " 12346.", False),
        (" 12345.", " not found.", False),
        (" 12345, 67890.", " 12345, 67890. Next", True),
        (" 12345, 67890.", " 67890, 12345.", False),
        (" 12345, 67890.", " 12345.", False),
        (" fox, owl.", " fox, owl", True),
        (" not found.", " not found.", True),
        (" not found.", " 12345.", False),
        (" not found.", "", False),
    ],
)
def test_what_counts_as_right(answer, text, right):
    assert is_right(answer, text) == right
