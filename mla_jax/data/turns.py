"""The assistant's turns in a rendered conversation: what is learned of a chat.

A template that has `{% generation %}` blocks says so itself. Of others, a turn is what the template adds to the
conversation before it and the prompt for an answer. Templates may write a turn differently once others follow (Qwen
leaves out what was thought, Mistral writes the system message into the last turn of the user), refuse conversations
that stop early, or end the prompt with `<think>`, which no earlier turn has. So where the text of fewer messages is not
the beginning of the whole text, both are compared after the content of one message, which a tag in it finds.
"""

import re

from mla_jax.data.chat import GENERATION_MARKS, Message, render
from mla_jax.data.tokenizer import Tokenizer
from mla_jax.errors import InputError

_TAG = "\ufdd2"
"""Written into a content to see where the template puts it: a noncharacter, which no text has."""

Span = tuple[int, int]
"""The characters [start, end)."""


def assistant_spans(tokenizer: Tokenizer, messages: list[Message]) -> tuple[str, list[Span]]:
    """The rendered conversation and the characters of each assistant turn, end-of-turn token included.

    Raises:
        InputError: the template refuses the conversation, there is no assistant turn, or one that cannot be told
            apart.
    """
    text = render(tokenizer, messages)
    if any(mark in text for mark in (*GENERATION_MARKS, _TAG)):
        raise InputError("the conversation holds noncharacters (U+FDD0 to U+FDD2); take them out")
    if all(message["role"] != "assistant" for message in messages):
        raise InputError("the conversation has no assistant message, so there is nothing to train on")
    if re.search(r"\{%[-+]?\s*generation\s*[-+]?%\}", tokenizer.chat_template or ""):
        return text, _marked_spans(render(tokenizer, messages, marks=True))
    spans: list[Span] = []
    for i, message in enumerate(messages):
        if message["role"] == "assistant":
            start = _start(tokenizer, messages, text, i, spans[-1][1] if spans else 0)
            end = _end(tokenizer, messages, text, i)
            if start is None or end is None or start > end:
                raise InputError(
                    f"the chat template of tokenizer {tokenizer.source} writes turn {i + 1} differently when turns "
                    "follow, so what the assistant says cannot be told apart; mark it in the template by "
                    "{% generation %}"
                )
            spans.append((start, end))
    return text, spans


def stop_ids(tokenizer: Tokenizer) -> tuple[int, ...]:
    """The tokens that end an answer: eos and, where it is another, the last that the template writes after a turn.

    A template that refuses a short conversation, or ends turns by plain text, leaves eos alone.
    """
    messages = [{"role": "user", "content": "?"}, {"role": "assistant", "content": "!"}]
    try:
        text, spans = assistant_spans(tokenizer, messages)
    except InputError:
        return (tokenizer.eos_id,)
    after, end = _after(tokenizer, messages, 1), spans[-1][1]
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


def _start(tokenizer: Tokenizer, messages: list[Message], text: str, i: int, previous_end: int) -> int | None:
    """Where turn i begins in the text; None if it cannot be told."""
    before = _rendered(tokenizer, messages[:i], add_generation_prompt=True)
    if before is not None and text.startswith(before):
        return len(before)
    content = _content_start(tokenizer, messages, text, i)
    if before is not None and i > 0:
        after, prompt = _after(tokenizer, messages, i - 1), _after(tokenizer, messages[:i], i - 1, prompt=True)
        if after is not None and prompt is not None and text.endswith(after):
            start = len(text) - len(after) + _shared(after, prompt)
            return start if content is None else min(start, content)
    if content is None:
        return None
    # The template writes no conversation that stops here: look for the prompt of another one.
    prompt, between = _generation_prompt(tokenizer), text[previous_end:content]
    for length in range(len(prompt), 0, -1):
        end = between.rfind(prompt[:length]) + length
        if end >= length and (length == len(prompt) or end == len(between)):
            return previous_end + end
    return content


def _end(tokenizer: Tokenizer, messages: list[Message], text: str, i: int) -> int | None:
    """Where turn i ends in the text; None if it cannot be told."""
    through = _rendered(tokenizer, messages[: i + 1])
    if through is not None and text.startswith(through):
        return len(through)
    after, end_of_turn = _after(tokenizer, messages, i), _after(tokenizer, messages[: i + 1], i)
    if after is None or end_of_turn is None or not text.endswith(after):
        return None
    return len(text) - len(after) + _shared(after, end_of_turn)


def _shared(a: str, b: str) -> int:
    """Number of characters with which both begin."""
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def _rendered(tokenizer: Tokenizer, messages: list[Message], *, add_generation_prompt: bool = False) -> str | None:
    """The text of messages; None if the template refuses them."""
    try:
        return render(tokenizer, messages, add_generation_prompt=add_generation_prompt)
    except InputError:
        return None


def _after(tokenizer: Tokenizer, messages: list[Message], i: int, *, prompt: bool = False) -> str | None:
    """The text after the content of message i; None if the content is not in the text."""
    tagged = _with_content(messages, i, (messages[i].get("content") or "") + _TAG)
    _, found, after = (_rendered(tokenizer, tagged, add_generation_prompt=prompt) or "").rpartition(_TAG)
    return after if found else None


def _content_start(tokenizer: Tokenizer, messages: list[Message], text: str, i: int) -> int | None:
    """Where the content of message i begins in the text; None if it is not in it as it is."""
    tagged = _with_content(messages, i, _TAG + (messages[i].get("content") or ""))
    before, found, _ = (_rendered(tokenizer, tagged) or "").partition(_TAG)
    return len(before) if found and text.startswith(before) else None


def _with_content(messages: list[Message], i: int, content: str) -> list[Message]:
    return [*messages[:i], {**messages[i], "content": content}, *messages[i + 1 :]]


def _generation_prompt(tokenizer: Tokenizer) -> str:
    """The prompt for an answer to a short question; empty if the template has none."""
    question = [{"role": "user", "content": "?"}]
    without = _rendered(tokenizer, question)
    prompted = _rendered(tokenizer, question, add_generation_prompt=True)
    if without is None or prompted is None or not prompted.startswith(without):
        return ""
    return prompted[len(without) :]
