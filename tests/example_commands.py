"""Commands of the examples that `make` runs."""

import subprocess
import sys
import time
from typing import Any


def run(*command: object, **how: Any) -> subprocess.CompletedProcess[str]:
    """Runs `python -m COMMAND`, and says how long it took."""
    start = time.perf_counter()
    print("$ python -m", *command, flush=True)
    ran = subprocess.run([sys.executable, "-m", *map(str, command)], check=True, text=True, **how)
    print(f"== {time.perf_counter() - start:.0f} s", flush=True)
    return ran
