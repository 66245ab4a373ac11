"""What is in this folder needs an NVIDIA GPU; without one it is skipped. `python -m pytest tests/gpu` runs it all."""

import os
from pathlib import Path

import pytest

# Several processes, and PyTorch beside JAX, share the memory of the GPU: what is not in use goes back to it.
os.environ.setdefault("XLA_PYTHON_CLIENT_ALLOCATOR", "platform")
# Trying out matrix products would take most of the time; nothing is timed here.
os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_gpu_autotune_level=0"


def pytest_collection_modifyitems(items):
    import jax

    marks = [pytest.mark.gpu]
    if jax.default_backend() != "gpu":
        marks.append(pytest.mark.skip(reason=f"needs a GPU, JAX sees {jax.devices()[0].device_kind} only"))
    for item in items:
        if Path(__file__).parent in item.path.parents:
            for mark in marks:
                item.add_marker(mark)


@pytest.hookimpl(wrapper=True)
def pytest_pyfunc_call(pyfuncitem):
    """Skips the test of an implementation that says why it cannot run here."""
    from latent_attention import UnavailableError

    try:
        return (yield)
    except UnavailableError as e:
        pytest.skip(str(e))
