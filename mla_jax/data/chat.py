"""Chat templates: conversations to text, as transformers' `apply_chat_template` renders them."""

import functools
import json
from collections.abc import Sequence
from datetime import datetime
from typing import Any

import jinja2
from jinja2 import meta, nodes, parser
from jinja2.ext import Extension
from jinja2.ext import loopcontrols as LoopControls
from jinja2.sandbox import ImmutableSandboxedEnvironment

from mla_jax.data.tokenizer import Tokenizer
from mla_jax.errors import InputError

Message = dict[str, Any]
"""`role` and `content`, and whatever else the template reads."""

REASONING = ("reasoning_content", "thinking", "reasoning")
"""Keys of a message under which its thoughts are found, in this order; templates read one of the first two."""

RESERVED = ("messages", "tools", "documents", "add_generation_prompt", "continue_final_message")
"""Variables that are no `chat_template_kwargs`."""

_NOTHING = (None, "", [], {})

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
        return [start, nodes.Scope(parser.parse_statements(("name:endgeneration",), drop_needle=True)), end]


class _MarkedGeneration(_Generation):
    marks = GENERATION_MARKS


@functools.lru_cache(maxsize=8)
def _compiled(template: str, marks: bool) -> jinja2.Template:
    def raise_exception(message: str) -> None:
        raise jinja2.TemplateError(message)

    def to_json(  # Jinja's own filter escapes HTML
        x: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False
    ) -> str:
        return json.dumps(x, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)

    generation = _MarkedGeneration if marks else _Generation
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[generation, LoopControls]
    )
    environment.filters["tojson"] = to_json
    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    return environment.from_string(template)


def render(
    tokenizer: Tokenizer,
    messages: Sequence[Message],
    *,
    add_generation_prompt: bool = False,
    marks: bool = False,
    tools: list[dict[str, Any]] | None = None,
    documents: list[dict[str, Any]] | None = None,
    chat_template_kwargs: dict[str, Any] | None = None,
) -> str:
    """Text of a conversation, special tokens written out; `tokenizer.encode` of it gives the ids.

    Keys of a message whose value is None are left out, and its thoughts are given to the template by the names that
    templates know.

    Args:
        tokenizer: has the template.
        messages: the conversation.
        add_generation_prompt: end with what the template writes before an answer.
        marks: put what the template has in `{% generation %}` blocks between GENERATION_MARKS.
        tools: JSON schemas of the functions that the model may call.
        documents: what the model may quote, `title` and `text` each.
        chat_template_kwargs: other variables of the template, `enable_thinking` for instance.

    Raises:
        InputError: the tokenizer has no chat template, it is not Jinja, or it refuses the messages.
    """
    template = template_for(tokenizer, tools)
    messages = [{key: value for key, value in message.items() if value is not None} for message in messages]
    variables = tokenizer.special_tokens | (chat_template_kwargs or {})
    try:
        return _compiled(template, marks).render(
            messages=[_with_thoughts(message) for message in messages], tools=tools, documents=documents,
            add_generation_prompt=add_generation_prompt, **variables,
        )  # fmt: skip
    except jinja2.TemplateSyntaxError as e:
        raise InputError(
            f"the chat template of tokenizer {tokenizer.source} is not Jinja (line {e.lineno}: {e})"
        ) from e
    except Exception as e:  # whatever a template does wrong with these messages
        raise InputError(f"the chat template of tokenizer {tokenizer.source} refuses this conversation ({e})") from e


def template_for(tokenizer: Tokenizer, tools: list[dict[str, Any]] | None) -> str:
    """The template that writes conversations with these tools. Raises InputError if there is none."""
    template = tokenizer.chat_template if tools is None else tokenizer.tool_use_template
    if template is None:
        raise InputError(f"tokenizer {tokenizer.source} has no chat template, so it cannot write chats")
    return template


def _with_thoughts(message: Message) -> Message:
    """The message with its thoughts under both names that templates read."""
    thoughts = next((message[key] for key in REASONING if key in message), None)
    return message if thoughts is None else {"thinking": thoughts, **message, "reasoning_content": thoughts}


def unread_field(tokenizer: Tokenizer, messages: Sequence[Message], **fields: Any) -> str | None:
    """The first field that has a value which the template never reads, so that it would be lost; None without one.

    Roles, contents and the ids of tool calls, which their order shows too, are not asked about. Arguments and errors
    are those of `render`.
    """
    variables, keys = _mentioned(template_for(tokenizer, fields.get("tools")))
    given = {name: fields.get(name) for name in ("tools", "documents")} | (fields.get("chat_template_kwargs") or {})
    for name, value in given.items():
        if value not in _NOTHING and name not in variables:
            return f"`{name}`"
    keys |= {"role", "content", "tool_call_id"}
    if keys & {"reasoning_content", "thinking"}:
        keys |= set(REASONING)
    for i, message in enumerate(messages):
        for key in message.keys() - keys:
            others = {other: value for other, value in message.items() if other != key}
            without = [*messages[:i], others, *messages[i + 1 :]]  # a template may write the whole message as JSON
            if message[key] not in _NOTHING and render(tokenizer, without, **fields) == render(
                tokenizer, messages, **fields
            ):
                return f"`{key}` of message {i + 1}"
    return None


@functools.lru_cache(maxsize=8)
def _mentioned(template: str) -> tuple[frozenset[str], frozenset[str]]:
    """The template's free variables, and the keys that it names."""
    tree = _compiled(template, False).environment.parse(template)
    constants = (node.value for node in tree.find_all(nodes.Const))
    keys = {node.attr for node in tree.find_all(nodes.Getattr)} | {x for x in constants if isinstance(x, str)}
    return frozenset(meta.find_undeclared_variables(tree)), frozenset(keys)
