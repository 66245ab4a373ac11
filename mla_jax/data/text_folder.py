"""Folders of the user's text."""

from pathlib import Path

from mla_jax.errors import InputError


def read_texts(folder: str | Path) -> list[str]:
    """All .txt and .md files of a folder and its subfolders, by path; files without text are left out.

    Raises:
        InputError: no such folder, no file with text in it, or a file that is not UTF-8.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise InputError(f"{folder} is not a folder")
    texts = []
    for path in sorted(folder.rglob("*")):
        if path.suffix.lower() in (".txt", ".md") and path.is_file():
            try:
                texts.append(path.read_text(encoding="utf-8-sig"))
            except (OSError, UnicodeDecodeError) as e:
                raise InputError(f"{path} cannot be read as UTF-8 text ({e})") from e
    texts = [text for text in texts if text.strip()]
    if not texts:
        raise InputError(f"{folder} has no .txt or .md file with text in it")
    return texts
