"""Encoded data on disk: arrays that are made once and then memory-mapped by every process that needs them.

    CACHE/KIND-KEY/NAME.bin      the elements of an array, one after the other
    CACHE/KIND-KEY/entry.json    what it was made from; dtype, size and CRC-32 of each array; a note of who made it
    CACHE/KIND-KEY.lock          while a process makes it

KEY is a hash of all that decides the arrays: path, size and time of each file, the tokenizer, and the code of this
package. So an entry is never wrong, only of no more use; whoever needs the room deletes CACHE, or entries of it.
"""

import contextlib
import functools
import hashlib
import json
import os
import sys
import zlib
from collections.abc import Callable, Iterator, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from filelock import SoftFileLease, Timeout

from mla_jax.data.tokenizer import Tokenizer
from mla_jax.distributed.join import is_main
from mla_jax.errors import InputError
from mla_jax.files import atomic_folder, user_cache_folder

ENTRY = "entry.json"
LEASE_S, HEARTBEAT_S = 60.0, 3.0
PATIENCE_S = 5.0
"""Seconds after which the main process says for whom it waits."""
ANNOUNCED_MB = 20.0
"""Size of files from which it is said that they are encoded."""


class Entry:
    """The arrays of an entry by name, memory-mapped, and the note that was left with them. Pickles as its path."""

    def __init__(self, folder: Path):
        self._folder = folder
        about = json.loads((folder / ENTRY).read_bytes())
        self.note: dict[str, Any] = about["note"]
        self._arrays = {name: _mapped(folder, name, array["dtype"]) for name, array in about["arrays"].items()}

    def __getitem__(self, name: str) -> np.ndarray:
        return self._arrays[name]

    def __reduce__(self) -> tuple:
        return Entry, (self._folder,)


class Writer:
    """The arrays of an entry while it is made."""

    def __init__(self, folder: Path, files: contextlib.ExitStack):
        self._folder, self._stack = folder, files
        self._files: dict[str, Any] = {}
        self._about: dict[str, dict[str, Any]] = {}

    def append(self, name: str, values: np.ndarray) -> None:
        """Adds elements to an array, which begins with the first call and keeps the dtype of that."""
        if name not in self._files:
            self._files[name] = self._stack.enter_context((self._folder / f"{name}.bin").open("wb"))
            self._about[name] = {"dtype": values.dtype.str, "bytes": 0, "crc32": 0}
        about, data = self._about[name], np.ascontiguousarray(values).data.cast("B") if values.size else b""
        assert about["dtype"] == values.dtype.str, name
        self._files[name].write(data)
        about["bytes"] += len(data)
        about["crc32"] = zlib.crc32(data, about["crc32"])

    def finish(self, made_from: dict[str, Any], note: dict[str, Any]) -> None:
        """Writes entry.json once all else is on the disk, so that what a failing machine leaves is not taken for it."""
        for file in self._files.values():
            file.flush()
            os.fsync(file.fileno())
        content = {"made_from": made_from, "note": note, "arrays": self._about}
        with (self._folder / ENTRY).open("w", encoding="utf-8") as file:
            json.dump(content, file, indent=1)
            file.flush()
            os.fsync(file.fileno())


def cached(
    kind: str, files: Sequence[Path], tokenizer: Tokenizer, how: str, build: Callable[[Writer], dict[str, Any]],
    cache_dir: str | None,
) -> Entry:  # fmt: skip
    """The arrays that `build` makes of `files`, made if they are not in the cache.

    Of the processes that ask at the same time, on one host or several that share the folder, one makes them and the
    others wait. An entry that is cut short or whose checksums are wrong is made again.

    Args:
        kind: of data; begins the entry's name.
        files: which are encoded.
        tokenizer: by which they are.
        how: what else decides the arrays.
        build: appends all arrays and returns a note, JSON.
        cache_dir: the folder of the cache; None for the user's.

    Raises:
        InputError: the folder cannot be written (no permission, full disk), a file has changed meanwhile, or `build`
            raised it.
    """
    made_from = _description(files, tokenizer, how)
    key = hashlib.sha256(json.dumps(made_from, sort_keys=True).encode()).hexdigest()
    cache = Path(cache_dir) if cache_dir else user_cache_folder() / "tokens"
    folder = cache.absolute() / f"{kind}-{key[:32]}"
    if (entry := _open(folder)) is not None:
        return entry
    with _only_one(folder) as still_alone:
        if (entry := _open(folder)) is not None:  # another process has made it
            return entry
        with atomic_folder(folder, replace=True) as partial:
            _make(partial, folder, made_from, build)
            if _description(files, tokenizer, how) != made_from:
                raise InputError(f"{files[0].parent} has changed while it was read; run the same command again")
            still_alone()
        entry = _open(folder)
    if entry is None:
        raise InputError(f"{folder} is damaged as soon as it is written; name another place by data.cache_dir=FOLDER")
    return entry


def _description(files: Sequence[Path], tokenizer: Tokenizer, how: str) -> dict[str, Any]:
    try:
        found = [[str(file.resolve()), (at := file.stat()).st_size, at.st_mtime_ns] for file in files]
    except OSError as e:
        raise InputError(f"{e.filename} cannot be read ({e.strerror})") from e
    return {
        "files": found,
        "tokenizer": hashlib.sha256(tokenizer.definition.encode()).hexdigest(),
        "how": how,
        "code": _code(),
        "libraries": {name: version(name) for name in ("tokenizers", "jinja2")},
    }


@functools.cache
def _code() -> str:
    """A hash of this package's code: what templates, turns and files are read by changes the ids."""
    digest = hashlib.sha256()
    for file in sorted(Path(__file__).parent.rglob("*.py")):
        digest.update(file.read_bytes())
    return digest.hexdigest()


def _make(partial: Path, folder: Path, made_from: dict[str, Any], build: Callable[[Writer], dict[str, Any]]) -> None:
    megabytes = sum(size for _, size, _ in made_from["files"]) / 1e6
    if megabytes > ANNOUNCED_MB:  # by the only process that makes it, whichever that is
        print(f"Encoding {megabytes:,.0f} MB, once, into {folder}", file=sys.stderr, flush=True)
    try:
        with contextlib.ExitStack() as files:
            writer = Writer(partial, files)
            writer.finish(made_from, build(writer))
    except OSError as e:
        raise _cannot_write(folder, e) from e


def _open(folder: Path) -> Entry | None:
    """The entry in a folder; None if there is none or it is damaged."""
    try:
        found = [(file.name, (at := file.stat()).st_size, at.st_mtime_ns) for file in sorted(folder.iterdir())]
        return Entry(folder) if _is_whole(folder, tuple(found)) else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


@functools.lru_cache(maxsize=64)  # each stage opens it, the same files are checked once
def _is_whole(folder: Path, found: tuple) -> bool:
    for name, array in json.loads((folder / ENTRY).read_bytes())["arrays"].items():
        size, crc32 = 0, 0
        with (folder / f"{name}.bin").open("rb", buffering=0) as file:
            while data := file.read(1 << 20):
                size, crc32 = size + len(data), zlib.crc32(data, crc32)
        if (size, crc32) != (array["bytes"], array["crc32"]):
            if is_main():
                print(f"{folder} is damaged ({name}.bin), so it is made again", file=sys.stderr, flush=True)
            return False
    return True


def _mapped(folder: Path, name: str, dtype: str) -> np.ndarray:
    path = folder / f"{name}.bin"
    if path.stat().st_size == 0:  # which cannot be mapped
        return np.empty(0, dtype)
    return np.memmap(path, dtype, "r").view(np.ndarray)  # whose slices are quicker than those of a memmap


@contextlib.contextmanager
def _only_one(folder: Path) -> Iterator[Callable[[], None]]:
    """Holds the lock of an entry; yields a function that raises InputError if another process has taken it over.

    It is a lease, as that of a run folder is: kernel locks may hold on one host only, and a dead process leaves none.
    """
    lease = SoftFileLease(
        folder.with_name(f"{folder.name}.lock"), lease_duration=LEASE_S, heartbeat_interval=HEARTBEAT_S
    )
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        try:
            lease.acquire(timeout=PATIENCE_S, poll_interval=0.1)
        except Timeout:
            owner = lease.owner
            holder = f"process {owner.pid} on {owner.hostname}" if owner else "another process"
            if is_main():
                print(f"Waiting for {holder}, which makes {folder}", file=sys.stderr, flush=True)
            lease.acquire(poll_interval=0.2)
    except OSError as e:
        raise _cannot_write(folder, e) from e

    def still_alone() -> None:
        if lease.compromise is not None:
            raise InputError(
                f"another process took over {folder}, as this one showed no sign of life for {LEASE_S:g} s; "
                "run the same command again"
            )

    try:
        yield still_alone
    finally:
        with contextlib.suppress(OSError):
            lease.release()


def _cannot_write(folder: Path, e: OSError) -> InputError:
    return InputError(
        f"the cache of encoded data cannot be written to {folder} ({e.strerror or e}); free space or name another "
        "place by data.cache_dir=FOLDER"
    )
