"""Sizes and checksums of a checkpoint's files, kept beside them, to find corruption before it is read.

The storage library notices a file that is missing or cut short only when it happens to read there, and a changed byte
often not at all. So every checkpoint carries MANIFEST, written before its folder gets its name: a checkpoint without
one was never complete, or has lost it.
"""

import json
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

MANIFEST = "manifest.json"

_CHUNK = 1 << 18
_THREADS = 8


Entries = dict[str, tuple[int, int]]
"""Size and CRC-32 of files, by their path in the folder of a step."""


def entries_of(folder: Path, pattern: str = "*/**/*", known: Entries | None = None) -> Entries:
    """Entries of the files in `folder` that match, read for it unless they are `known`."""
    known = known or {}
    names = [p.relative_to(folder).as_posix() for p in folder.glob(pattern) if p.is_file()]
    with ThreadPoolExecutor(_THREADS) as threads:  # zlib.crc32 releases the GIL
        new = sorted(set(names) - known.keys())
        return known | dict(zip(new, threads.map(lambda name: _entry(folder / name), new), strict=True))


def _entry(path: Path) -> tuple[int, int]:
    return path.stat().st_size, _crc32(path)


def write_manifest(folder: Path, known: Entries | None = None) -> None:
    """Records size and CRC-32 of every file in the subfolders of `folder`; those that are `known` are not read.

    Files beside them are left out: Orbax still writes the time of completion there, and reads nothing that matters.
    """
    entries = dict(sorted(entries_of(folder, known=known).items()))
    (folder / MANIFEST).write_text(json.dumps({"files": entries}, indent=0))


def read_manifest(folder: Path) -> dict[str, tuple[int, int]]:
    """Size and CRC-32 of every file of the checkpoint in `folder`. Raises OSError, or what damaged content raises."""
    recorded = json.loads((folder / MANIFEST).read_bytes())["files"]
    return {str(name): (int(size), int(crc)) for name, (size, crc) in recorded.items()}


def find_corruption(folder: Path, items: tuple[str, ...] | None = None, share: tuple[int, int] = (0, 1)) -> str | None:
    """Returns the first difference of the checkpoint in `folder` from its manifest, None if it is as it was saved.

    Args:
        folder: the folder of a step.
        items: subfolders whose files are read; None for all.
        share: (i, n) to read only every n-th file from the i-th on, where n processes divide them.
    """
    try:
        files = read_manifest(folder)
    except FileNotFoundError:
        return f"{MANIFEST} is missing"
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return f"{MANIFEST} cannot be read"
    index, count = share
    files = dict(list(files.items())[index::count])
    if items is not None:
        files = {name: file for name, file in files.items() if name.split("/")[0] in items}

    def check(name: str) -> str | None:
        path, (size, crc) = folder / name, files[name]
        try:
            if path.stat().st_size != size:
                return f"{name} has {path.stat().st_size} bytes instead of {size}"
            return None if _crc32(path) == crc else f"{name} is not what was written"
        except FileNotFoundError:
            return f"{name} is missing"
        except OSError as e:
            return f"{name} cannot be read: {e.strerror}"

    with ThreadPoolExecutor(_THREADS) as threads:
        return next(filter(None, threads.map(check, files)), None)


def _crc32(path: Path) -> int:
    crc = 0
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            crc = zlib.crc32(chunk, crc)
    return crc
