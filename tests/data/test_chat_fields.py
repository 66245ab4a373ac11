"""Fields of records beside roles and texts: written as transformers writes them, given no loss, or refused by name."""

import functools
import json
import tempfile
from typing import Any

import pytest
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from chat_templates import CHATML, HERMES, NAMES, chat_tokenizer, with_template
from mla_jax.config import JsonlDataConfig
from mla_jax.data.chat import render
from mla_jax.data.jsonl import load_documents
from mla_jax.data.records import encode_record
from mla_jax.data.tokenizer import Tokenizer, load_tokenizer
from mla_jax.errors import InputError

USER, ANSWER = {"role": "user", "content": "2 + 3 < 6?"}, {"role": "assistant", "content": " Ja, überall \n"}
TOOL = {
    "type": "function",
    "function": {"name": "add", "description": "<b>Adds</b> Zahlen für", "parameters": {"type": "object"}},
}
CALL = {
    "role": "assistant",
    "content": "",
    "tool_calls": [
        {"id": "1", "type": "function", "function": {"name": "add", "arguments": {"x": 2, "y": None, "z": "<ü>"}}}
    ],
}
RESULT = {"role": "tool", "name": "add", "tool_call_id": "1", "content": "5"}
DOCUMENTS = [{"title": "A & B", "text": "Größe"}, {"title": "", "text": "x"}]


def parts(*texts: str) -> list[dict]:
    return [{"type": "text", "text": text} for text in texts]


FIELDS: dict[str, dict[str, Any]] = {
    "tools": {"messages": [USER, ANSWER], "tools": [TOOL]},
    "no tools": {"messages": [USER, ANSWER], "tools": []},
    "documents": {"messages": [USER, ANSWER], "documents": DOCUMENTS},
    "variables": {"messages": [USER, ANSWER], "chat_template_kwargs": {"enable_thinking": False, "bos_token": "<B>"}},
    "tool calls": {"messages": [USER, CALL, RESULT, ANSWER], "tools": [TOOL]},
    "reasoning_content": {"messages": [USER, {**ANSWER, "reasoning_content": "Hm, <5>."}]},
    "reasoning": {"messages": [USER, {**ANSWER, "reasoning": "Hm."}, USER, {**ANSWER, "reasoning": "Aha."}]},
    "thinking": {"messages": [USER, {**ANSWER, "thinking": "Hm.", "reasoning": "other"}]},
    "null": {"messages": [{**USER, "name": None}, {**ANSWER, "reasoning": None}], "tools": None},
    "name": {"messages": [{**USER, "name": "Ada"}, ANSWER]},
    "parts": {"messages": [{**USER, "content": parts("2 ", "+ 3?")}, {**ANSWER, "content": parts("5", "!")}]},
}


@functools.cache
def theirs(tokenizer: Tokenizer) -> PreTrainedTokenizerBase:
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save(folder)
        return AutoTokenizer.from_pretrained(folder)


@functools.cache
def ours(name: str) -> Tokenizer:
    return chat_tokenizer(name)


def their_text(tokenizer: Tokenizer, record: dict, **options) -> str | None:
    """What transformers makes of a record, called as trainers call it; None if the template refuses."""
    fields = {key: value for key, value in record.items() if key not in ("messages", "chat_template_kwargs")}
    try:
        return theirs(tokenizer).apply_chat_template(
            record["messages"], tokenize=False, **fields, **record.get("chat_template_kwargs", {}), **options
        )
    except Exception:
        return None


def our_text(tokenizer: Tokenizer, record: dict, **options) -> str | None:
    try:
        return render(tokenizer, **record, **options)
    except InputError:
        return None


def learned(tokenizer: Tokenizer, record: dict, **options) -> list[str]:
    """The text of each run of tokens with a loss."""
    ids, loss_mask = encode_record(record, tokenizer, **options)
    runs, last = [], False
    for token, has_loss in zip(ids.tolist(), loss_mask.tolist(), strict=True):
        if has_loss:
            runs = runs if last else [*runs, []]
            runs[-1].append(token)
        last = has_loss
    return [tokenizer._backend.decode(run, skip_special_tokens=False) for run in runs]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("fields", FIELDS)
def test_every_field_is_written_as_transformers_writes_it(name, fields):
    for prompt in (False, True):
        expected = their_text(ours(name), FIELDS[fields], add_generation_prompt=prompt)
        assert our_text(ours(name), FIELDS[fields], add_generation_prompt=prompt) == expected


def test_each_field_is_written_by_some_template():
    plain = {name: our_text(ours(name), {"messages": [USER, ANSWER]}) for name in NAMES}
    for fields in ("tools", "documents", "reasoning", "reasoning_content", "thinking", "tool calls", "parts"):
        texts = {name: our_text(ours(name), FIELDS[fields]) for name in NAMES}
        assert any(text is not None and text != plain[name] for name, text in texts.items()), fields


def test_a_tokenizer_with_a_template_for_tools_uses_it(tmp_path):
    tokenizer = ours("chatml")
    templates = [{"name": "default", "template": CHATML}, {"name": "tool_use", "template": HERMES}]
    in_config = Tokenizer(tokenizer._backend, tokenizer._config | {"chat_template": templates}, "named")
    in_config.save(tmp_path / "config")
    tokenizer.save(tmp_path / "files")
    (tmp_path / "files" / "additional_chat_templates").mkdir()
    (tmp_path / "files" / "additional_chat_templates" / "tool_use.jinja").write_text(HERMES)
    (tmp_path / "files" / "chat_template.jinja").write_text(CHATML)
    for folder in ("config", "files"):
        loaded, they = load_tokenizer(str(tmp_path / folder)), AutoTokenizer.from_pretrained(tmp_path / folder)
        for tools in (None, [TOOL]):
            text = they.apply_chat_template([USER, ANSWER], tools=tools, tokenize=False)
            assert render(loaded, [USER, ANSWER], tools=tools) == text
            assert ("# Tools" in text) == (tools is not None)


def test_what_is_set_in_a_generation_block_stays_there():
    template = (
        "{% set x = 'out' %}{% for m in messages %}{% generation %}{% set x = 'in' %}{{ x }}{% endgeneration %}{{ x }}"
    )
    tokenizer = with_template(template + "{% endfor %}")
    assert our_text(tokenizer, FIELDS["name"]) == their_text(tokenizer, FIELDS["name"]) == "inout" * 2


@pytest.mark.parametrize(
    ("name", "fields", "expected"),
    [
        ("hermes", "reasoning_content", ["<think>\nHm, <5>.\n</think>\n\n Ja, überall \n<|im_end|>\n"]),
        (
            "hermes", "reasoning",  # a template that leaves out earlier thoughts
            [" Ja, überall \n<|im_end|>\n", "<think>\nAha.\n</think>\n\n Ja, überall \n<|im_end|>\n"],
        ),
        (
            "harmony", "thinking",
            ["<|channel|>analysis<|message|>Hm.<|end|><|start|>assistant<|message|> Ja, überall \n<|end|>"],
        ),
        (
            "hermes", "tool calls",
            [
                '<tool_call>add{\n "x": 2,\n "y": null,\n "z": "<ü>"\n}</tool_call><|im_end|>\n',
                " Ja, überall \n<|im_end|>\n",
            ],
        ),
        ("granite", "documents", [" Ja, überall \n<|eos|>\n"]),
        ("granite", "parts", ["5!<|eos|>\n"]),
    ],
)  # fmt: skip
def test_thoughts_calls_and_parts_are_what_the_assistant_says(name, fields, expected):
    assert learned(ours(name), FIELDS[fields]) == expected


def test_variables_of_the_template_change_the_prompt_that_is_not_learned():
    off = {"chat_template_kwargs": {"enable_thinking": False}}
    thought = {"role": "assistant", "content": "<think>\n\n</think>\n\n5"}
    assert learned(ours("hermes"), {"messages": [USER, thought]}) == [thought["content"] + "<|im_end|>\n"]
    assert learned(ours("hermes"), {"messages": [USER, thought]} | off) == ["5<|im_end|>\n"]


def test_the_thoughts_of_a_turn_that_opens_a_conversation_are_learned():
    """By a template that writes no empty conversation, so that nothing stands before the turn."""
    template = (
        "{% if messages[0].role %}{% for m in messages %}{{ m.reasoning_content or '' }}|{{ m.content + eos_token }}"
    )
    record = {"messages": [{**ANSWER, "reasoning": "Hm."}, USER, ANSWER]}
    assert learned(with_template(template + "{% endfor %}{% endif %}"), record)[0] == "Hm.| Ja, überall \n<|eos|>"


TWO = [USER, {**ANSWER, "weight": 0}, USER, {"role": "assistant", "content": "yes", "weight": 1}]


@pytest.mark.parametrize("name", NAMES)
def test_messages_of_weight_0_have_no_loss(name):
    tokenizer = ours(name)
    unweighted = [{key: message[key] for key in ("role", "content")} for message in TWO]
    both = learned(tokenizer, {"messages": unweighted})
    assert len(both) == 2 and learned(tokenizer, {"messages": TWO}) == both[1:]
    first = [*TWO[:3], {**TWO[3], "weight": 0.0}]
    first[1] = {**ANSWER, "weight": None}
    assert learned(tokenizer, {"messages": first}) == both[:1]
    assert encode_record({"messages": TWO}, tokenizer)[0].tolist() == (
        encode_record({"messages": unweighted}, tokenizer)[0].tolist()
    )


def chat(**changes) -> dict:
    """A chat with changes of its answer."""
    return {"messages": [USER, ANSWER | changes]}


REFUSED = [
    ("chatml", {**FIELDS["tools"]}, "the chat template of tokenizer templated does not read `tools`; take it out or"),
    ("chatml", FIELDS["documents"], "does not read `documents`"),
    ("chatml", chat() | {"chat_template_kwargs": {"enable_thinking": False}}, "does not read `enable_thinking`"),
    ("chatml", FIELDS["tool calls"] | {"tools": None}, "does not read `tool_calls` of message 2"),
    ("chatml", FIELDS["name"], "does not read `name` of message 1"),
    *(("chatml", chat(**{key: "Hm."}), f"does not read `{key}` of message 2") for key in ("reasoning", "thinking")),
    ("harmony", chat(mood="glad"), "does not read `mood` of message 2"),
    ("chatml", chat() | {"source": "x"}, "unknown field `source`; take it out or name it in data.ignore_fields"),
    ("chatml", chat() | {"prompt": "x"}, "unknown field `prompt`"),
    ("chatml", {"prompt": "a", "completion": "b", "weight": 0}, "unknown field `weight`"),
    ("hermes", chat() | {"tools": "{oops"}, "`tools` is text that is not JSON"),
    ("hermes", chat() | {"tools": [1]}, "`tools` must be a list of objects"),
    ("granite", chat() | {"documents": {"text": "x"}}, "`documents` must be a list of objects"),
    ("hermes", chat() | {"chat_template_kwargs": ["x"]}, "`chat_template_kwargs` must be an object"),
    ("hermes", chat() | {"chat_template_kwargs": {"tools": []}}, "`chat_template_kwargs` must not have `tools`"),
    ("hermes", chat(weight=0.5), "`weight` of message 2: only what the assistant says has one, and it is 0 or 1"),
    ("hermes", {"messages": [USER | {"weight": 0}, ANSWER]}, "`weight` of message 1: only what the assistant says"),
    ("hermes", chat(weight=0), "every assistant message has weight 0"),
    ("hermes", chat(reasoning=3), "`reasoning` of message 2 must be text"),
    ("hermes", chat(reasoning="\ud83d"), "`reasoning` of message 2 must be text"),
    ("hermes", chat() | {"tools": [{"name": "\ud83d"}]}, "half of a surrogate pair"),
    ("granite", chat(content=[]), "the parts of message 2 must be"),
    ("granite", chat(content=[{"type": "image", "text": "x"}]), "the parts of message 2 must be"),
    ("chatml", FIELDS["parts"], "refuses this conversation .*concatenate"),
]


@pytest.mark.parametrize(("name", "record", "message"), REFUSED, ids=[message for _, _, message in REFUSED])
def test_what_would_be_lost_is_refused_by_name_with_its_line(tmp_path, name, record, message):
    (tmp_path / "a.jsonl").write_text(json.dumps({"messages": [USER, ANSWER]}) + "\n" + json.dumps(record) + "\n")
    with pytest.raises(InputError, match=f"a.jsonl, line 2: .*{message}"):
        load_documents(str(tmp_path / "a.jsonl"), ours(name))


def test_what_changes_nothing_because_it_is_empty_or_an_id_is_taken():
    empty = chat(tool_calls=[], name="", reasoning="") | {"tools": [], "documents": [], "chat_template_kwargs": {}}
    assert learned(ours("chatml"), empty) == learned(ours("chatml"), chat())
    result = {"role": "tool", "tool_call_id": "1", "content": "5"}
    assert learned(ours("chatml"), {"messages": [USER, ANSWER, result]})


def test_a_template_that_writes_whole_messages_reads_every_key():
    tokenizer = with_template("{% for m in messages %}{{ m | tojson }}{{ eos_token }}{% endfor %}")
    assert learned(tokenizer, chat(mood="glad")) == [
        json.dumps(ANSWER | {"mood": "glad"}, ensure_ascii=False) + "<|eos|>"
    ]


def test_a_list_that_a_template_writes_as_it_stands_is_refused():
    tokenizer = with_template("{% for m in messages %}{{ m.content }}{{ eos_token }}{% endfor %}")
    with pytest.raises(InputError, match="knows no content in parts; make the content of message 1 one text"):
        encode_record(FIELDS["parts"], tokenizer)


def test_weight_0_is_refused_where_it_is_not_plain_what_it_is_of():
    template = "{% for m in messages %}{% if m.content %}{% generation %}{{ m.content }}{% endgeneration %}{% endif %}"
    silent = {"role": "assistant", "content": ""}
    for messages in ([USER, silent, {**ANSWER, "weight": 0}], [USER, {**silent, "weight": 0}, ANSWER, ANSWER]):
        with pytest.raises(
            InputError, match="weight 0 cannot be told: the chat template does not mark message 2 as one"
        ):
            encode_record({"messages": messages}, with_template(template + "{% endfor %}"))


def test_tools_may_be_json_in_text_as_data_sets_keep_them():
    assert learned(ours("hermes"), FIELDS["tool calls"]) == learned(
        ours("hermes"), FIELDS["tool calls"] | {"tools": json.dumps([TOOL])}
    )


def test_fields_are_ignored_on_request(tmp_path):
    record = chat(mood="glad", name="Ada") | {"id": 7, "tools": [TOOL]}
    data = JsonlDataConfig(tokenizer="bytes", path="x", ignore_fields=["mood", "name", "id", "tools"])
    assert learned(ours("chatml"), record, ignore_fields=data.ignore_fields) == learned(ours("chatml"), chat())
    (tmp_path / "a.jsonl").write_text(json.dumps(record))
    with pytest.raises(InputError, match="line 1: unknown field `id`"):
        load_documents(str(tmp_path / "a.jsonl"), ours("chatml"))
    assert (
        load_documents(str(tmp_path / "a.jsonl"), ours("chatml"), "error", tuple(data.ignore_fields)).lengths.size == 1
    )


def test_a_changed_template_for_tools_is_another_definition():
    """So that what was encoded by the one before is not taken from the cache."""
    templates = [
        [{"name": "default", "template": CHATML}, {"name": "tool_use", "template": t}] for t in (HERMES, CHATML)
    ]
    one, other = (
        Tokenizer(ours("chatml")._backend, ours("chatml")._config | {"chat_template": t}, "x") for t in templates
    )
    assert one.definition != other.definition and one.chat_template == other.chat_template
