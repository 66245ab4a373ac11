"""Files and folders that appear only when they are complete: written beside their place, then renamed."""

import contextlib
import errno
import json
import math
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from filelock import FileLock

from mla_jax.errors import InputError

_NO_ROOM_OR_RIGHT = (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EROFS)


@contextlib.contextmanager
def atomic_file(path: Path, *, parents: bool = True) -> Iterator[Path]:
    """A path to write to, which takes the name `path` when the block ends well and is removed when it does not.

    Args:
        path: the file.
        parents: create its folder if needed. False for what is kept of a run: a run folder that was deleted or
            unmounted must not come back with nothing else in it.

    Raises:
        InputError: an OSError in the block or here (no permission, full disk); what was at `path` is still there.
    """
    partial = _beside(path, "partial")
    try:
        if parents:
            path.parent.mkdir(parents=True, exist_ok=True)
        yield partial
        partial.replace(path)
    except OSError as e:
        raise _could_not_write(path, e) from e
    finally:
        with contextlib.suppress(OSError):
            partial.unlink()


@contextlib.contextmanager
def atomic_folder(path: Path, *, replace: bool) -> Iterator[Path]:
    """An empty folder, which takes the place of `path` when the block ends well and is removed when it does not.

    Args:
        path: the folder.
        replace: delete what is at `path` by then; else a folder with something in it is an error.

    Raises:
        InputError: an OSError in the block or here; what was at `path` is still there.
    """
    partial, old = _beside(path, "partial"), _beside(path, "old")
    try:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        yield partial
        if replace and path.exists():  # a folder with something in it cannot be renamed over
            shutil.rmtree(old, ignore_errors=True)
            path.rename(old)
        try:
            partial.rename(path)
        except BaseException:
            if old.exists():
                old.rename(path)
            raise
        shutil.rmtree(old, ignore_errors=True)
    except OSError as e:
        raise _could_not_write(path, e) from e
    finally:
        shutil.rmtree(partial, ignore_errors=True)


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    """The file at `path` is this block's alone: others on this machine that name it wait. Leaves a hidden file.

    Raises:
        InputError: the folder of `path` cannot be written to.
    """
    try:
        held = FileLock(path.with_name(f".{path.name}.lock")).acquire()
    except OSError as e:
        raise _could_not_write(path, e) from e
    with held:
        yield


def write_json(path: Path, content: Any, *, indent: int | None = 2, parents: bool = True) -> None:
    """Writes `content` as JSON that ends with a newline, as `atomic_file` does. Raises InputError as that does.

    Numbers that are not finite, which JSON does not have, become null.
    """
    text = json.dumps(_finite(content), indent=indent, allow_nan=False)
    with atomic_file(path, parents=parents) as partial:
        partial.write_text(text + "\n", encoding="utf-8")


def _finite(content: Any) -> Any:
    if isinstance(content, dict):
        return {key: _finite(value) for key, value in content.items()}
    if isinstance(content, list | tuple):
        return [_finite(value) for value in content]
    return None if isinstance(content, float) and not math.isfinite(content) else content


def user_cache_folder() -> Path:
    """Where this user keeps what can be made again: infinitecontext in $XDG_CACHE_HOME, by default ~/.cache."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path("~/.cache").expanduser()) / "infinitecontext"


def _beside(path: Path, suffix: str) -> Path:
    return path.with_name(f"{path.name}.{suffix}")


def _could_not_write(path: Path, e: OSError) -> InputError:
    # The block may have failed to read something: the error names the file, and then no other place helps.
    advice = "; free space or name another place" if e.errno in _NO_ROOM_OR_RIGHT else ""
    return InputError(f"could not write {path} ({e}); nothing was left behind{advice}")
