"""Records: a chat or a completion, checked and encoded with a loss mask.

    {"messages": [{"role": "user", "content": ...}, {"role": "assistant", "content": ...}, ...]}
    {"prompt": ..., "completion": ...}

A chat is written by the tokenizer's chat template; the loss is on what the assistant says, end-of-turn token included.
It may have `tools`, `documents` and `chat_template_kwargs` for the template, and a message whatever the template reads.
An assistant message with `weight: 0` (OpenAI's format) has no loss. A completion is <bos>prompt completion<eos> as it
stands; the loss is on completion and <eos>. A field that would change nothing is refused by name.
"""

import json
from collections.abc import Collection
from typing import Any, TypeGuard

import numpy as np

from mla_jax.data.chat import REASONING, RESERVED, Message, unread_field
from mla_jax.data.tokenizer import Tokenizer
from mla_jax.data.turns import assistant_spans, spans_by_turn
from mla_jax.errors import InputError

EXPECTED = 'expected {"messages": [{"role": ..., "content": ...}, ...]} or {"prompt": ..., "completion": ...}'

_CHAT = ("messages", "tools", "documents", "chat_template_kwargs")
_COMPLETION = ("prompt", "completion")
TAKE_OUT = "take it out or name it in data.ignore_fields"


def encode_record(
    record: Any, tokenizer: Tokenizer, ignore_fields: Collection[str] = ()
) -> tuple[np.ndarray, np.ndarray]:
    """Token ids int32 and loss mask of a record.

    Args:
        record: a JSON object; keys whose value is None are as if they were not there.
        tokenizer: encodes, and writes chats by its template.
        ignore_fields: keys of the record and of its messages to leave out.

    Raises:
        InputError: it is no record, has a field that nothing reads, or no token to train on.
    """
    if not isinstance(record, dict):
        raise InputError(f"a {type(record).__name__}, {EXPECTED}")
    record = without(record, ignore_fields)
    for key in record.keys() - set(_CHAT if "messages" in record else _COMPLETION):
        if "messages" in record or all(wanted in record for wanted in _COMPLETION):
            raise InputError(f"unknown field `{key}`; {TAKE_OUT}")
    if "messages" not in record:
        return _encode_completion(record, tokenizer)
    messages = record.pop("messages")
    if not isinstance(messages, list) or not messages:
        raise InputError("`messages` must be a list of at least one message")
    messages = [checked_message(i, message, ignore_fields) for i, message in enumerate(messages, 1)]
    return _encode_chat(messages, template_fields(record), tokenizer)


def without(fields: dict[str, Any], ignored: Collection[str]) -> dict[str, Any]:
    """The fields that have a value, as data sets export missing ones too, and are not ignored."""
    return {key: value for key, value in fields.items() if value is not None and key not in ignored}


def checked_message(i: int, message: Any, ignored: Collection[str]) -> Message:
    """Message i without the ignored keys; a call of a tool and a thought need no content beside them.

    Raises:
        InputError: it is no message.
    """
    if not isinstance(message, dict):
        raise InputError(f"message {i} must have `role` and `content`, both text")
    message = without(message, ignored)
    content = message.get("content", "" if any(message.get(key) for key in ("tool_calls", *REASONING)) else None)
    if isinstance(content, list):
        content = [without(part, ()) if isinstance(part, dict) else part for part in content]
        if not content or not all(_is_part(part) for part in content):
            raise InputError(f'the parts of message {i} must be {{"type": "text", "text": ...}}, one or more')
        message["content"] = content
    elif not is_text(content) or not is_text(message.get("role")):
        raise InputError(f"message {i} must have `role` and `content`, both text")
    for key in REASONING:
        if not is_text(message.get(key, "")):
            raise InputError(f"`{key}` of message {i} must be text")
    if "weight" in message and (message["role"] != "assistant" or message["weight"] not in (0, 1)):
        raise InputError(f"`weight` of message {i}: only what the assistant says has one, and it is 0 or 1")
    return message


def _is_part(part: Any) -> bool:
    return (
        isinstance(part, dict) and part.keys() == {"type", "text"} and part["type"] == "text" and is_text(part["text"])
    )


def is_text(x: Any) -> TypeGuard[str]:
    """True for a string that UTF-8 can encode: JSON's escapes can spell half of a surrogate pair."""
    return isinstance(x, str) and x.encode(errors="ignore").decode() == x


def template_fields(record: dict[str, Any]) -> dict[str, Any]:
    """The fields that a record, of which only they are left, gives to the template beside its messages.

    Raises:
        InputError: a field is not what templates take.
    """
    if isinstance(record.get("tools"), str):  # data sets whose rows have different tools keep them as JSON
        try:
            record["tools"] = json.loads(record["tools"])
        except (ValueError, RecursionError) as e:
            raise InputError(f"`tools` is text that is not JSON ({e})") from e
    for key in ("tools", "documents"):
        value = record.get(key, [])
        if not isinstance(value, list) or not all(isinstance(x, dict) for x in value):
            raise InputError(f"`{key}` must be a list of objects")
    variables = record.get("chat_template_kwargs", {})
    if not isinstance(variables, dict):
        raise InputError("`chat_template_kwargs` must be an object")
    for name in RESERVED:
        if name in variables:
            raise InputError(f"`chat_template_kwargs` must not have `{name}`")
    return record


def check_rendered(text: str, tokenizer: Tokenizer, messages: list[Message], fields: dict[str, Any]) -> None:
    """Raises InputError if the rendered conversation lacks a part of what it was made of, or is no text."""
    if unread := unread_field(tokenizer, messages, **fields):
        raise InputError(f"the chat template of tokenizer {tokenizer.source} does not read {unread}; {TAKE_OUT}")
    for i, message in enumerate(messages, 1):
        if isinstance(message.get("content"), list) and str(message["content"]) in text:
            raise InputError(
                f"the chat template of tokenizer {tokenizer.source} knows no content in parts; make the content of "
                f"message {i} one text"
            )
    if not is_text(text):
        raise InputError("the conversation holds half of a surrogate pair, which no text has")


def _encode_chat(
    messages: list[Message], fields: dict[str, Any], tokenizer: Tokenizer
) -> tuple[np.ndarray, np.ndarray]:
    weights = [message.pop("weight", 1) for message in messages]
    text, spans = assistant_spans(tokenizer, messages, **fields)
    check_rendered(text, tokenizer, messages, fields)
    weights = [weight for weight, message in zip(weights, messages, strict=True) if message["role"] == "assistant"]
    if not any(weights):
        raise InputError("every assistant message has weight 0, so there is nothing to train on")
    if not all(weights):
        turns = spans_by_turn(tokenizer, messages, spans, **fields)
        spans = [span for span, weight in zip(turns, weights, strict=True) if weight]
    encoded = tokenizer.encode_with_words(text)
    loss_mask = np.zeros(len(encoded.ids), bool)
    for start, end in spans:
        loss_mask |= (encoded.ends > start) & (encoded.starts < end)
    if not loss_mask[1:].any():
        raise InputError(
            "there is no token to train on: the assistant says nothing, and the chat template of tokenizer "
            f"{tokenizer.source} writes no end of turn"
        )
    return encoded.ids, loss_mask


def _encode_completion(record: dict[str, Any], tokenizer: Tokenizer) -> tuple[np.ndarray, np.ndarray]:
    if not all(is_text(record.get(key)) for key in _COMPLETION):
        raise InputError(EXPECTED)
    encoded = tokenizer.encode_with_words(record["prompt"] + record["completion"])
    bos = [] if tokenizer.bos_id is None else [tokenizer.bos_id]
    loss_mask = np.concatenate([np.zeros(len(bos), bool), encoded.starts >= len(record["prompt"]), [True]])
    if len(loss_mask) == 1:
        raise InputError("prompt and completion are empty, so there is nothing to train on")
    return np.concatenate([bos, encoded.ids, [tokenizer.eos_id]]).astype(np.int32), loss_mask
