"""Chat templates: conversations to text, as transformers' `apply_chat_template` renders them."""

import functools
import json
from datetime import datetime
from typing import Any

import jinja2
from jinja2 import nodes, parser
from jinja2.ext import Extension
from jinja2.ext import loopcontrols as LoopControls
from jinja2.sandbox import ImmutableSandboxedEnvironment

from mla_jax.data.tokenizer import Tokenizer
from mla_jax.errors import InputError

Message = dict[str, Any]
"""`role` and `content`, and whatever else the template reads."""


class _Generation(Extension):
    """Accepts `{% generation %}`, by which templates mark what the assistant says, and renders what is inside."""

    tags = {"generation"}  # noqa: RUF012 - Jinja's way to declare it

    def parse(self, parser: parser.Parser) -> list[nodes.Node]:
        """The block's content."""
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


@functools.lru_cache(maxsize=8)
def _compiled(template: str) -> jinja2.Template:
    def raise_exception(message: str) -> None:
        raise jinja2.TemplateError(message)

    def to_json(x: Any, **options: Any) -> str:
        return json.dumps(x, **{"ensure_ascii": False, **options})  # Jinja's own filter escapes HTML

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, LoopControls]
    )
    environment.filters["tojson"] = to_json
    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    return environment.from_string(template)


def render(tokenizer: Tokenizer, messages: list[Message], *, add_generation_prompt: bool = False) -> str:
    """Text of a conversation, special tokens written out; `tokenizer.encode` of it gives the ids.

    Raises:
        InputError: the tokenizer has no chat template, or the template refuses the messages.
    """
    if tokenizer.chat_template is None:
        raise InputError(f"tokenizer {tokenizer.source} has no chat template, so it cannot write chats")
    try:
        return _compiled(tokenizer.chat_template).render(
            messages=messages, add_generation_prompt=add_generation_prompt, **tokenizer.special_tokens
        )
    except Exception as e:  # whatever a template does wrong with these messages
        raise InputError(f"the chat template of tokenizer {tokenizer.source} refuses this conversation ({e})") from e


def assistant_spans(tokenizer: Tokenizer, messages: list[Message]) -> tuple[str, list[tuple[int, int]]]:
    """The rendered conversation and the characters [start, end) of each assistant turn, end-of-turn token included.

    A turn is what the template adds to the conversation before it and the prompt for an answer.

    Raises:
        InputError: no assistant turn, or a template that writes earlier turns differently once others follow.
    """
    text = render(tokenizer, messages)
    spans = []
    for i, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        before = render(tokenizer, messages[:i], add_generation_prompt=True)
        through = render(tokenizer, messages[: i + 1])
        if not (through.startswith(before) and text.startswith(through)):
            raise InputError(
                f"the chat template of tokenizer {tokenizer.source} writes turn {i + 1} differently when turns follow, "
                "so what the assistant says cannot be told apart"
            )
        spans.append((len(before), len(through)))
    if not spans:
        raise InputError("the conversation has no assistant message, so there is nothing to train on")
    return text, spans
