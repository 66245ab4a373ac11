"""The assistant's turns in a rendered conversation: what is learned of a chat.

A template that has `{% generation %}` blocks says so itself. Of others, a turn is what the template adds to the
conversation before it and the prompt for an answer. Templates may write a turn differently once others follow (Qwen
leaves out what was thought, Mistral writes the system message into the last turn of the user), refuse conversations
that stop early, or end the prompt with `<think>`, which no earlier turn has. So where the text of fewer messages is not
the beginning of the whole text, both are compared after the content of one message, which a tag in it finds.
"""

import functools
import re
from collections.abc import Callable
from typing import Any

from mla_jax.data.chat import GENERATION_MARKS, REASONING, Message, render, template_for
from mla_jax.data.tokenizer import Tokenizer
from mla_jax.errors import InputError

_TAG = "\ufdd2"
"""Written into a content to see where the template puts it: a noncharacter, which no text has."""

Span = tuple[int, int]
"""The characters [start, end)."""

Render = Callable[..., str]
"""`render` with everything but the messages given."""


def assistant_spans(tokenizer: Tokenizer, messages: list[Message], **fields: Any) -> tuple[str, list[Span]]:
    """The rendered conversation and the characters of each assistant turn, thoughts and end-of-turn token included.

    Args:
        tokenizer: has the template.
        messages: the conversation.
        fields: what else `render` gives to the template.

    Raises:
        InputError: the template refuses the conversation, there is no assistant turn, or one that cannot be told
            apart.
    """
    write = functools.partial(render, tokenizer, **fields)
    text = write(messages)
    if any(mark in text for mark in (*GENERATION_MARKS, _TAG)):
        raise InputError("the conversation holds noncharacters (U+FDD0 to U+FDD2); take them out")
    if all(message["role"] != "assistant" for message in messages):
        raise InputError("the conversation has no assistant message, so there is nothing to train on")
    if _has_marks(tokenizer, fields):
        return text, _marked_spans(write(messages, marks=True))
    spans, unasked = [], _unasked_prompt(tokenizer)
    for i, message in enumerate(messages):
        if message["role"] == "assistant":
            start = _start(write, messages, text, i, spans[-1][1] if spans else 0)
            end = _end(write, messages, text, i, unasked)
            if start is None or end is None or start > end:
                raise InputError(
                    f"the chat template of tokenizer {tokenizer.source} writes turn {i + 1} differently when turns "
                    "follow, so what the assistant says cannot be told apart; mark it in the template by "
                    "{% generation %}"
                )
            spans.append((start, end))
    return text, spans


def spans_by_turn(tokenizer: Tokenizer, messages: list[Message], spans: list[Span], **fields: Any) -> list[Span]:
    """The spans that `assistant_spans` found, if there is one for each assistant message, in order.

    Raises:
        InputError: the template marks more or less than one text in an assistant message by `{% generation %}`.
    """
    turns = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
    for number, i in enumerate(turns if _has_marks(tokenizer, fields) else []):
        marked = render(tokenizer, _tagged(messages, i, "content", front=True), marks=True, **fields)
        pieces = [piece.rpartition(GENERATION_MARKS[1])[0] for piece in marked.split(GENERATION_MARKS[0])[1:]]
        elsewhere = any(_TAG in piece for piece in (*pieces[:number], *pieces[number + 1 :]))
        if elsewhere or not len(spans) == len(pieces) == len(turns):
            raise InputError(
                f"what has weight 0 cannot be told: the chat template does not mark message {i + 1} as one text by "
                "{% generation %}"
            )
    return spans


def _has_marks(tokenizer: Tokenizer, fields: dict[str, Any]) -> bool:
    template = template_for(tokenizer, fields.get("tools"))
    return re.search(r"\{%[-+]?\s*generation\s*[-+]?%\}", template) is not None


def stop_ids(tokenizer: Tokenizer) -> tuple[int, ...]:
    """The tokens that end an answer: eos and, where it is another, the last that the template writes after a turn.

    A template that refuses a short conversation, or ends turns by plain text, leaves eos alone.
    """
    messages = [{"role": "user", "content": "?"}, {"role": "assistant", "content": "!"}]
    try:
        text, spans = assistant_spans(tokenizer, messages)
    except InputError:
        return (tokenizer.eos_id,)
    after, end = _after(functools.partial(render, tokenizer), messages, 1), spans[-1][1]
    ids = tokenizer.encode(text[len(text) - len(after) : end]) if after is not None and text.endswith(after) else []
    ends = [i for i in ids if i in tokenizer.added_ids]
    return (tokenizer.eos_id,) if ends[-1:] in ([], [tokenizer.eos_id]) else (tokenizer.eos_id, ends[-1])


def _marked_spans(marked: str) -> list[Span]:
    """The characters between each pair of marks, as they count without the marks."""
    spans, length = [], 0
    for piece in marked.split(GENERATION_MARKS[0]):
        inside, found, after = piece.rpartition(GENERATION_MARKS[1])
        if found:
            spans.append((length, length + len(inside)))
        length += len(inside) + len(after)
    if not spans:
        raise InputError("the chat template marks nothing in this conversation by {% generation %}")
    return spans


def _start(write: Render, messages: list[Message], text: str, i: int, previous_end: int) -> int | None:
    """Where turn i begins in the text; None if it cannot be told."""
    before = _rendered(write, messages[:i], add_generation_prompt=True)
    if before is not None and text.startswith(before):
        return len(before)
    said = _said(write, messages, text, i)
    if before is not None and i > 0:
        after, prompt = _after(write, messages, i - 1), _after(write, messages[:i], i - 1, prompt=True)
        if after is not None and prompt is not None and text.endswith(after):
            start = len(text) - len(after) + _shared(after, prompt)
            return start if said is None else min(start, said)
    if said is None:
        return None
    # The template writes no conversation that stops here: look for the prompt of another one.
    prompt, between = _generation_prompt(write), text[previous_end:said]
    for length in range(len(prompt), 0, -1):
        end = between.rfind(prompt[:length]) + length
        if end >= length and (length == len(prompt) or end == len(between)):
            return previous_end + end
    return said


def _end(write: Render, messages: list[Message], text: str, i: int, unasked: str) -> int | None:
    """Where turn i ends in the text; None if it cannot be told."""
    through = _rendered(write, messages[: i + 1])
    if through is not None and text.startswith(through := through.removesuffix(unasked)):
        return len(through)
    after, end_of_turn = _after(write, messages, i), _after(write, messages[: i + 1], i)
    if after is None or end_of_turn is None or not text.endswith(after):
        return None
    return len(text) - len(after) + _shared(after, end_of_turn)


def _shared(a: str, b: str) -> int:
    """Number of characters with which both begin."""
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def _rendered(write: Render, messages: list[Message], *, add_generation_prompt: bool = False) -> str | None:
    """The text of messages; None if the template refuses them."""
    try:
        return write(messages, add_generation_prompt=add_generation_prompt)
    except InputError:
        return None


def _after(write: Render, messages: list[Message], i: int, *, prompt: bool = False) -> str | None:
    """The text after the content of message i; None if the content is not in the text."""
    tagged = _tagged(messages, i, "content", front=False)
    _, found, after = (_rendered(write, tagged, add_generation_prompt=prompt) or "").rpartition(_TAG)
    return after if found else None


def _said(write: Render, messages: list[Message], text: str, i: int) -> int | None:
    """Where the thoughts of message i begin in the text, or its content; None if neither is in it as it is."""
    thoughts = next((key for key in REASONING if messages[i].get(key)), None)
    places = []
    for key in ("content", thoughts):
        if key is not None:
            before, found, _ = (_rendered(write, _tagged(messages, i, key, front=True)) or "").partition(_TAG)
            places += [len(before)] if found and text.startswith(before) else []
    return min(places, default=None)


def _tagged(messages: list[Message], i: int, key: str, *, front: bool) -> list[Message]:
    """The messages with a tag at the front or at the end of what message i has under the key."""
    value = messages[i].get(key) or ""
    parts = [dict(part) for part in value] if isinstance(value, list) else [{"text": value}]
    part = parts[0 if front else -1]
    part["text"] = _TAG + part["text"] if front else part["text"] + _TAG
    tagged = {**messages[i], key: parts if isinstance(value, list) else part["text"]}
    return [*messages[:i], tagged, *messages[i + 1 :]]


def _generation_prompt(write: Render) -> str:
    """The prompt for an answer to a short question; empty if the template has none."""
    question = [{"role": "user", "content": "?"}]
    without, prompted = _rendered(write, question), _rendered(write, question, add_generation_prompt=True)
    if without is None or prompted is None or not prompted.startswith(without):
        return ""
    return prompted[len(without) :]


@functools.lru_cache(maxsize=8)
def _unasked_prompt(tokenizer: Tokenizer) -> str:
    """The prompt for an answer that a template writes at the end of every text, asked or not; mostly there is none.

    It ends a text of no messages, of a question and of an answer, and stands before what the answer says.
    """
    write = functools.partial(render, tokenizer)
    messages = [{"role": "user", "content": "?"}, {"role": "assistant", "content": "!"}]
    ends = [_rendered(write, messages[:n]) for n in range(3)]
    before, found, _ = (_rendered(write, _tagged(messages, 1, "content", front=True)) or "").partition(_TAG)
    end_of_turn = _after(write, messages, 1)
    if not found or None in ends:
        return ""
    backwards = [(end or "")[::-1] for end in (*ends, before)]
    prompt = functools.reduce(lambda a, b: a[: _shared(a, b)], backwards)[::-1]
    return "" if prompt == end_of_turn else prompt  # then all turns end with what may as well begin them
