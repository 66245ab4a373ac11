"""What several processes print that wait for each other."""

import subprocess
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor


def printed_by(processes: Sequence[subprocess.Popen], timeout: float) -> list[tuple[str, str]]:
    """Output and errors of each until its end; kills all that run after `timeout` seconds.

    All are read at once: one that writes more than a pipe holds waits for its reader, and the others for it.
    """
    try:
        with ThreadPoolExecutor(len(processes)) as threads:
            return list(threads.map(lambda process: process.communicate(timeout=timeout), processes))
    finally:
        for process in processes:
            process.kill()
            process.wait()
