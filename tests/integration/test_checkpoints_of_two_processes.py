"""Two processes of one job save and restore together; what is said of a checkpoint is said once, for both."""

import re
import socket
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent
PROCESS = """
import os, sys
os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=4"
import jax
address, index, run_dir, steps = sys.argv[1:]
jax.config.update("jax_cpu_collectives_implementation", "gloo")
jax.distributed.initialize(address, 2, int(index))
sys.path.insert(0, "tests")
from pathlib import Path
from mla_jax.errors import one_line_errors
from tiny import make_config, train
with one_line_errors():
    stages = [{"seq_len": 96, "steps": int(steps)}]
    train(make_config(Path(run_dir), stages, checkpoint_every=2, log_every=1, keep_last=9))
"""


def train_together(run_dir: Path, steps: int) -> tuple[list[int], list[str]]:
    """Exit code and stderr of both processes."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    commands = [[sys.executable, "-c", PROCESS, address, str(i), str(run_dir), str(steps)] for i in range(2)]
    pipes = {"cwd": ROOT, "text": True, "stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE}
    processes = [subprocess.Popen(command, **pipes) for command in commands]
    try:
        errors = [process.communicate(timeout=300)[1] for process in processes]
    finally:
        for process in processes:
            process.kill()
    return [process.returncode for process in processes], errors


def shards_of(run_dir: Path, step: int, process: int) -> list[Path]:
    """Files that a process wrote, the largest first; into how many its parameters go is a matter of timing."""
    folder = run_dir / "checkpoints" / str(step) / "params" / f"ocdbt.process_{process}" / "d"
    return sorted(folder.iterdir(), key=lambda p: p.stat().st_size, reverse=True)


@pytest.mark.integration
def test_each_writes_its_shards_and_both_pass_over_the_same_damage(tmp_path):
    run_dir = tmp_path / "run"
    codes, errors = train_together(run_dir, 4)
    assert codes == [0, 0], errors
    sizes = [sum(p.stat().st_size for p in shards_of(run_dir, 4, process)) for process in range(2)]
    assert min(sizes) > max(sizes) / 4  # half of the parameters each, and versions of the index

    shards_of(run_dir, 4, 1)[0].write_bytes(b"nothing")
    codes, errors = train_together(run_dir, 6)
    assert codes == [0, 0], errors
    assert len(re.findall(r"^warning: .*/4 is corrupt .* now 4\.corrupt; using step 2", "".join(errors), re.M)) == 1
    steps = {p.name for p in (run_dir / "checkpoints").iterdir()}
    assert steps == {"2", "4", "4.corrupt", "6"}

    for step in ("2", "4", "6"):
        (run_dir / "checkpoints" / step / "manifest.json").unlink()
    codes, errors = train_together(run_dir, 6)
    assert codes == [1, 1], errors
    assert "none to use instead (step 2: manifest.json is missing; step 4" in errors[0]
    assert "process 0 cannot go on" in errors[1]
