"""JAX's persistent compilation cache: what was compiled once is read by later processes, a requeued job's above all."""

import contextlib
import os
import platform
import sys
import tempfile
import time
import zlib
from pathlib import Path

import jax

from mla_jax.files import user_cache_folder

KEEP_DAYS = 30
"""Programs that were not read for so long are deleted."""


def keep_compiled(folder: str | None = "auto") -> None:
    """Keeps compiled programs in `folder` and reads them from there. Call it after joining a job, before compiling.

    Programs for a CPU are kept apart by the kind of CPU: they may hold instructions that another one lacks. The first
    process of a job writes, all read. A folder that cannot be written to is a warning.

    Args:
        folder: `auto` is JAX_COMPILATION_CACHE_DIR, else `infinitecontext/compiled` in XDG_CACHE_HOME or ~/.cache. None
            for no cache.
    """
    if folder == "auto" and "JAX_COMPILATION_CACHE_DIR" in os.environ:  # JAX has read it
        return
    if folder is None:
        jax.config.update("jax_compilation_cache_dir", None)
        return
    path = user_cache_folder() / "compiled" if folder == "auto" else Path(folder).expanduser().absolute()
    if jax.default_backend() == "cpu":
        path /= f"cpu-{_cpu_kind():08x}"
    try:
        path.mkdir(parents=True, exist_ok=True)
        if jax.process_index() == 0:
            with tempfile.TemporaryFile(dir=path):
                _delete_old(path)
    except OSError as e:
        print(
            f"warning: no compiled programs are kept, since {path} cannot be written to ({e.strerror or e}); name "
            "another folder by train.compilation_cache or JAX_COMPILATION_CACHE_DIR",
            file=sys.stderr,
        )
        return
    jax.config.update("jax_compilation_cache_dir", str(path))


def _cpu_kind() -> int:
    """A checksum of the instructions that this machine's CPU has."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith(("flags", "Features")):
                return zlib.crc32(line.encode())
    return zlib.crc32(f"{platform.machine()} {platform.processor()}".encode())


def _delete_old(folder: Path) -> None:
    """Deletes programs that nobody read for KEEP_DAYS. Other jobs may be doing the same."""
    for file in folder.iterdir():
        with contextlib.suppress(OSError):
            found = file.stat()
            if file.is_file() and time.time() - max(found.st_atime, found.st_mtime) > KEEP_DAYS * 86400:
                file.unlink()
