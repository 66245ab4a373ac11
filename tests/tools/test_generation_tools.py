"""The command lines around generation: tools.generate, tools.plan_memory, tools.bench.generate."""

import dataclasses
import json
import re

import pytest

from chat_templates import with_template
from mla_jax.bridge.hf.export import export
from mla_jax.checkpoint.run_folder import save_imported
from mla_jax.data.chat import render
from mla_jax.data.tokenizer import load_tokenizer
from mla_jax.inference.generator import generate
from mla_jax.model.transformer import init_params
from tiny import MODEL
from tools import generate as generate_tool
from tools import plan_memory, plan_serving
from tools.bench import generate as bench_generate

TOKENIZER = load_tokenizer("needle-bpe")
CONFIG = dataclasses.replace(MODEL, initializer_range=0.5)
PARAMS = init_params(CONFIG, 0)
PROMPT = "The grass is green."


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory):
    return save_imported(tmp_path_factory.mktemp("runs") / "run", CONFIG, PARAMS, TOKENIZER)


def expected(text, new=20):
    ids = [TOKENIZER.bos_id, *TOKENIZER.encode(text)]
    return TOKENIZER.decode(generate(CONFIG, PARAMS, [ids], max_new_tokens=new, eos_id=TOKENIZER.eos_id)[0])


def test_a_prompt_is_continued_from_the_argument_a_file_and_stdin(call, run_dir, tmp_path):
    (tmp_path / "prompt.txt").write_text(PROMPT)
    ways = [((PROMPT,), ""), (("--file", tmp_path / "prompt.txt"), ""), ((), PROMPT)]
    for arguments, stdin in ways:
        code, out, err = call(generate_tool, run_dir, *arguments, "--max-new-tokens", 20, stdin=stdin)
        assert code == 0, err
        assert out == expected(PROMPT) + "\n"
        assert f"{len(TOKENIZER.encode(PROMPT)) + 1} tokens in" in err
        assert "20 tokens out, the first 20 after" in err


def test_a_hugging_face_folder_is_as_good_as_a_run(call, tmp_path):
    folder = export(CONFIG, PARAMS, TOKENIZER, tmp_path / "hf")
    code, out, err = call(generate_tool, folder, PROMPT, "--max-new-tokens", 20, "--quiet", "--dtype", "float32")
    assert (code, out, err) == (0, expected(PROMPT) + "\n", "")


def test_a_stop_string_ends_the_text(call, run_dir):
    whole = expected(PROMPT)
    stop = whole[len(whole) // 2 :][:3]
    code, out, _ = call(generate_tool, run_dir, PROMPT, "--max-new-tokens", 20, "--stop", stop)
    assert (code, out) == (0, whole[: whole.index(stop)] + "\n")


def test_a_byte_order_mark_changes_nothing(call, run_dir, tmp_path):
    (tmp_path / "prompt.txt").write_text("\ufeff" + PROMPT, encoding="utf-8")
    for arguments, stdin in ((("--file", tmp_path / "prompt.txt"), ""), ((), "\ufeff" + PROMPT)):
        code, out, _ = call(generate_tool, run_dir, *arguments, "--max-new-tokens", 20, stdin=stdin)
        assert (code, out) == (0, expected(PROMPT) + "\n")


@pytest.mark.parametrize("arguments", [["caf\udce9"], ["--chat", "--system", "\udce9"], ["x", "--stop", "\udce9"]])
def test_arguments_that_are_not_utf8_are_named(call, arguments):
    code, _, err = call(generate_tool, "nowhere", *arguments)
    assert code == 2 and "is not UTF-8 text" in err and err.count("\n") == 1


def special(token, template=""):
    """TOKENIZER with one token of its vocabulary as a special one, and its name."""
    text = TOKENIZER._backend.id_to_token(token)
    return with_template(template.replace("END", text), (text,), "needle-bpe"), text


def test_a_stop_string_may_be_a_special_token(call, tmp_path):
    ids = [TOKENIZER.bos_id, *TOKENIZER.encode(PROMPT)]
    whole = generate(CONFIG, PARAMS, [ids], max_new_tokens=20)[0]
    end = next(token for token in whole[2:] if token not in ids)
    tokenizer, text = special(end)
    run_dir = save_imported(tmp_path / "run", CONFIG, PARAMS, tokenizer)
    code, out, err = call(generate_tool, run_dir, PROMPT, "--max-new-tokens", 20, "--stop", text)
    assert (code, out) == (0, TOKENIZER.decode(whole[: whole.index(end)]) + "\n"), err
    code, out, err = call(generate_tool, run_dir, PROMPT, "--stop", text + "x")
    assert (code, out) == (1, "") and "holds a special token and more" in err


def test_a_chat_stops_at_the_template_s_end_of_turn(call, tmp_path):
    template = (
        "{% for m in messages %}{{ '<|' + m.role + '|>' + m.content + 'END' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
    )
    question = f"<|user|>{PROMPT}"
    for token in range(262, 507):  # one that the model writes at the end of its question
        tokenizer, text = special(token, template)
        ids = tokenizer.encode(f"{question}{text}<|assistant|>")
        if ids.count(token) == 1 and token in (new := generate(CONFIG, PARAMS, [ids], max_new_tokens=20)[0])[1:]:
            break
    run_dir = save_imported(tmp_path / "run", CONFIG, PARAMS, tokenizer)
    code, out, err = call(generate_tool, run_dir, "--chat", "--max-new-tokens", 20, stdin=PROMPT)
    assert (code, out) == (0, tokenizer.decode(new[: new.index(token)]) + "\n"), err


def test_a_chat_follows_the_template_and_remembers(call, run_dir):
    code, out, err = call(
        generate_tool, run_dir, "--chat", "--max-new-tokens", 8, stdin="Hello\n\nWhat?\n/new\nHello\n"
    )
    assert code == 0, err
    first = [{"role": "user", "content": "Hello"}]

    def answer(messages):
        ids = TOKENIZER.encode(render(TOKENIZER, messages, add_generation_prompt=True))
        return TOKENIZER.decode(generate(CONFIG, PARAMS, [ids], max_new_tokens=8, eos_id=TOKENIZER.eos_id)[0])

    one = answer(first)
    two = answer([*first, {"role": "assistant", "content": one}, {"role": "user", "content": "What?"}])
    assert out == f"{one}\n{two}\n{one}\n"


def test_a_chat_that_gets_too_long_says_so_and_goes_on(call, run_dir):
    code, out, err = call(generate_tool, run_dir, "--chat", "--max-new-tokens", 4, stdin="a " * 600 + "\nHello\n")
    assert code == 0
    assert "exceed the model's max_position_embeddings" in err and "/new starts a new conversation" in err
    assert len(out.splitlines()) >= 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["RUN", "x", "--top-p", "2"], "top_p must be above 0 and at most 1"),
        (["RUN", "x", "--top-k", "9"], "set a temperature above 0"),
        (["nowhere", "x", "--max-new-tokens", "0"], "max_new_tokens must be at least 1, got 0"),
        (["RUN", "--file", "missing.txt"], "missing.txt cannot be read as UTF-8 text"),
        (["RUN", "x", "--stop", ""], "a stop string must not be empty"),
        (["nowhere", "x"], "nowhere is neither a run"),
        (["RUN", "x", "--max-new-tokens", "1000"], "exceed the model's max_position_embeddings 512"),
    ],
)
def test_errors_are_one_line(call, run_dir, arguments, message):
    code, out, err = call(generate_tool, *(run_dir if x == "RUN" else x for x in arguments))
    assert (code, out.strip()) == (1, "")
    assert err.startswith("error: ") and message in err and err.count("\n") == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["x", "--file", "y"], "give a prompt or --file, not both"),
        (["x", "--chat"], "--chat reads its turns from stdin"),
        (["x", "--system", "y"], "--system is for --chat"),
    ],
)
def test_arguments_that_do_not_go_together_are_named(call, arguments, message):
    code, _, err = call(generate_tool, "nowhere", *arguments)
    assert code == 2 and message in err


def test_each_turn_of_a_chat_draws_anew(call, run_dir):
    options = "--chat --max-new-tokens 8 --temperature 1".split()
    _, out, _ = call(generate_tool, run_dir, *options, stdin="Hello\n/new\nHello\n")
    assert call(generate_tool, run_dir, *options, stdin="Hello\n/new\nHello\n")[1] == out
    assert len(set(out.splitlines())) > 1


def test_plan_memory_names_what_fits(call):
    code, out, err = call(plan_memory, "model=infinite_1b", "gpu=rtx2070super")
    assert code == 0, err
    rows = [line for line in out.splitlines() if line.startswith("| rtx2070super")]
    assert [row.split("|")[3].strip() for row in rows] == ["16 / 16", "16 / 8", "8 / 8"]
    assert "7.50 MiB" in rows[0] and "3.84 MiB" in rows[1]
    assert int(rows[0].split("|")[7].replace(",", "")) >= 131_072
    assert int(rows[1].split("|")[7].replace(",", "")) == 1_048_576
    code, out, _ = call(plan_memory, "model=nano", "gpu=3", "rows=2", "prefill_chunk=512")
    assert code == 0 and "| 3 | 3 | 32 / 32 |" in out and "2 sequences" in out
    code, out, _ = call(plan_memory, "model=infinite_1b", "gpu=1")
    assert code == 0 and out.splitlines()[2].split("|")[7].strip() == "0"


@pytest.mark.parametrize(
    ("pair", "message"), [("gpu=abacus", "gpu=abacus is unknown"), ("rows=0", "rows must be"), ("model=huge", "huge")]
)
def test_plan_memory_names_what_is_wrong(call, pair, message):
    code, _, err = call(plan_memory, pair)
    assert code == 2 and message in err


def test_plan_serving_prints_the_settings(call):
    code, out, err = call(plan_serving, "max_model_len=131072", "gpu=a100_80gb")
    assert code == 0, err
    assert re.search(r"^\| max-model-len \| 131072 \|", out, re.M)
    assert re.search(r"^\| terminationGracePeriodSeconds \| \d+ \|", out, re.M)


@pytest.mark.parametrize(
    ("pair", "message"), [("gpu=abacus", "gpu=abacus is unknown"), ("max_model_len=x", "max_model_len must be a whole")]
)
def test_plan_serving_names_what_is_wrong(call, pair, message):
    code, _, err = call(plan_serving, pair)
    assert code == 2 and message in err


@pytest.mark.integration
def test_bench_generate_measures_us_and_peers(call, tmp_path):
    path = tmp_path / "bench.json"
    code, _, err = call(
        bench_generate, "model=nano", "model.qk_nope_head_dim=16", "model.qk_rope_head_dim=16", "--decode", "256",
        "512", "--batch", "1", "2", "--read", "1k", "--prefill-chunk", "128", "--peers", "--peer-tokens", "256",
        "--no-ceilings", "--int8-cache", "--json", path,
    )  # fmt: skip
    assert code == 0, err
    rows = json.loads(path.read_text())["rows"]
    assert [(row["what"], row["tokens"]) for row in rows] == [
        *(("decode", n) for n in (256, 512, 256, 512)), ("read", 1024), *[("peer", 256)] * 3
    ]  # fmt: skip
    assert not any("reason" in row for row in rows)
    assert all(row["ms"] > 0 for row in rows if row["what"] != "read")
    assert rows[4]["prefill_tokens"] == 1024 - 128 - 1
    assert rows[4]["cache_bytes"] == 1024 * 2 * (64 + 16 + 8)
