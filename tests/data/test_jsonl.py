"""JSONL documents: what is learned, compared with transformers; what is refused."""

import json
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from mla_jax.data.jsonl import load_documents
from mla_jax.data.tokenizer import Tokenizer, load_tokenizer
from mla_jax.errors import InputError

BYTES = load_tokenizer("bytes")

CHATML = """{{ bos_token }}{% for message in messages %}
    {%- if message['role'] == 'assistant' %}
        {{- '<|assistant|>' }}{% generation %}{{ message['content'] + eos_token }}{% endgeneration %}
    {%- else %}
        {{- '<|' + message['role'] + '|>' + message['content'] + '\\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"""

CHATS = [
    [{"role": "user", "content": "2 + 3?"}, {"role": "assistant", "content": "5"}],
    [
        {"role": "system", "content": "Reply in German, \U0001f642."},
        {"role": "user", "content": "Hello"},
        {"role": "assistant", "content": " Grüß Gott \n"},
        {"role": "user", "content": "5"},
        {"role": "assistant", "content": ""},
        {"role": "user", "content": "unanswered"},
    ],
]


def _write(path, *records, raw: str | None = None) -> str:
    path.write_text(raw if raw is not None else "".join(json.dumps(record) + "\n" for record in records))
    return str(path)


def _with_template(template: str) -> Tokenizer:
    return Tokenizer(BYTES._backend, BYTES._config | {"chat_template": template}, "templated")


@pytest.mark.parametrize("spec", ["bytes", "needle-bpe"])
def test_assistant_turns_are_learned_with_their_end(tmp_path, spec):
    tokenizer = load_tokenizer(spec)
    documents = load_documents(_write(tmp_path / "a.jsonl", *({"messages": chat} for chat in CHATS)), tokenizer)
    text = "<|bos|><|user|>2 + 3?<|eos|><|assistant|>5<|eos|>"
    assert documents[0][0].tolist() == tokenizer.encode(text)
    ids, loss_mask = documents[0]
    assert ids[loss_mask].tolist() == tokenizer.encode("5<|eos|>")
    ids, loss_mask = documents[1]
    assert ids[loss_mask].tolist() == tokenizer.encode(" Grüß Gott \n<|eos|><|eos|>")


def test_the_conversations_of_the_example_fit_the_rows_of_its_command():
    documents = load_documents(str(Path(__file__).parents[2] / "examples" / "chats.jsonl"), BYTES)
    assert len(documents) == 20 and max(len(ids) for ids, _ in documents) <= 256


@pytest.mark.parametrize("chat", CHATS, ids=["short", "long"])
def test_what_is_learned_is_what_transformers_marks(tmp_path, chat):
    tokenizer = _with_template(CHATML)
    tokenizer.save(tmp_path / "tokenizer")
    theirs = AutoTokenizer.from_pretrained(tmp_path / "tokenizer")
    marked = theirs.apply_chat_template(chat, return_dict=True, return_assistant_tokens_mask=True)
    ids, loss_mask = load_documents(_write(tmp_path / "a.jsonl", {"messages": chat}), tokenizer)[0]
    assert ids.tolist() == marked["input_ids"]
    assert loss_mask.astype(int).tolist() == marked["assistant_masks"]


def test_completions_are_learned_with_the_end(tmp_path):
    path = _write(tmp_path / "a.jsonl", {"prompt": "Q: é\nA:", "completion": " 42"})
    ids, loss_mask = load_documents(path, BYTES)[0]
    assert ids.tolist() == [BYTES.bos_id, *"Q: é\nA: 42".encode(), BYTES.eos_id]
    assert ids[loss_mask].tolist() == [*b" 42", BYTES.eos_id]


def test_empty_lines_and_a_byte_order_mark_are_no_trouble(tmp_path):
    path = _write(tmp_path / "a.jsonl", raw='\ufeff\n{"prompt": "a", "completion": "b"}\n\n  \n')
    assert len(load_documents(path, BYTES).lengths) == 1


GOOD = '{"prompt": "a", "completion": "b"}\n'


@pytest.mark.parametrize(
    ("content", "named"),
    [
        ("", "a.jsonl is empty"),
        ("\n \n", "a.jsonl is empty"),
        (GOOD + "\n{oops\n", "a.jsonl, line 3: not JSON"),
        (GOOD + '"text"\n', "line 2: a str, expected"),
        ('{"text": "a"}', "line 1: expected"),
        ('{"prompt": "a"}', "line 1: expected"),
        ('{"prompt": "a", "completion": 3}', "line 1: expected"),
        ('{"prompt": "\\ud83d", "completion": "a"}', "line 1: expected"),
        ("[" * 100_000, "line 1: not JSON"),
        ('{"messages": []}', "line 1: `messages` must be a list of at least one"),
        ('{"messages": [{"role": "user"}]}', "line 1: message 1 must have `role` and `content`"),
        ('{"messages": [{"role": "user", "content": "a"}]}', "line 1: .* no assistant message"),
        ('{"messages": [{"role": "robot", "content": "a"}]}', "line 1: .*unknown role robot"),
    ],
)
def test_bad_lines_are_named(tmp_path, content, named):
    with pytest.raises(InputError, match=named) as error:
        load_documents(_write(tmp_path / "a.jsonl", raw=content), BYTES)
    assert str(tmp_path / "a.jsonl") in str(error.value)


def test_what_is_no_text_file_is_named(tmp_path):
    (tmp_path / "latin.jsonl").write_bytes(b'{"prompt": "\xe9"}')
    with pytest.raises(InputError, match=r"latin.jsonl, line 1: not UTF-8 text"):
        load_documents(str(tmp_path / "latin.jsonl"), BYTES)
    with pytest.raises(InputError, match="is not a file or folder"):
        load_documents(str(tmp_path / "nowhere.jsonl"), BYTES)


def test_a_template_that_rewrites_history_is_refused(tmp_path):
    template = "{% for m in messages %}{{ m['content'] if loop.last else '...' }}{% endfor %}"
    path = _write(tmp_path / "a.jsonl", {"messages": CHATS[1]})
    with pytest.raises(InputError, match="line 1: .* turn 3 differently"):
        load_documents(path, _with_template(template))


def test_a_line_without_a_token_to_train_on_is_named(tmp_path):
    """An answer of nothing, by a template that writes no end of turn; and not even a prompt before <eos>."""
    template = "{% for m in messages %}{{ m['role'] + ': ' + m['content'] }}\n{% endfor %}"
    template += "{% if add_generation_prompt %}assistant: {% endif %}"
    no_end = template.replace("}}\n", "}}")
    question = {"role": "user", "content": "a"}
    good, empty = ({"messages": [question, {"role": "assistant", "content": text}]} for text in ("b", ""))
    path = _write(tmp_path / "a.jsonl", good, empty)
    assert load_documents(path, _with_template(template))[1][1].sum() == 1
    with pytest.raises(InputError, match="line 2: there is no token to train on: the assistant says nothing, and the"):
        load_documents(path, _with_template(no_end))
    no_bos = Tokenizer(BYTES._backend, {k: v for k, v in BYTES._config.items() if k != "bos_token"}, "no-bos")
    path = _write(tmp_path / "b.jsonl", {"prompt": "", "completion": "b"}, {"prompt": "", "completion": ""})
    with pytest.raises(InputError, match="line 2: prompt and completion are empty"):
        load_documents(path, no_bos)


def test_a_changed_file_is_read_again(tmp_path):
    path = _write(tmp_path / "a.jsonl", {"prompt": "a", "completion": "b"})
    assert len(load_documents(path, BYTES).lengths) == 1
    _write(tmp_path / "a.jsonl", {"prompt": "a", "completion": "b"}, {"prompt": "c", "completion": "d"})
    assert len(load_documents(path, BYTES).lengths) == 2
