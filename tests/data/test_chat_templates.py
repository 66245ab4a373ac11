"""What is learned of chats under the habits of published templates; what transformers renders is not refused."""

import json
import logging

import pytest
from transformers import AutoTokenizer

from chat_templates import END_OF_TURN, NAMES, chat_tokenizer, with_template
from mla_jax.data.chat import render
from mla_jax.data.jsonl import load_documents
from mla_jax.data.tokenizer import Tokenizer, load_tokenizer
from mla_jax.data.turns import stop_ids
from mla_jax.errors import InputError

USER, AGAIN = {"role": "user", "content": "Why?"}, {"role": "user", "content": "<b>And</b>?"}
ANSWER, SECOND = {"role": "assistant", "content": "<b>Because</b>."}, {"role": "assistant", "content": " Überall \n"}
SYSTEM = {"role": "system", "content": "Be brief."}
THOUGHT = {"role": "assistant", "content": "<think>\nHm.\n</think>\n\nSo."}
CHATS = {
    "one turn": [USER, ANSWER],
    "two turns": [USER, ANSWER, AGAIN, SECOND],
    "system": [SYSTEM, USER, ANSWER, AGAIN, SECOND],
    "unanswered": [USER, ANSWER, AGAIN],
    "assistant opens": [ANSWER, USER, SECOND],
    "assistant opens after system": [SYSTEM, ANSWER, USER, SECOND],
    "thinks": [USER, THOUGHT, AGAIN, THOUGHT],
    "tools": [USER, THOUGHT, {"role": "tool", "content": "4"}, ANSWER, AGAIN, SECOND],
}


def _load(tmp_path, tokenizer: Tokenizer, *chats, **options):
    path = tmp_path / "chats.jsonl"
    path.write_text("".join(json.dumps({"messages": chat}) + "\n" for chat in chats))
    return load_documents(str(path), tokenizer, **options)


def _theirs(tmp_path, tokenizer: Tokenizer):
    tokenizer.save(tmp_path / "tokenizer")
    return AutoTokenizer.from_pretrained(tmp_path / "tokenizer")


def _learned(tokenizer: Tokenizer, ids, loss_mask) -> list[str]:
    """The text of each run of learned tokens, special tokens written out."""
    runs, last = [], False
    for token, learned in zip(ids.tolist(), loss_mask.tolist(), strict=True):
        if learned and not last:
            runs.append([])
        if learned:
            runs[-1].append(token)
        last = learned
    return [tokenizer._backend.decode(run, skip_special_tokens=False) for run in runs]


@pytest.mark.parametrize("chat", CHATS)
@pytest.mark.parametrize("name", NAMES)
def test_what_transformers_renders_is_taken_and_nothing_else(tmp_path, name, chat):
    tokenizer = chat_tokenizer(name)
    theirs = _theirs(tmp_path, tokenizer)
    try:
        expected = theirs.apply_chat_template(CHATS[chat], return_dict=True)["input_ids"]
    except Exception as e:
        cause = str(e)
        with pytest.raises(InputError) as error:
            _load(tmp_path, tokenizer, CHATS[chat])
        assert f"line 1: the chat template of tokenizer templated refuses this conversation ({cause})" in str(
            error.value
        )
        return
    ids, loss_mask = _load(tmp_path, tokenizer, CHATS[chat])[0]
    assert ids.tolist() == expected
    assert len(_learned(tokenizer, ids, loss_mask)) == sum(m["role"] == "assistant" for m in CHATS[chat])


@pytest.mark.parametrize(
    ("name", "chat", "learned"),
    [
        ("chatml", "two turns", ["<b>Because</b>.<|im_end|>\n", " Überall \n<|im_end|>\n"]),
        ("chatml", "assistant opens", ["<b>Because</b>.<|im_end|>\n", " Überall \n<|im_end|>\n"]),
        ("llama3", "two turns", ["<b>Because</b>.<|eot_id|>", "Überall<|eot_id|>"]),
        ("llama3", "assistant opens", ["<b>Because</b>.<|eot_id|>", "Überall<|eot_id|>"]),
        ("llama3", "assistant opens after system", ["<b>Because</b>.<|eot_id|>", "Überall<|eot_id|>"]),
        ("gemma", "two turns", ["<b>Because</b>.<end_of_turn>\n", "Überall<end_of_turn>\n"]),
        ("gemma", "assistant opens", ["<b>Because</b>.<end_of_turn>\n", "Überall<end_of_turn>\n"]),
        ("mistral", "two turns", [" <b>Because</b>.<|eos|>", "  Überall \n<|eos|>"]),
        ("mistral", "system", [" <b>Because</b>.<|eos|>", "  Überall \n<|eos|>"]),
        ("deepseek-r1", "two turns", ["<b>Because</b>.<|eos|>", " Überall \n<|eos|>"]),
        ("deepseek-r1", "thinks", ["\n\nSo.<|eos|>", "\n\nSo.<|eos|>"]),
        ("deepseek-r1", "assistant opens", ["<b>Because</b>.<|eos|>", " Überall \n<|eos|>"]),
        # The prompt of the last turn holds "<think>\n"; earlier turns are written without it.
        ("qwen3", "two turns", ["<b>Because</b>.<|im_end|>\n", "\n</think>\n\n Überall \n<|im_end|>\n"]),
        ("qwen3", "thinks", ["So.<|im_end|>\n", "Hm.\n</think>\n\nSo.<|im_end|>\n"]),
        ("qwen3", "unanswered", ["<b>Because</b>.<|im_end|>\n"]),
        (
            "qwen3", "tools",
            ["So.<|im_end|>\n", "<b>Because</b>.<|im_end|>\n", "\n</think>\n\n Überall \n<|im_end|>\n"],
        ),
        ("harmony", "two turns", ["<|message|><b>Because</b>.<|end|>", "<|message|> Überall \n<|end|>"]),
        # What it writes at the end of every text is the prompt of an answer, which is learned nowhere.
        ("prompting", "two turns", ["<b>Because</b>.<|im_end|>\n", " Überall \n<|im_end|>\n"]),
        ("prompting", "unanswered", ["<b>Because</b>.<|im_end|>\n"]),
        ("marked", "two turns", ["...<|im_end|>", " Überall \n<|im_end|>"]),
    ],
)  # fmt: skip
def test_the_answers_are_learned_with_their_end(tmp_path, name, chat, learned):
    tokenizer = chat_tokenizer(name)
    assert _learned(tokenizer, *_load(tmp_path, tokenizer, CHATS[chat])[0]) == learned


@pytest.mark.parametrize("chat", ["two turns", "assistant opens", "unanswered"])
def test_generation_marks_are_what_is_learned(tmp_path, chat):
    tokenizer = chat_tokenizer("marked")
    theirs = _theirs(tmp_path, tokenizer)
    marked = theirs.apply_chat_template(CHATS[chat], return_dict=True, return_assistant_tokens_mask=True)
    ids, loss_mask = _load(tmp_path, tokenizer, CHATS[chat])[0]
    assert ids.tolist() == marked["input_ids"]
    assert loss_mask.astype(int).tolist() == marked["assistant_masks"]


@pytest.mark.parametrize("name", NAMES)
def test_keys_without_a_value_are_as_if_they_were_not_there(tmp_path, name):
    tokenizer = chat_tokenizer(name)
    chat = [dict.fromkeys(("name", "tool_calls", "tool_call_id")) | message for message in (USER, ANSWER)]
    documents = _load(tmp_path, tokenizer, chat, [USER, ANSWER])
    assert documents[0][0].tolist() == documents[1][0].tolist()
    assert documents[0][1].tolist() == documents[1][1].tolist()
    assert render(tokenizer, chat) == _theirs(tmp_path, tokenizer).apply_chat_template(chat, tokenize=False)


def test_a_tool_call_needs_no_content(tmp_path):
    tokenizer = chat_tokenizer("deepseek-r1")
    call = {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "add"}}]}
    ids, loss_mask = _load(tmp_path, tokenizer, [USER, call])[0]
    assert _learned(tokenizer, ids, loss_mask) == ["add<|eos|>"]


def test_a_template_that_is_not_jinja_is_named(tmp_path):
    with pytest.raises(InputError, match=r"chat template of tokenizer templated is not Jinja \(line 1: .*\)"):
        _load(tmp_path, with_template("{% for m in messages %}"), [USER, ANSWER])


def test_bad_lines_are_skipped_on_request_and_counted(tmp_path, caplog):
    tokenizer = chat_tokenizer("gemma")
    bad = [[SYSTEM, USER, ANSWER], [USER]]
    with caplog.at_level(logging.WARNING):
        documents = _load(tmp_path, tokenizer, [USER, ANSWER], *bad, [USER, SECOND], on_bad_line="skip")
    assert len(documents.lengths) == 2
    (record,) = caplog.records
    assert "skipped 2 of 4 lines that cannot be used; the first is line 2: the chat template" in record.getMessage()
    assert "System role not supported" in record.getMessage()
    with pytest.raises(InputError, match=r"none of the 2 lines can be used; the first is line 1: .*not supported"):
        _load(tmp_path, tokenizer, *bad, on_bad_line="skip")
    with pytest.raises(InputError, match="line 2: .*not supported"):
        _load(tmp_path, tokenizer, [USER, ANSWER], *bad)


@pytest.mark.parametrize("name", NAMES)
def test_an_answer_ends_with_the_template_s_end_of_turn(name):
    tokenizer = chat_tokenizer(name)
    (end,) = tokenizer.encode(END_OF_TURN[name])
    assert stop_ids(tokenizer) == tuple(dict.fromkeys([tokenizer.eos_id, end]))


@pytest.mark.parametrize(
    "template",
    [
        "{{ raise_exception('no') }}",
        "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '\\n' }}{% endfor %}",
        "{% for m in messages %}{{ '<|user|>' + m['content'] }}{% endfor %}",
    ],
)
def test_without_an_end_of_turn_eos_ends_answers(template):
    tokenizer = with_template(template)
    assert stop_ids(tokenizer) == (tokenizer.eos_id,)
    plain = load_tokenizer("bytes")
    assert stop_ids(plain) == (plain.eos_id,)
