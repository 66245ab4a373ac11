"""The vLLM tests need the environment of `make vllm`."""

import pytest

from vllm_server import PYTHON


@pytest.fixture(scope="session", autouse=True)
def environment():
    if not PYTHON.exists():
        pytest.skip(f"{PYTHON} is missing; make vllm")
