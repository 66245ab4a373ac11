"""Numbers of tokens as people write them: 512, 8k, 1M."""

import re

UNITS = {"M": 2**20, "k": 2**10, "": 1}
PATTERN = r"(\d+[kM]?)"


def parse(text: str) -> int:
    """Of `8k` 8192; the text matches PATTERN."""
    number, unit = re.fullmatch(r"(\d+)([kM]?)", text).groups()  # pyright: ignore[reportOptionalMemberAccess]
    return int(number) * UNITS[unit]


def show(tokens: int) -> str:
    """In the largest unit that divides it."""
    unit = next(unit for unit in UNITS if tokens % UNITS[unit] == 0)
    return f"{tokens // UNITS[unit]}{unit}"
