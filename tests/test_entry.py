"""The command line: where the jobs of a sweep and a submitted job keep their runs, and what SLURM lacks."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SHOW = """
import sys
from experiments.entry import run
run("sft", lambda config: print("run_dir", config.run_dir))
"""
NO_EXTRA = "import sys; sys.modules['hydra_plugins.hydra_submitit_launcher'] = None" + SHOW


def command(*overrides: str, code: str = SHOW, **environment: str) -> subprocess.CompletedProcess:
    ran = [sys.executable, "-c", code, *overrides]
    return subprocess.run(ran, cwd=ROOT, env=os.environ | environment, capture_output=True, text=True, timeout=120)


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
