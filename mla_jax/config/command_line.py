"""Values as they are typed on a command line, which a shell and Hydra read one after the other."""

import contextlib
import shlex

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override, Quote, QuotedString
from hydra.errors import HydraException

from mla_jax.config.register import text_keys


def override(key: str, value: str) -> str:
    """`KEY=VALUE` such that a shell and Hydra together read `value` as it is."""
    plain = _parse(f"{key}={value}")
    if plain is None or plain.value() != value or "${" in value:
        value = QuotedString(value.replace("${", r"\${"), Quote.single).with_quotes()  # OmegaConf's interpolation
    return shlex.quote(f"{key}={value}")


def quote_text(argument: str) -> str:
    """The argument with quotes around a text that Hydra would take for a number or a truth value, as 12e4567 or 007."""
    parsed = _parse(argument)
    key, equals, text = argument.partition("=")
    if parsed is None or not equals or parsed.key_or_group not in text_keys():
        return argument
    values = text.split(",") if parsed.is_sweep_override() else [text]
    quoted = [
        QuotedString(value.strip(), Quote.single).with_quotes() if _is_number(f"{key}={value}") else value
        for value in values
    ]
    return f"{key}={','.join(quoted)}"


def _is_number(argument: str) -> bool:
    parsed = _parse(argument)
    return parsed is not None and isinstance(parsed.value(), int | float)


def _parse(argument: str) -> Override | None:
    """The override as Hydra reads it; None for anything else, which Hydra refuses itself."""
    with contextlib.suppress(HydraException):
        return OverridesParser.create().parse_override(argument)
    return None
