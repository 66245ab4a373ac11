"""Folders of the user's text."""

import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from mla_jax.errors import InputError

WINDOW_CHARS = 1 << 14
"""Characters that are encoded at once: of more, `tokenizers` encodes fewer a second."""
CONTEXT_CHARS = 512
"""Characters that are encoded with those before and behind them, to decide the tokens at the ends of a window."""
TOGETHER_CHARS = 1 << 17
"""Characters of the windows that go to a process together."""


class Window(NamedTuple):
    """A part of a text, [start, end) of the characters of `text`, with what is around it."""

    text: str
    start: int
    end: int


def text_files(folder: str | Path) -> list[Path]:
    """The .txt and .md files of a folder and its subfolders, by path.

    Raises:
        InputError: no such folder, or none in it.
    """
    if not Path(folder).is_dir():
        raise InputError(f"{folder} is not a folder")
    files = [path for path in sorted(Path(folder).rglob("*")) if path.suffix.lower() in (".txt", ".md")]
    files = [path for path in files if path.is_file()]
    if not files:
        raise no_text(folder)
    return files


def no_text(folder: str | Path) -> InputError:
    """The error where a folder has no file, or none that has text."""
    return InputError(f"{folder} has no .txt or .md file with text in it")


def read_texts(folder: str | Path) -> list[str]:
    """The text of each of `text_files`; files without text are left out.

    Raises:
        InputError: no such folder, no file with text in it, or a file that is not UTF-8.
    """
    texts = []
    for path in text_files(folder):
        try:
            texts.append(path.read_text(encoding="utf-8-sig"))
        except (OSError, UnicodeDecodeError) as e:
            raise _not_text(path, e) from e
    texts = [text for text in texts if text.strip()]
    if not texts:
        raise no_text(folder)
    return texts


def fingerprint(folder: str | Path) -> str:
    """SHA-256 (hex) of the files' contents, in the order in which they are read.

    Raises:
        InputError: no such folder, or no file in it.
    """
    digest = hashlib.sha256()
    for path in text_files(folder):
        with path.open("rb") as content:
            digest.update(hashlib.file_digest(content, "sha256").digest())
    return digest.hexdigest()


def read_windows(files: list[Path]) -> Iterator[list[Window]]:
    """All texts in windows, each text without the space around it and after a line break; small files go together.

    Raises:
        InputError: a file that is not UTF-8.
    """
    together, size = [], 0
    for file in files:
        for window in _windows(file):
            together.append(window)
            size += len(window.text)
            if size >= TOGETHER_CHARS:
                yield together
                together, size = [], 0
    if together:
        yield together


def _windows(file: Path) -> Iterator[Window]:
    pieces = _pieces(file)
    before, here = "", next(pieces, "")
    while here:
        after = next(pieces, "")
        yield Window(before + here + after[:CONTEXT_CHARS], len(before), len(before) + len(here))
        before, here = here[-CONTEXT_CHARS:], after


def _pieces(file: Path) -> Iterator[str]:
    """A line break and a text without the space around it, in pieces of about WINDOW_CHARS that end with a line."""
    held, begun = "", False
    try:
        with file.open(encoding="utf-8-sig") as content:
            while block := content.read(WINDOW_CHARS):
                if not begun:
                    block = block.lstrip()
                    begun, block = bool(block), "\n" + block if block else ""
                held += block
                text = held.rstrip()
                if len(text) > WINDOW_CHARS:
                    half = WINDOW_CHARS // 2
                    end = text.rfind("\n", half) + 1 or max(text.rfind(" ", half), 0) or len(text)
                    yield held[:end]
                    held = held[end:]
    except (OSError, UnicodeDecodeError) as e:
        raise _not_text(file, e) from e
    if text := held.rstrip():
        yield text


def _not_text(file: Path, e: Exception) -> InputError:
    return InputError(f"{file} cannot be read as UTF-8 text ({e})")
