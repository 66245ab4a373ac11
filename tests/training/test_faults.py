"""What breaks while training: nothing is lost beyond the last complete checkpoint, and the same command goes on."""

import contextlib
import dataclasses
import multiprocessing
import multiprocessing.connection
import os
import shutil
import signal
import subprocess
import sys
from collections import namedtuple
from pathlib import Path

import jax
import numpy as np
import pytest

from mla_jax.checkpoint.manager import Checkpoints
from mla_jax.checkpoint.run_folder import load_run
from mla_jax.errors import InputError
from mla_jax.training import loop
from tiny import DATA, make_config, train

pytestmark = pytest.mark.integration  # whole runs in processes of their own


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory) -> dict:
    run_dir = tmp_path_factory.mktemp("runs") / "whole"
    train(make_config(run_dir))
    return jax.device_get(load_run(run_dir).params)


def assert_goes_on_alike(config, uninterrupted) -> None:
    assert train(config).step == 11
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(load_run(config.run_dir).params), uninterrupted)
    assert not list((Path(config.run_dir) / "checkpoints").glob("*tmp*"))


KILLED = """
import os, signal, sys, time
from pathlib import Path
sys.path.insert(0, "tests")
import conftest
from mla_jax.checkpoint import manager
from tiny import make_config, train

def die():
    os.kill(os.getpid(), signal.SIGKILL)

def written(folder, known):  # a thread calls this
    if folder.name.startswith("8."):
        die() if sys.argv[2] == "named" else time.sleep(600)  # which is not named before it dies
    write_manifest(folder, known)

def started(self, step, *rest):
    save(self, step, *rest)
    if step == 8 and sys.argv[2] == "written":
        die()

write_manifest, manager.write_manifest = manager.write_manifest, written
save, manager.Checkpoints.save = manager.Checkpoints.save, started
train(make_config(Path(sys.argv[1])))
"""


@pytest.mark.parametrize("before", ["written", "named"])
def test_kill_9_during_a_save_costs_that_checkpoint_only(before, uninterrupted, tmp_path):
    command = [sys.executable, "-c", KILLED, str(tmp_path / "run"), before]
    result = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parent.parent.parent)
    assert result.returncode == -signal.SIGKILL, result.stderr
    if before == "named":
        assert (tmp_path / "run" / "checkpoints" / "8.orbax-checkpoint-tmp" / "params").is_dir()
    assert load_run(tmp_path / "run").step == 4
    assert_goes_on_alike(make_config(tmp_path / "run"), uninterrupted)


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 4 MB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(folder)], capture_output=True)
    if done.returncode:
        pytest.skip("a small file system can only be mounted by root")
    yield folder
    subprocess.run(["umount", "--lazy", str(folder)], check=True)


def test_a_disk_that_fills_up_during_a_save_costs_that_checkpoint_only(uninterrupted, small_disk, monkeypatch):
    save, ballast = Checkpoints.save, small_disk / "ballast"

    def with_a_full_disk(self, step, *args):
        self.wait()
        if step == 8:
            free = shutil.disk_usage(small_disk).free
            ballast.write_bytes(bytes(free - 50_000))
            # Somebody else fills the disk: there was room when it was looked for.
            monkeypatch.setattr(shutil, "disk_usage", lambda folder: namedtuple("usage", "free")(10**12))
        save(self, step, *args)

    config = make_config(small_disk / "run")
    with monkeypatch.context() as patch:
        patch.setattr(Checkpoints, "save", with_a_full_disk)
        with pytest.raises(InputError, match=r"could not save .*\((?s:.*)\); the last complete .* step 4; make room"):
            train(config)
    assert load_run(small_disk / "run").step == 4
    ballast.unlink()
    assert_goes_on_alike(config, uninterrupted)


def test_resuming_on_a_disk_that_takes_nothing_is_one_line(small_disk):
    stages = [{"seq_len": 96, "steps": 1}]
    train(make_config(small_disk / "run", stages))
    more, ballast = make_config(small_disk / "run", [stages[0] | {"steps": 2}]), small_disk / "ballast"
    with ballast.open("wb", buffering=0) as file, contextlib.suppress(OSError):
        while True:
            file.write(bytes(4096))
    with pytest.raises(InputError, match=r"run cannot be written to \(No space left on device\)"):
        train(more)
    ballast.unlink()
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    with pytest.raises(InputError, match=r"run cannot be written to \(Read-only file system\)"):
        train(more)
    assert load_run(small_disk / "run").step == 1
    subprocess.run(["mount", "-o", "remount,rw", str(small_disk)], check=True)
    assert train(more).step == 2


def test_a_dead_data_worker_ends_training_with_what_to_do(uninterrupted, tmp_path, monkeypatch):
    config = make_config(tmp_path / "run", data=dataclasses.replace(DATA, workers=1))
    place_batch, steps = loop.place_batch, iter(range(1, 100))

    def killing(*args):
        if next(steps) == 6:
            (worker,) = multiprocessing.active_children()
            assert worker.pid is not None
            os.kill(worker.pid, signal.SIGKILL)
            multiprocessing.connection.wait([worker.sentinel])
        return place_batch(*args)

    with monkeypatch.context() as patch:
        patch.setattr(loop, "place_batch", killing)
        with pytest.raises(
            InputError, match=r"worker process died \(exit code -9\).*lower data\.workers; the same command"
        ):
            train(config)
    assert load_run(tmp_path / "run").step in (4, 8)
    assert_goes_on_alike(config, uninterrupted)
