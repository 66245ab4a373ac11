"""lm-evaluation-harness, run on a model of ours and, through its own `hf`, on the exported folder: the same figures."""

import contextlib
import dataclasses
import json
import logging
import shutil
import subprocess
import sys

import pytest

from mla_jax.bridge.hf.export import export
from mla_jax.checkpoint.run_folder import save_imported
from mla_jax.data.tokenizer import load_tokenizer
from mla_jax.errors import InputError
from mla_jax.evals.provenance import provenance
from mla_jax.inference import generator as generator_module
from mla_jax.inference.score import score
from mla_jax.model.decoder import prefill_layer
from mla_jax.model.transformer import init_params
from tiny import MODEL
from tools import lm_eval as tool

evaluator = pytest.importorskip("lm_eval.evaluator")
TaskManager = pytest.importorskip("lm_eval.tasks").TaskManager
Instance = pytest.importorskip("lm_eval.api.instance").Instance
model_registry = pytest.importorskip("lm_eval.api.registry").model_registry
CachingLM = pytest.importorskip("lm_eval.api.model").CachingLM
harness = pytest.importorskip("mla_jax.bridge.harness")

CONFIG = dataclasses.replace(MODEL, initializer_range=0.5, max_position_embeddings=160)
TOKENIZER = load_tokenizer("needle-bpe")
SENTENCE = "The pass key is {}. Remember it. "
DOCS = [
    {
        "question": "The grass is green. " * (1 + i) + SENTENCE.format(i) + "What is the pass key?",
        "choices": [" The pass key is", " 7 2", " The sky is blue. Here we go."],
        "answer": i % 3,
        "text": SENTENCE.format(37 * i) * (1 + 10 * i),  # the last ones are longer than the model
    }
    for i in range(5)
]
COMMON = {"dataset_path": "json", "test_split": "test", "metadata": {"version": 1}}
CHOICE = COMMON | {
    "task": "choice", "output_type": "multiple_choice", "doc_to_text": "{{question}}", "doc_to_choice": "choices",
    "doc_to_target": "answer", "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}],
}  # fmt: skip
ROLLING = COMMON | {
    "task": "rolling", "output_type": "loglikelihood_rolling", "doc_to_text": "", "doc_to_target": "{{text}}",
    "metric_list": [{"metric": "word_perplexity"}, {"metric": "bits_per_byte"}],
}  # fmt: skip
WRITING = COMMON | {
    "task": "writing", "output_type": "generate_until", "doc_to_text": "{{question}}", "doc_to_target": "{{text}}",
    "metric_list": [{"metric": "exact_match"}], "generation_kwargs": {"until": ["xs", "yell"], "max_gen_toks": 24},
}  # fmt: skip


@pytest.fixture(scope="module", autouse=True)
def quiet():
    logging.disable(logging.WARNING)
    yield
    logging.disable(logging.NOTSET)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The same model as a run and exported, and the documents of the tasks."""
    folder = tmp_path_factory.mktemp("harness")
    params = init_params(CONFIG, 0)
    save_imported(folder / "run", CONFIG, params, TOKENIZER)
    export(CONFIG, params, TOKENIZER, folder / "hf")
    (folder / "docs.jsonl").write_text("".join(json.dumps(doc) + "\n" for doc in DOCS))
    return folder


@pytest.fixture(scope="module")
def evaluate(folder):
    """Evaluates ours or the harness' hf on tasks; returns metrics, and by task what each document asked and got."""

    def run(name, *tasks, batch_size=4, apply_chat_template=False, **more):
        data = {"dataset_kwargs": {"data_files": {"test": str(folder / "docs.jsonl")}}}
        args = {"run": str(folder / "run"), "tokenizer": str(folder / "hf")}
        if name == "hf":
            args = {"pretrained": str(folder / "hf"), "dtype": "float32"}
        found = evaluator.simple_evaluate(
            name, model_args=args | more, tasks=[task | data for task in tasks], batch_size=batch_size, device="cpu",
            apply_chat_template=apply_chat_template, bootstrap_iters=0,
            task_manager=TaskManager(include_defaults=False),
        )  # fmt: skip
        metrics = {
            (task, key): value
            for task, values in found["results"].items()
            for key, value in values.items()
            if "," in key and "stderr" not in key
        }
        answers = {
            task: {sample["doc_id"]: (sample["arguments"], sample["resps"]) for sample in samples}
            for task, samples in found["samples"].items()
        }
        return metrics, answers

    return run


@pytest.fixture(scope="module")
def hf(evaluate):
    torch = pytest.importorskip("torch")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # a tiny model's many small operations: threads only wait for each other
    yield evaluate("hf", CHOICE, ROLLING, WRITING)
    torch.set_num_threads(threads)


@pytest.fixture
def make(folder):
    return lambda **args: harness.HarnessLM(**{"run": str(folder / "run"), "batch_size": 4} | args)


def requests(kind, *arguments):
    return [Instance(kind, doc={}, arguments=pair, idx=i) for i, pair in enumerate(arguments)]


def test_figures_and_answers_equal_those_of_hf(evaluate, hf):
    metrics, answers = evaluate("mla_jax", CHOICE, ROLLING, WRITING)
    assert metrics == pytest.approx(hf[0], rel=1e-5)
    assert len(metrics) == 5
    for doc, (asked, got) in answers["choice"].items():
        for pair, ((logprob, greedy),), ((expected, is_greedy),) in zip(
            asked, got, hf[1]["choice"][doc][1], strict=True
        ):
            assert (logprob, greedy) == (pytest.approx(expected, abs=1e-3), is_greedy), pair
    assert answers["writing"] == hf[1]["writing"]
    written = [text for _, ((text,),) in answers["writing"].values()]
    assert len(set(written)) > 1
    assert written[0].endswith(" bo") and not any("xs" in text or "yell" in text for text in written)


def test_a_hugging_face_folder_is_as_good_as_a_run(evaluate, hf, folder):
    metrics, _ = evaluate("mla_jax", CHOICE, run=str(folder / "hf"), dtype="float32")
    assert metrics == pytest.approx({key: value for key, value in hf[0].items() if key[0] == "choice"})


@pytest.mark.integration
def test_chats_are_written_by_the_template_as_hf_does(evaluate):
    (_, answers), (_, expected) = (evaluate(name, WRITING, apply_chat_template=True) for name in ("mla_jax", "hf"))
    assert answers == expected
    assert "<|user|>" in answers["writing"][0][0][0][0]


LONG = CHOICE | {"doc_to_text": "{{question}} {{text}}"}


def test_what_is_longer_than_the_model_is_refused(evaluate, make):
    with pytest.raises(
        InputError, match=r"a context of .* exceed the model's max_position_embeddings 160; .*truncation"
    ):
        evaluate("mla_jax", LONG)
    prompt = "The grass is green. " * 40
    tokens = 1 + len(TOKENIZER.encode(prompt))  # bos
    with pytest.raises(InputError, match=f"a prompt of {tokens} tokens and 24 new ones exceed"):
        make().generate_until(requests("generate_until", (prompt, {"max_gen_toks": 24})))
    with pytest.raises(InputError, match="and 160 new ones exceed"):
        make(truncation=True).generate_until(requests("generate_until", (prompt, {"max_gen_toks": 160})))


@pytest.mark.integration
def test_what_is_longer_than_the_model_is_cut_as_hf_does(evaluate):
    writing = WRITING | {"doc_to_text": LONG["doc_to_text"]}
    metrics, answers = evaluate("mla_jax", LONG, writing, truncation=True)
    expected, theirs = evaluate("hf", LONG, writing)
    assert metrics == pytest.approx(expected)
    assert answers["writing"] == theirs["writing"]
    for doc, (_, got) in answers["choice"].items():
        assert [one[0][0] for one in got] == pytest.approx([one[0][0] for one in theirs["choice"][doc][1]], abs=1e-3)


def test_texts_of_many_lengths_compile_few_shapes(make):
    words = SENTENCE.format(4) * 20
    pairs = [(words[: 7 * i + 7].rstrip(), " The sky is blue." * (1 + i % 3)) for i in range(40)]
    lm, before = make(), prefill_layer._cache_size()
    assert len(set(map(len, lm.loglikelihood(requests("loglikelihood", *pairs), disable_tqdm=True)))) == 1
    assert prefill_layer._cache_size() - before <= 6  # chunks of 64, 128 and 192 tokens, with and without logits


def test_answers_to_one_context_read_it_once(make, monkeypatch):
    read, prefill = [], generator_module.prefill

    def counted(config, weights, session, prompts, *args, **options):
        read.extend(len(prompt) - len(tokens) for prompt, tokens in zip(prompts, session.tokens, strict=True))
        return prefill(config, weights, session, prompts, *args, **options)

    monkeypatch.setattr(generator_module, "prefill", counted)
    lm, context = make(), SENTENCE.format(123) * 6
    answers = [" The pass key is", " 7 2", " 1", " The sky"]
    pairs = [(start + context, answer) for start in ("2 ", "5 ", "7 ", "9 ") for answer in answers]
    apart = lm.loglikelihood(requests("loglikelihood", *pairs[::4]), disable_tqdm=True)
    read.clear()
    got = lm.loglikelihood(requests("loglikelihood", *pairs), disable_tqdm=True)
    assert [found[0] for found in got[::4]] == pytest.approx([found[0] for found in apart], abs=1e-3)
    texts = [len(TOKENIZER.encode(text)) for text in (context, *answers)]
    assert sum(read) < 4 * (texts[0] + 1) + 4 * (sum(texts[1:]) + len(answers))


def test_what_was_answered_is_kept_when_the_rest_is_interrupted(make, monkeypatch, tmp_path):
    asked = []

    def interrupted(generator, contexts, *args, **options):
        asked.append(len(contexts))
        if len(asked) == 2:
            raise KeyboardInterrupt
        return score(generator, contexts, *args, **options)

    pairs = [(SENTENCE.format(i), " The sky") for i in range(10, 20)]
    expected = make().loglikelihood(requests("loglikelihood", *pairs), disable_tqdm=True)
    monkeypatch.setattr(harness, "score", interrupted)
    for _ in range(2):
        cached = CachingLM(make(), str(tmp_path / "answers.db"))
        with contextlib.suppress(KeyboardInterrupt):
            got = cached.loglikelihood(requests("loglikelihood", *pairs))
    assert asked == [4, 4, 4, 4]  # four of ten and an interruption; the six that were left
    assert [found[0] for found in got] == pytest.approx([found[0] for found in expected], abs=1e-4)


def test_samples_differ_and_greedy_answers_do_not(make):
    lm, prompt = make(), "The pass key is"
    sampled = {"do_sample": True, "temperature": 1.0, "top_k": 50, "max_gen_toks": 8, "until": ["<|im_end|>"]}
    texts = lm.generate_until(requests("generate_until", *[(prompt, sampled)] * 6))
    assert len(set(texts)) > 3
    greedy = lm.generate_until(requests("generate_until", *[(prompt, {"max_gen_toks": 8, "temperature": 0})] * 6))
    assert len(set(greedy)) == 1


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ({"run": ""}, "model_args needs run=RUN_OR_HF_FOLDER"),
        ({"run": "nowhere"}, "nowhere is neither a run .* nor a Hugging Face folder"),
        ({"pretrained": "x", "device": "cpu"}, "model_args has pretrained; the model mla_jax takes run, tokenizer"),
        ({"tokenizer": "nowhere"}, "tokenizer 'nowhere' not found"),
        ({"batch_size": "auto"}, "batch_size must be a number of texts .* got auto"),
        ({"batch_size": 0}, "batch_size must be a number of texts .* got 0"),
        ({"dtype": "int4"}, "model_args dtype must be one of bfloat16"),
        ({"cache_dtype": "int4"}, "model_args cache_dtype must be one of int8"),
        ({"step": 7}, "7"),
    ],
)
def test_wrong_arguments_are_named(make, args, message):
    with pytest.raises(InputError, match=message):
        make(**args)


def test_a_run_without_tokenizer_and_another_tokenizer_are_refused(make, folder, tmp_path):
    shutil.copytree(folder / "run", tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "tokenizer")
    with pytest.raises(InputError, match="tokenizer .*run/tokenizer' not found"):
        make(run=str(tmp_path / "run"))
    load_tokenizer("bytes").save(tmp_path / "bytes")
    with pytest.raises(InputError, match="bytes is not the tokenizer of .*run; name an export of it"):
        make(tokenizer=str(tmp_path / "bytes"))


def test_what_generation_does_not_have_is_refused(make):
    for options, message in (({"num_beams": 4}, "has num_beams"), ({"do_sample": True}, "needs a temperature")):
        with pytest.raises(InputError, match=message):
            make().generate_until(requests("generate_until", ("The", options)))


def test_the_command_line_ends_with_one_line(call, monkeypatch):
    def cli_evaluate():
        model_registry.get("mla_jax")(run="nowhere")

    monkeypatch.setattr("lm_eval.__main__.cli_evaluate", cli_evaluate)
    code, out, err = call(tool)
    assert (code, out) == (1, "")
    assert err.startswith("error: nowhere is neither a run") and err.count("\n") == 1
    monkeypatch.setitem(sys.modules, "lm_eval.__main__", None)
    code, _, err = call(tool)
    assert code == 2 and err.startswith("error: the harness needs an extra (") and "infinitecontext[lm-eval]" in err


@pytest.mark.integration
def test_the_command_line(folder):
    """The harness' own, with all its tasks indexed, which takes its time."""
    data = {"dataset_kwargs": {"data_files": {"test": str(folder / "docs.jsonl")}}}
    (folder / "choice.yaml").write_text(json.dumps(CHOICE | data))  # JSON is YAML

    model_args = f"run={folder / 'run'},tokenizer={folder / 'hf'}"
    command = [sys.executable, "-m", "tools.lm_eval", "--model", "mla_jax", "--model_args", model_args]
    command += ["--tasks", str(folder / "choice.yaml"), "--output_path", str(folder / "out.json")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (written,) = folder.glob("out*.json")
    found = json.loads(written.read_text())
    assert found["results"]["choice"]["sample_len"] == len(DOCS)
    assert found["config"]["model_revision"] == "step 0"
    assert found["config"]["provenance"]["hardware"] == provenance()["hardware"]
