"""Two processes of one job save and restore together; what is said of a checkpoint is said once, for both."""

import json
import re
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

from mla_jax.checkpoint.run_folder import load_run
from processes import held_port, printed_by

ROOT = Path(__file__).parent.parent.parent
PROCESS = """
import os, sys
os.environ["XLA_FLAGS"] += " --xla_force_host_platform_device_count=4"
import jax
address, index, run_dir, steps, fault = sys.argv[1:]
jax.config.update("jax_cpu_collectives_implementation", "gloo")
jax.distributed.initialize(address, 2, int(index))
sys.path.insert(0, "tests")
from pathlib import Path
from mla_jax.errors import one_line_errors
from tiny import make_config, train
exec(fault)
with one_line_errors():
    stages = [{"seq_len": 96, "steps": int(steps)}]
    train(make_config(Path(run_dir), stages, checkpoint_every=2, log_every=1, keep_last=9))
"""


def train_together(run_dir: Path, steps: int, faults: tuple[str, str] = ("", "")) -> tuple[list[int], list[str]]:
    """Exit code and stderr of both processes; `faults` are statements that they run before they train."""
    pipes = {"cwd": ROOT, "text": True, "stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE}
    with held_port() as port:
        arguments = ([f"127.0.0.1:{port}", str(i), str(run_dir), str(steps), faults[i]] for i in range(2))
        processes = [subprocess.Popen([sys.executable, "-c", PROCESS, *each], **pipes) for each in arguments]
        errors = [error for _, error in printed_by(processes, timeout=900)]
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


FILES_ARE_LIMITED = """
import resource
from mla_jax.checkpoint.manager import Checkpoints
save = Checkpoints.save
def limited(self, step, *rest):
    self.wait()
    if step == 4:
        resource.setrlimit(resource.RLIMIT_FSIZE, (2000, 2000))
    save(self, step, *rest)
Checkpoints.save = limited
"""


@pytest.mark.integration
@pytest.mark.parametrize("failing", [0, 1])
def test_a_write_that_fails_in_one_process_ends_both_with_its_cause(tmp_path, failing):
    faults = ("", FILES_ARE_LIMITED) if failing else (FILES_ARE_LIMITED, "")
    codes, errors = train_together(tmp_path / "run", 100_000, faults)
    assert codes == [1, 1], errors
    for process, printed in enumerate(errors):
        (line,) = [line for line in printed.splitlines() if line.startswith("error:")]
        assert "could not save a checkpoint" in line and "File too large" in line, line
        assert "the last complete checkpoint is step 2" in line
        assert (f"(process {failing}: " in line) == (process != failing)


HIDDEN = """
import errno, os, time
from pathlib import Path
from mla_jax.distributed import decisions
decisions.VISIBLE_WITHIN_S = 10.0
looks, stat, listdir, scandir = [], os.stat, os.listdir, os.scandir

def hidden(path):
    if "/checkpoints/4" not in os.fspath(path):
        return False
    looks.append(time.monotonic())
    return looks[-1] < looks[0] + {seconds}

def stat_without(path, *args, **kwargs):
    if isinstance(path, (str, os.PathLike)) and hidden(path):
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), os.fspath(path))
    return stat(path, *args, **kwargs)

class Scan:
    def __init__(self, path):
        self.entries = scandir(path)
    def __enter__(self):
        return (entry for entry in self.entries if not hidden(entry.path))
    __iter__ = __enter__
    def __exit__(self, *_):
        self.entries.close()
    close = __exit__

os.stat, os.scandir = stat_without, lambda path=".": Scan(path)
os.listdir = lambda path=".": [name for name in listdir(path) if not hidden(f"{{path}}/{{name}}")]
"""


@pytest.mark.integration
def test_both_resume_from_the_step_that_the_first_one_sees(tmp_path):
    run_dir = tmp_path / "run"
    codes, errors = train_together(run_dir, 4)
    assert codes == [0, 0], errors
    both = re.compile(r"/checkpoints/4/manifest.json did not appear on \S+ within 10 s, .*a disk that all nodes share")
    codes, errors = train_together(run_dir, 6, ("", HIDDEN.format(seconds=10_000)))
    assert codes == [1, 1] and all(both.search(printed) for printed in errors), errors
    codes, errors = train_together(run_dir, 6, ("", HIDDEN.format(seconds=3)))
    assert codes == [0, 0], errors
    assert {p.name for p in (run_dir / "checkpoints").iterdir()} == {"2", "4", "6"}


SUMMED = """
from mla_jax.checkpoint import manifest
crc = manifest._crc32

def summed(path):
    with open(f"{run_dir}.summed.{index}", "a") as file:
        file.write(f"{path}\\n")
    return crc(path)

manifest._crc32 = summed
"""


def taken(run_dir: Path) -> list[str]:
    """The files that each process has read for their checksums since the last call, a line each."""
    files = [Path(f"{run_dir}.summed.{process}") for process in range(2)]
    texts = [file.read_text() for file in files]
    for file in files:
        file.unlink()
    return texts


@pytest.mark.integration
def test_each_sums_what_it_wrote_and_both_verify(tmp_path):
    run_dir, step = tmp_path / "run", tmp_path / "run" / "checkpoints" / "2"
    codes, errors = train_together(run_dir, 2, (SUMMED, SUMMED))
    assert codes == [0, 0], errors
    first, second = taken(run_dir)
    assert "ocdbt.process_0/" in first and "ocdbt.process_1/" not in first
    assert "ocdbt.process_1/" in second and "ocdbt.process_0/" not in second
    manifest = json.loads((step / "manifest.json").read_bytes())["files"]
    folders = ("params", "optimizer", "position", "metrics")
    on_disk = (p for name in folders for p in (step / name).rglob("*") if p.is_file())
    assert set(manifest) == {p.relative_to(step).as_posix() for p in on_disk}

    codes, errors = train_together(run_dir, 2, (SUMMED, SUMMED))
    assert codes == [0, 0], errors
    verified = [set(text.splitlines()) for text in taken(run_dir)]
    assert not verified[0] & verified[1] and abs(len(verified[0]) - len(verified[1])) <= 1
    assert len(verified[0] | verified[1]) == len(manifest)


REPLICATED = """
import functools, tiny
from mla_jax.checkpoint.manager import Checkpoints
jax.config.update("jax_enable_compilation_cache", False)  # which reads files too
tiny.MeshConfig = functools.partial(tiny.MeshConfig, data=2, fsdp=-1)
restore = Checkpoints.restore_state

def bytes_read():
    return int(Path("/proc/self/io").read_text().split()[1])

def counted(self, *args):
    before = bytes_read()
    result = restore(self, *args)
    Path(f"{run_dir}.restored.{index}").write_text(str(bytes_read() - before))
    return result

Checkpoints.restore_state = counted
"""
UNREADABLE = """
from orbax.checkpoint import type_handlers
async def unreadable(*_):
    raise OSError("Input/output error")
type_handlers.ArrayHandler.deserialize = unreadable
"""


@pytest.mark.integration
def test_one_replica_reads_for_both_and_the_run_goes_on_as_if_it_had_not_ended(tmp_path):
    once, twice = tmp_path / "once", tmp_path / "twice"
    for run_dir, steps in ((once, 6), (twice, 4)):
        codes, errors = train_together(run_dir, steps, (REPLICATED, REPLICATED))
        assert codes == [0, 0], errors
    codes, errors = train_together(twice, 6, (REPLICATED + UNREADABLE, REPLICATED))
    assert codes == [1, 1] and all("Input/output error" in printed for printed in errors), errors
    codes, errors = train_together(twice, 6, (REPLICATED, REPLICATED))
    assert codes == [0, 0], errors
    restored = [int(Path(f"{twice}.restored.{process}").read_text()) for process in range(2)]
    assert restored[0] > 10 * restored[1]  # the second reads what says which arrays there are
    jax.tree.map(np.testing.assert_array_equal, *(jax.device_get(load_run(run).params) for run in (once, twice)))
