"""Records: a chat or a completion, checked and encoded with a loss mask.

    {"messages": [{"role": "user", "content": ...}, {"role": "assistant", "content": ...}, ...]}
    {"prompt": ..., "completion": ...}

A chat is written by the tokenizer's chat template; the loss is on what the assistant says, end-of-turn token included.
A completion is <bos>prompt completion<eos> as it stands; the loss is on completion and <eos>.
"""

import json
from typing import Any

import numpy as np

from mla_jax.data.tokenizer import Tokenizer
from mla_jax.data.turns import assistant_spans
from mla_jax.errors import InputError

EXPECTED = 'expected {"messages": [{"role": ..., "content": ...}, ...]} or {"prompt": ..., "completion": ...}'


def encode_line(line: str, tokenizer: Tokenizer) -> tuple[np.ndarray, np.ndarray]:
    """Token ids int32 and loss mask of the record that a line of JSON holds.

    Raises:
        InputError: it is not JSON, no record, or has no token to train on.
    """
    try:
        record = json.loads(line)
    except (ValueError, RecursionError) as e:
        raise InputError(f"not JSON ({e})") from e
    return encode_record(record, tokenizer)


def encode_record(record: Any, tokenizer: Tokenizer) -> tuple[np.ndarray, np.ndarray]:
    """Token ids int32 and loss mask of a record.

    Raises:
        InputError: it is no record, or has no token to train on.
    """
    return _encode(_check(record), tokenizer)


def _check(record: Any) -> dict[str, Any]:
    if not isinstance(record, dict):
        raise InputError(f"a {type(record).__name__}, {EXPECTED}")
    record = {key: value for key, value in record.items() if value is not None}  # as data sets export missing keys
    if "messages" in record:
        messages = record["messages"]
        if not isinstance(messages, list) or not messages:
            raise InputError("`messages` must be a list of at least one message")
        for i, message in enumerate(messages, 1):
            wanted = ("role", "content")
            if isinstance(message, dict) and message.get("tool_calls") and message.get("content") is None:
                wanted = ("role",)  # a tool call needs no words
            if not isinstance(message, dict) or not all(_is_text(message.get(key)) for key in wanted):
                raise InputError(f"message {i} must have `role` and `content`, both text")
    elif not all(_is_text(record.get(key)) for key in ("prompt", "completion")):
        raise InputError(EXPECTED)
    return record


def _is_text(x: Any) -> bool:
    """True for a string that UTF-8 can encode: JSON's escapes can spell half of a surrogate pair."""
    return isinstance(x, str) and x.encode(errors="ignore").decode() == x


def _encode(record: dict[str, Any], tokenizer: Tokenizer) -> tuple[np.ndarray, np.ndarray]:
    """Token ids and loss mask of a document."""
    if "messages" in record:
        text, spans = assistant_spans(tokenizer, record["messages"])
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
    encoded = tokenizer.encode_with_words(record["prompt"] + record["completion"])
    bos = [] if tokenizer.bos_id is None else [tokenizer.bos_id]
    loss_mask = np.concatenate([np.zeros(len(bos), bool), encoded.starts >= len(record["prompt"]), [True]])
    if len(loss_mask) == 1:
        raise InputError("prompt and completion are empty, so there is nothing to train on")
    return np.concatenate([bos, encoded.ids, [tokenizer.eos_id]]).astype(np.int32), loss_mask
