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


def write_manifest(folder: Path) -> None:
    """Records size and CRC-32 of every file in the subfolders of `folder`.

    Files beside them are left out: Orbax still writes the time of completion there, and reads nothing that matters.
    """
    names = sorted(p.relative_to(folder).as_posix() for p in folder.glob("*/**/*") if p.is_file())
    with ThreadPoolExecutor(_THREADS) as threads:  # zlib.crc32 releases the GIL
        entries = threads.map(lambda name: ((folder / name).stat().st_size, _crc32(folder / name)), names)
        text = json.dumps({"files": dict(zip(names, entries, strict=True))}, indent=0)
    (folder / MANIFEST).write_text(text)


def read_manifest(folder: Path) -> dict[str, tuple[int, int]]:
    """Size and CRC-32 of every file of the checkpoint in `folder`. Raises OSError, or what damaged content raises."""
    recorded = json.loads((folder / MANIFEST).read_bytes())["files"]
    return {str(name): (int(size), int(crc)) for name, (size, crc) in recorded.items()}


def find_corruption(folder: Path, items: tuple[str, ...] | None = None) -> str | None:
    """Returns the first difference of the checkpoint in `folder` from its manifest, None if it is as it was saved.

    Args:
        folder: the folder of a step.
        items: subfolders whose files are read; None for all.
    """
    try:
        files = read_manifest(folder)
    except FileNotFoundError:
        return f"{MANIFEST} is missing"
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return f"{MANIFEST} cannot be read"
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
