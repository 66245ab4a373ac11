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


GENERATION_MARKS = ("\ufdd0", "\ufdd1")
"""What `render` writes around `{% generation %}` blocks on request: noncharacters, which no text has."""


class _Generation(Extension):
    """Accepts `{% generation %}`, by which templates mark what the assistant says, and renders what is inside."""

    tags = {"generation"}  # noqa: RUF012 - Jinja's way to declare it
    marks = ("", "")

    def parse(self, parser: parser.Parser) -> list[nodes.Node]:
        """The block's content between the two marks."""
        next(parser.stream)
        start, end = (nodes.Output([nodes.TemplateData(mark)]) for mark in self.marks)
        return [start, *parser.parse_statements(("name:endgeneration",), drop_needle=True), end]


class _MarkedGeneration(_Generation):
    marks = GENERATION_MARKS


@functools.lru_cache(maxsize=8)
def _compiled(template: str, marks: bool) -> jinja2.Template:
    def raise_exception(message: str) -> None:
        raise jinja2.TemplateError(message)

    def to_json(x: Any, **options: Any) -> str:
        return json.dumps(x, **{"ensure_ascii": False, **options})  # Jinja's own filter escapes HTML

    generation = _MarkedGeneration if marks else _Generation
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[generation, LoopControls]
    )
    environment.filters["tojson"] = to_json
    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    return environment.from_string(template)


def render(
    tokenizer: Tokenizer, messages: list[Message], *, add_generation_prompt: bool = False, marks: bool = False
) -> str:
    """Text of a conversation, special tokens written out; `tokenizer.encode` of it gives the ids.

    Keys of a message whose value is None are left out. With `marks`, what the template has in `{% generation %}` blocks
    stands between GENERATION_MARKS.

    Raises:
        InputError: the tokenizer has no chat template, it is not Jinja, or it refuses the messages.
    """
    if tokenizer.chat_template is None:
        raise InputError(f"tokenizer {tokenizer.source} has no chat template, so it cannot write chats")
    messages = [{key: value for key, value in message.items() if value is not None} for message in messages]
    try:
        return _compiled(tokenizer.chat_template, marks).render(
            messages=messages, tools=None, documents=None, add_generation_prompt=add_generation_prompt,
            **tokenizer.special_tokens,
        )  # fmt: skip
    except jinja2.TemplateSyntaxError as e:
        raise InputError(
            f"the chat template of tokenizer {tokenizer.source} is not Jinja (line {e.lineno}: {e})"
        ) from e
    except Exception as e:  # whatever a template does wrong with these messages
        raise InputError(f"the chat template of tokenizer {tokenizer.source} refuses this conversation ({e})") from e
