"""Real text of this machine: docstrings of Python's packages, or documents. `python -m tools.package_text FOLDER`."""

import argparse
import ast
import gzip
import html.parser
import json
import random
import re
import sysconfig
import warnings
from collections.abc import Iterator
from pathlib import Path

from mla_jax.errors import InputError, one_line_errors

SHORTEST = 200
"""Characters of the shortest docstring or document that is taken."""
HELD_OUT = 50
"""One in this many modules or documents is held out, the first one too."""
DOCUMENTS = (".txt", ".rst", ".md", ".html")
"""Endings of documents; each may have `.gz` after it."""


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m tools.package_text",
        description="Writes the docstrings of the standard library and of all installed packages, or documents: "
        "calibration.txt and texts.jsonl (for data=jsonl) of most of them, held_out.txt of the others, in an order "
        "drawn once.",
    )
    parser.add_argument("folder", type=Path, help="folder to create")
    parser.add_argument(
        "--documents", nargs="+", type=Path, default=[], metavar="FOLDER",
        help=f"take the files in these folders ({' '.join(DOCUMENTS)}, also .gz) in place of docstrings",
    )  # fmt: skip
    parser.add_argument("--megabytes", type=float, default=20, help="of texts.jsonl, at most; default %(default)s")
    parser.add_argument(
        "--characters",
        type=int,
        default=3000,
        help="of the longest text in texts.jsonl; default 3000, some 800 tokens",
    )
    args = parser.parse_args()
    with one_line_errors():
        if args.folder.exists():
            raise InputError(f"{args.folder} exists; choose another folder")
        folders = args.documents or [Path(sysconfig.get_path(name)) for name in ("stdlib", "purelib")]
        endings = tuple(end + gz for end in DOCUMENTS for gz in ("", ".gz")) if args.documents else (".py",)
        found = {path for folder in folders for path in folder.rglob("*") if path.name.endswith(endings)}
        # In `_sources` are Sphinx's copies of what it made HTML of.
        paths = sorted(path for path in found if "_sources" not in path.parts)
        if not paths:
            raise InputError(f"no {' '.join(endings)} in {' '.join(map(str, folders))}")
        random.Random(0).shuffle(paths)
        limit = int(args.megabytes * 1e6)
        texts, held_out = [], []
        for number, text in enumerate(_documents(paths) if args.documents else _docstrings(paths)):
            (held_out if number % HELD_OUT == 0 else texts).append(text)
            limit -= len(text)
            if limit <= 0:
                break
        if not texts:
            where = " ".join(map(str, folders))
            raise InputError(f"{where}: {len(held_out)} texts of {SHORTEST} characters or more; at least 2 are needed")
        args.folder.mkdir(parents=True)
        (args.folder / "held_out.txt").write_text("\n\n".join(held_out), encoding="utf-8")
        (args.folder / "calibration.txt").write_text("\n\n".join(texts)[:4_000_000], encoding="utf-8")
        pieces = (piece for text in texts for piece in _pieces(text, args.characters))
        lines = (json.dumps({"prompt": "", "completion": piece}) + "\n" for piece in pieces)
        (args.folder / "texts.jsonl").write_text("".join(lines), encoding="utf-8")
        characters = (sum(map(len, kind)) for kind in (texts, held_out))
        print("characters: {:,} to learn from, {:,} held out".format(*characters))


def _docstrings(paths: list[Path]) -> Iterator[str]:
    """The docstrings of each module that has some which no other module had before."""
    seen = set()
    for path in paths:
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                tree = ast.parse(path.read_text(encoding="utf-8"))
        except (OSError, SyntaxError, ValueError):
            continue  # some packages ship files that are no Python, to test with
        documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
        found = (ast.get_docstring(node) for node in ast.walk(tree) if isinstance(node, documented))
        new = [text for text in found if text and len(text) >= SHORTEST and text not in seen]
        seen.update(new)
        if new:
            yield "\n\n".join(new)


def _documents(paths: list[Path]) -> Iterator[str]:
    """The text of each file in UTF-8 that no other file has; of HTML what is read, without scripts and styles."""
    seen = set()
    for path in paths:
        try:
            data = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
            text = data.decode("utf-8")
        except (OSError, EOFError, ValueError):
            continue  # a dangling link, say, or another encoding
        if path.name.removesuffix(".gz").endswith(".html"):
            reader = _Html()
            reader.feed(text)
            text = reader.text()
        if len(text) >= SHORTEST and text not in seen:
            seen.add(text)
            yield text


class _Html(html.parser.HTMLParser):
    """The text of a page: blocks in lines of their own."""

    BLOCKS = frozenset("p div li dt dd tr pre h1 h2 h3 h4 h5 h6 br table ul ol dl section article blockquote".split())
    UNREAD = frozenset("script style head nav footer".split())

    def __init__(self):
        super().__init__()
        self._parts: list[str] = []
        self._unread = 0
        self._literal = 0

    def handle_starttag(self, tag, attrs):
        if tag == "body":  # a head need not be closed
            self._unread = 0
        self._unread += tag in self.UNREAD
        self._literal += tag == "pre"
        if tag in self.BLOCKS:
            self._parts.append("\n")

    def handle_endtag(self, tag):
        self._unread -= tag in self.UNREAD and self._unread > 0
        self._literal -= tag == "pre" and self._literal > 0
        if tag in self.BLOCKS:
            self._parts.append("\n")

    def handle_data(self, data):
        if not self._unread:
            self._parts.append(data if self._literal else re.sub(r"\s+", " ", data))

    def text(self) -> str:
        """Its text so far, with at most one empty line in a row."""
        return re.sub(r"\s*\n\s*\n\s*", "\n\n", "".join(self._parts)).strip()


def _pieces(text: str, longest: int) -> Iterator[str]:
    """Whole lines of a text, as many as fit a piece; lines that do not are left out."""
    piece = ""
    for line in text.splitlines(keepends=True):
        if piece and len(piece) + len(line) > longest:
            yield piece
            piece = ""
        if len(line) <= longest:
            piece += line
    if piece.strip():
        yield piece


if __name__ == "__main__":
    main()
