"""Numbers of tokens as people write them: 512, 8k, 1M, the units being powers of two."""

import re

UNITS = {"M": 2**20, "k": 2**10, "": 1}
LENGTH_PATTERN = r"(\d+[kM]?)"
"""Regular expression, with one group, of what `parse_length` takes."""


def parse_length(text: str) -> int:
    """`8k` -> 8192; the text matches LENGTH_PATTERN."""
    number, unit = re.fullmatch(r"(\d+)([kM]?)", text).groups()  # pyright: ignore[reportOptionalMemberAccess]
    return int(number) * UNITS[unit]


def format_length(tokens: int) -> str:
    """256 -> "256", 131072 -> "128k", 1048576 -> "1M"."""
    unit = next(unit for unit in UNITS if tokens >= UNITS[unit] and tokens % UNITS[unit] == 0) if tokens else ""
    return f"{tokens // UNITS[unit]}{unit}"
