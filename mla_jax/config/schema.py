"""The decorator of every config dataclass, and the checks that their `__post_init__` makes."""

from dataclasses import dataclass, field
from typing import Any, TypeVar, dataclass_transform

from mla_jax.errors import UsageError

T = TypeVar("T")


@dataclass_transform(kw_only_default=True, field_specifiers=(field,))
def schema(cls: type[T]) -> type[T]:
    """A config dataclass. Annotations stay `Optional[...]` and `list[...]`: OmegaConf reads them at run time.

    Hydra refuses frozen schemas, hence unsafe_hash: configs are never mutated and serve as static jit arguments.
    """
    return dataclass(kw_only=True, unsafe_hash=True)(cls)


def require(condition: bool, message: str) -> None:
    """Raises UsageError(message) unless the condition holds."""
    if not condition:
        raise UsageError(message)


def require_at_least(minimum: float, **values: float | None) -> None:
    """Raises UsageError for the first value below `minimum`; None passes."""
    for name, value in values.items():
        require(value is None or value >= minimum, f"{name} must be at least {minimum}, got {value}")


def require_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    """Raises UsageError unless `value` is one of `choices`."""
    require(value in choices, f"{name} must be one of {', '.join(choices)}; got {value!r}")


def flatten(tree: Any, prefix: str = "") -> dict[str, Any]:
    """Every value of nested dicts and lists by its dotted key: `{"train.stages.0.steps": 100}`."""
    if not isinstance(tree, dict | list) or not tree:
        return {prefix[:-1]: tree}
    items = tree.items() if isinstance(tree, dict) else enumerate(tree)
    return {name: leaf for key, value in items for name, leaf in flatten(value, f"{prefix}{key}.").items()}
