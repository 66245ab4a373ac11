"""The command line: where the jobs of a sweep and a submitted job keep their runs, and what SLURM lacks."""

import dataclasses
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from tiny import make_config

ROOT = Path(__file__).resolve().parent.parent
SHOW = """
import sys
from experiments.entry import run
run("sft", lambda config: print("run_dir", config.run_dir))
"""
NO_EXTRA = "import sys; sys.modules['hydra_plugins.hydra_submitit_launcher'] = None" + SHOW


def command(*overrides: str, code: str = SHOW, cwd: Path = ROOT, **environment: str) -> subprocess.CompletedProcess:
    ran = [sys.executable, "-c", code, *overrides]
    return subprocess.run(ran, cwd=cwd, env=os.environ | environment, capture_output=True, text=True, timeout=120)


def run_dirs(*overrides: str) -> list[str]:
    ran = command(*overrides)
    assert ran.returncode == 0, ran.stderr
    return [line.split()[1] for line in ran.stdout.splitlines() if line.startswith("run_dir ")]


def test_each_job_of_a_sweep_has_a_folder_named_by_what_is_swept(tmp_path):
    given = "train.log_every=5", "train.stages=[{seq_len: 96, batch_size: 8, steps: 10, learning_rate: 0.01}]"
    swept = "seed=0,1", "data.tokenizer=a/b,bytes"
    assert run_dirs("-m", *given, *swept, f"run_dir={tmp_path}/s") == [
        f"{tmp_path}/s/seed={seed},data.tokenizer={name}" for seed in (0, 1) for name in ("a_b", "bytes")
    ]


def test_the_folders_of_a_sweep_over_lists_are_plain_short_and_different(tmp_path):
    lists = [f"[{{seq_len: {n}, batch_size: 8, steps: 10, learning_rate: 0.01}}]" for n in (96, 128)]
    folders = run_dirs("-m", "train.stages=" + ",".join(lists), "seed=0,1", f"run_dir={tmp_path}/s")
    names = [Path(folder).name for folder in folders]
    assert len(set(names)) == 4 and all(re.fullmatch(r"[\w.,=+-]{1,255}", name, re.ASCII) for name in names)
    assert names[0].startswith("train.stages=_seq_len_96,batch_size_8,")
    (name,) = {Path(folder).name for folder in run_dirs("-m", "data.tokenizer='ü b','ü b'", f"run_dir={tmp_path}/s")}
    assert re.fullmatch(r"data.tokenizer=_b-[0-9a-f]{8}", name)


def test_the_sweep_example_has_a_run_for_each_rate_and_rank(tmp_path):
    found = run_dirs("-m", "experiment=sweep_lr", "model.kv_lora_rank=8,16", f"run_dir={tmp_path}/s")
    assert len(set(found)) == len(found) == 6
    assert f"{tmp_path}/s/train.stages.0.learning_rate=0.03,model.kv_lora_rank=16" in found


def test_a_single_submitted_job_keeps_its_run_where_the_same_command_does_without_a_cluster(tmp_path):
    stages = "train.stages=[{seq_len: 96, batch_size: 8, steps: 10, learning_rate: 0.01}]"
    assert run_dirs("hydra.mode=MULTIRUN", stages, f"run_dir={tmp_path}/one") == [f"{tmp_path}/one"]
    assert run_dirs("-m", stages, f"run_dir={tmp_path}/one") == [f"{tmp_path}/one"]


def test_a_machine_without_slurm_is_named(tmp_path):
    pytest.importorskip("hydra_plugins.hydra_submitit_launcher", reason="needs pip install '.[slurm]'")
    ran = command("+cluster=slurm", f"run_dir={tmp_path}/run", PATH=str(tmp_path))
    assert ran.returncode == 2 and "error: there is no SLURM on this machine" in ran.stderr


def test_a_missing_extra_is_named(tmp_path):
    ran = command("+cluster=slurm", f"run_dir={tmp_path}/run", code=NO_EXTRA)
    assert ran.returncode == 2
    assert ran.stderr.strip() == "error: submitting to SLURM needs an extra: pip install '.[slurm]'"


def test_the_config_of_a_run_is_one_to_start_from(tmp_path):
    """By `--config-path RUN --config-name config`, relative to where the command is given."""
    (tmp_path / "r").mkdir()
    config = make_config(tmp_path / "r")
    OmegaConf.save(OmegaConf.create(dataclasses.asdict(config)), tmp_path / "r" / "config.yaml")
    show = "from experiments.entry import run; run('sft', lambda c: print(repr(c)))"
    for path in (["--config-path", "r"], [f"--config-path={tmp_path / 'r'}"]):
        ran = command(*path, "--config-name", "config", code=show, cwd=tmp_path)
        assert (ran.returncode, ran.stdout) == (0, repr(config) + "\n"), ran.stderr
    changed = command("--config-path", "r", "--config-name", "config", "seed=3", code=show, cwd=tmp_path)
    assert changed.stdout == repr(dataclasses.replace(config, seed=3)) + "\n"
    misspelt = command("--config-path", "r", "--config-name", "config", "sed=3", code=show, cwd=tmp_path)
    assert misspelt.returncode == 2 and "sed" in misspelt.stderr and misspelt.stderr.count("\n") == 1
