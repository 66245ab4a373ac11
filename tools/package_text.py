"""Real text that is on this machine: docstrings of Python and its packages. `python -m tools.package_text FOLDER`."""

import argparse
import ast
import json
import random
import sysconfig
import warnings
from collections.abc import Iterator
from pathlib import Path

from mla_jax.errors import InputError, one_line_errors

SHORTEST = 200
"""Characters of the shortest docstring that is taken."""
HELD_OUT = 50
"""One in this many modules is held out."""


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m tools.package_text",
        description="Writes the docstrings of the standard library and of all installed packages: calibration.txt and "
        "texts.jsonl (for data=jsonl) of most modules, held_out.txt of the others, in an order drawn once.",
    )
    parser.add_argument("folder", type=Path, help="folder to create")
    parser.add_argument("--megabytes", type=float, default=20, help="of texts.jsonl, at most; default %(default)s")
    parser.add_argument(
        "--characters", type=int, default=3000, help="of the longest text in texts.jsonl; default 3000, some 800 tokens"
    )
    args = parser.parse_args()
    with one_line_errors():
        if args.folder.exists():
            raise InputError(f"{args.folder} exists; choose another folder")
        paths = sorted({p for name in ("stdlib", "purelib") for p in Path(sysconfig.get_path(name)).rglob("*.py")})
        random.Random(0).shuffle(paths)
        limit = int(args.megabytes * 1e6)
        texts, held_out = [], []
        for number, text in enumerate(_texts(paths)):
            (held_out if number % HELD_OUT == 0 else texts).append(text)
            limit -= len(text)
            if limit <= 0:
                break
        args.folder.mkdir(parents=True)
        (args.folder / "held_out.txt").write_text("\n\n".join(held_out), encoding="utf-8")
        (args.folder / "calibration.txt").write_text("\n\n".join(texts)[:4_000_000], encoding="utf-8")
        lines = (
            json.dumps({"prompt": "", "completion": piece})
            for text in texts
            for piece in _pieces(text, args.characters)
        )
        (args.folder / "texts.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
        characters = (sum(map(len, kind)) for kind in (texts, held_out))
        print("characters: {:,} to learn from, {:,} held out".format(*characters))


def _texts(paths: list[Path]) -> Iterator[str]:
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
