"""Loads jax-triton, which is there only with JAX for CUDA."""

import importlib.util
import os
from typing import Any

_CACHE = "TRITON_CACHE_DIR"


def why_not() -> str | None:
    """Why it cannot be loaded, or None."""
    missing = [name for name in ("triton", "jax_triton") if importlib.util.find_spec(name) is None]
    return f"{' and '.join(missing)} is not installed: pip install 'infinitecontext[cuda]'" if missing else None


def load() -> Any:
    """The module. It would take Triton's cache away from all of the process, PyTorch's kernels included."""
    before = os.environ.get(_CACHE)
    import jax_triton  # pyright: ignore[reportMissingImports]

    if before is None:
        os.environ.pop(_CACHE, None)
    else:
        os.environ[_CACHE] = before
    return jax_triton
