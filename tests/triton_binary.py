"""What a compiled Triton kernel says of itself."""

import re
import subprocess
from pathlib import Path


def spilled_bytes(kernel, tmp_path: Path) -> int:
    """Local memory of a thread, according to the compiled kernel."""
    import triton  # pyright: ignore[reportMissingImports]

    (tmp_path / "cubin").write_bytes(kernel.asm["cubin"])
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    result = subprocess.run([tool, "--dump-resource-usage", tmp_path / "cubin"], capture_output=True, text=True)
    found = re.search(r"STACK:(\d+)", result.stdout)
    assert found, result.stdout + result.stderr
    return int(found[1])
