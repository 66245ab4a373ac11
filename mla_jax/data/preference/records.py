"""Records of preference pairs in TRL's formats, checked and encoded as TRL encodes them.

    {"prompt": "...", "chosen": "...", "rejected": "..."}            <bos>prompt chosen<eos>
    {"prompt": [messages], "chosen": [messages], "rejected": [...]}  written by the tokenizer's chat template
    {"chosen": ..., "rejected": ...}                                 the prompt is what both begin with

Conversations may have `tools`, `documents` and `chat_template_kwargs` for the template. An answer begins where the
tokens of prompt and answer cease to be those of the prompt; what ends it is what the template writes, or eos. Formats
and rules: trl 1.16.0, `extract_prompt` and `DPOTrainer`.
"""

import itertools
from typing import Any

import numpy as np

from mla_jax.data.chat import Message, render
from mla_jax.data.jsonl import Document
from mla_jax.data.records import TAKE_OUT, check_rendered, checked_message, is_text, template_fields, without
from mla_jax.data.tokenizer import Tokenizer
from mla_jax.errors import InputError

EXPECTED = 'expected {"prompt": ..., "chosen": ..., "rejected": ...}, text or messages, `prompt` only if they lack it'

_PAIR = ("prompt", "chosen", "rejected")
_ANSWERS = ("chosen", "rejected")
_OF_TEMPLATE = ("tools", "documents", "chat_template_kwargs")


def encode_pair(record: Any, tokenizer: Tokenizer, ignore_fields: tuple[str, ...] = ()) -> list[Document]:
    """Prompt, chosen and rejected answer: token ids int32 of each, and a mask that is true for the answers.

    Args:
        record: a JSON object; keys whose value is None are as if they were not there.
        tokenizer: encodes, and writes conversations by its template.
        ignore_fields: keys of the record and of its messages to leave out.

    Raises:
        InputError: it is no pair, has a field that nothing reads, an answer says nothing, both say the same, or there
            is no prompt.
    """
    if not isinstance(record, dict):
        raise InputError(f"a {type(record).__name__}, {EXPECTED}")
    record = without(record, ignore_fields)
    for key in _ANSWERS:
        if key not in record:
            raise InputError(f"no `{key}` answer; {EXPECTED}")
    contents = {key: _content(key, record.pop(key), ignore_fields) for key in _PAIR if key in record}
    texts = [key for key, content in contents.items() if isinstance(content, str)]
    if 0 < len(texts) < len(contents):
        raise InputError(
            f"`{texts[0]}` is text and others are messages: all must be the same, and a prompt with which both answers "
            "begin is left out"
        )
    for key in record.keys() - set(() if texts else _OF_TEMPLATE):
        raise InputError(f"unknown field `{key}`; {TAKE_OUT}")
    if contents["chosen"] == contents["rejected"]:
        raise InputError("`chosen` and `rejected` are equal, so neither is preferred")
    if "prompt" not in contents:
        contents = _split(contents["chosen"], contents["rejected"])
    for key in _ANSWERS:
        if not any(map(_says_something, contents[key])):
            raise InputError(f"`{key}` is an empty answer")
    if texts:
        bos = [] if tokenizer.bos_id is None else [tokenizer.bos_id]
        return _encode(_ended(contents, tokenizer.special_tokens["eos_token"]), bos, tokenizer)
    return _encode(_rendered(contents, template_fields(record), tokenizer), [], tokenizer)


def _content(key: str, content: Any, ignored: tuple[str, ...]) -> str | list[Message]:
    if is_text(content):
        return content
    if not isinstance(content, list) or not content:
        raise InputError(f"`{key}` must be text or a list of at least one message")
    try:
        return [checked_message(i, message, ignored) for i, message in enumerate(content, 1)]
    except InputError as e:
        raise InputError(f"`{key}`: {e}") from e


def _split(chosen: Any, rejected: Any) -> dict[str, Any]:
    """Prompt and answers of texts or conversations that begin alike, as TRL's `extract_prompt` splits them."""
    end = 0
    for end, (x, y) in enumerate(zip(chosen, rejected, strict=False)):
        if x != y:
            if end and chosen[end - 1] == " ":
                end -= 1  # the space goes with the word behind it
            break
    if isinstance(chosen, list) and not end:
        raise InputError("without a `prompt`, `chosen` and `rejected` must begin with the same message")
    return {"prompt": chosen[:end], "chosen": chosen[end:], "rejected": rejected[end:]}


def _says_something(part: str | Message) -> bool:
    """Whether a character or message of an answer is more than white space."""
    if isinstance(part, str):
        return not part.isspace()
    values = (value for key, value in part.items() if key != "role")
    return any(value.strip() if isinstance(value, str) else value for value in values)


def _ended(texts: dict[str, Any], eos: str) -> list[str]:
    """The prompt, and the prompt with each answer, which eos ends."""
    return [texts["prompt"], *(texts["prompt"] + texts[key].removesuffix(eos) + eos for key in _ANSWERS)]


def _rendered(contents: dict[str, Any], fields: dict[str, Any], tokenizer: Tokenizer) -> list[str]:
    """The prompt with what the template writes before an answer, and the prompt with each answer."""
    prompt = contents["prompt"]
    texts = [render(tokenizer, prompt, add_generation_prompt=True, **fields)]
    for key in _ANSWERS:
        if contents[key][: len(prompt)] == prompt:
            raise InputError(f"`{key}` begins with the prompt; leave `prompt` out")
        messages = [*prompt, *contents[key]]
        texts.append(render(tokenizer, messages, **fields))
        check_rendered(texts[-1], tokenizer, messages, fields)
    return texts


def _encode(texts: list[str], bos: list[int], tokenizer: Tokenizer) -> list[Document]:
    prompt, *answers = ([*bos, *tokenizer.encode(text)] for text in texts)
    end = min(_common_prefix(prompt, answer) for answer in answers)
    if end == 0:
        raise InputError(
            f"the prompt is empty and tokenizer {tokenizer.source} has no bos token, so nothing predicts the answers"
        )
    if answers[0] == answers[1]:
        raise InputError("`chosen` and `rejected` are the same tokens, so neither is preferred")
    for key, answer in zip(_ANSWERS, answers, strict=True):
        if len(answer) == end:
            raise InputError(f"the chat template of tokenizer {tokenizer.source} writes nothing for `{key}`")
    parts = [(prompt[:end], False), *((answer[end:], True) for answer in answers)]
    return [(np.array(ids, np.int32), np.full(len(ids), of_answer)) for ids, of_answer in parts]


def _common_prefix(a: list[int], b: list[int]) -> int:
    """Number of tokens with which both begin."""
    return sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], zip(a, b, strict=False)))
