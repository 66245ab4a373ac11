"""Files and folders that appear only when they are complete: written beside their place, then renamed."""

import contextlib
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mla_jax.errors import InputError


@contextlib.contextmanager
def atomic_file(path: Path) -> Iterator[Path]:
    """A path to write to, which takes the name `path` when the block ends well and is removed when it does not.

    Creates the folder if needed.

    Raises:
        InputError: an OSError in the block or here (no permission, full disk); what was at `path` is still there.
    """
    partial = _beside(path, "partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield partial
        partial.replace(path)
    except OSError as e:
        raise _could_not_write(path, e) from e
    finally:
        with contextlib.suppress(OSError):
            partial.unlink()


@contextlib.contextmanager
def atomic_folder(path: Path) -> Iterator[Path]:
    """An empty folder, which takes the place of `path` when the block ends well and is removed when it does not.

    Raises:
        InputError: an OSError in the block or here; what was at `path` is still there.
    """
    partial, old = _beside(path, "partial"), _beside(path, "old")
    try:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        yield partial
        if path.exists():  # a folder with something in it cannot be renamed over
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


def write_json(path: Path, content: Any, *, indent: int | None = 2) -> None:
    """Writes `content` as JSON that ends with a newline, as `atomic_file` does. Raises InputError as that does."""
    with atomic_file(path) as partial:
        partial.write_text(json.dumps(content, indent=indent) + "\n", encoding="utf-8")


def _beside(path: Path, suffix: str) -> Path:
    return path.with_name(f"{path.name}.{suffix}")


def _could_not_write(path: Path, e: OSError) -> InputError:
    return InputError(
        f"could not write {path} ({e.strerror or e}); nothing was left behind; free space or name another place"
    )
