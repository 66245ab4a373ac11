"""Checks of Triton kernels that need no GPU: numbers in the interpreter, resource usage of the compiled code."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest


def check_interpreted(name: str, *options: str) -> None:
    """Runs the tests of tests/kernels/NAME in Triton's interpreter; options are pytest's.

    A process of its own, because Triton decides on import whether it interprets.
    """
    pytest.importorskip("triton")
    file = Path(__file__).parent / "kernels" / name
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *options, str(file)]
    result = subprocess.run(
        command, env=os.environ | {"TRITON_INTERPRET": "1"}, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stdout[-4000:] + result.stderr[-4000:]
    assert " passed" in result.stdout


def spilled_bytes(kernel, tmp_path: Path) -> int:
    """Bytes of local memory (stack and spills) of a thread, according to the compiled kernel."""
    import triton  # pyright: ignore[reportMissingImports]

    (tmp_path / "cubin").write_bytes(kernel.asm["cubin"])
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    result = subprocess.run([tool, "--dump-resource-usage", tmp_path / "cubin"], capture_output=True, text=True)
    found = re.search(r"STACK:(\d+)", result.stdout)
    assert found, result.stdout + result.stderr
    return int(found[1])
