"""Import of jax-triton, which is installed with JAX for CUDA only."""

import importlib.util
import os
from typing import Any

_CACHE = "TRITON_CACHE_DIR"


def why_not() -> str | None:
    """Why jax-triton cannot be loaded, or None if it can."""
    missing = [name for name in ("triton", "jax_triton") if importlib.util.find_spec(name) is None]
    return f"{' and '.join(missing)} is not installed: pip install 'infinitecontext[cuda]'" if missing else None


def load() -> Any:
    """Imports jax_triton. Restores TRITON_CACHE_DIR, which that sets for the whole process, PyTorch's kernels too."""
    before = os.environ.get(_CACHE)
    import jax_triton  # pyright: ignore[reportMissingImports]

    if before is None:
        os.environ.pop(_CACHE, None)
    else:
        os.environ[_CACHE] = before
    return jax_triton
