"""Commands that are printed work when they are pasted, and names are text."""

import dataclasses
import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from mla_jax.config import EvaluateConfig, register_schemas
from mla_jax.config.command_line import override, quote_text
from mla_jax.errors import UsageError
from tiny import make_config

ROOT = Path(__file__).resolve().parent.parent
TEXTS = [
    "runs/sweep/optim=adamw,seed=0", "runs/a b", "ü", "日本", "a'b", 'a"b', "${name}", "a${x}b", "$HOME", "12e4567",
    "007", "true", "null", "x{y}", "[a]", "(x)", "a:b", "a~b", "a;b", "a#b", "a&b", "`ls`", "tail'",
]  # fmt: skip
SHOW = """
from experiments.entry import run
run("sft", lambda config: print("name", repr(config.name), config.run_dir))
"""


@pytest.mark.parametrize("text", TEXTS)
def test_a_printed_override_is_read_as_it_was_meant(text):
    register_schemas()
    read = subprocess.run(["sh", "-c", f"printf %s {override('run', text)}"], capture_output=True, text=True).stdout
    with initialize_config_dir(str(ROOT / "conf"), version_base=None):
        config = OmegaConf.to_object(compose("evaluate", overrides=[quote_text(read)]))
    assert isinstance(config, EvaluateConfig) and config.run == text


def test_what_needs_no_quotes_has_none():
    assert override("run", "runs/nano-needle_1.b") == "run=runs/nano-needle_1.b"


def names(*arguments: str) -> list[str]:
    command = [sys.executable, "-c", SHOW, *arguments]
    ran = subprocess.run(command, cwd=ROOT, env=os.environ, capture_output=True, text=True, timeout=120)
    assert ran.returncode == 0, ran.stderr
    return [line.removeprefix("name ") for line in ran.stdout.splitlines() if line.startswith("name ")]


def test_a_name_is_text():
    assert names("name=12e4567") == ["'12e4567' runs/12e4567"]
    assert names("-m", "name=12e4567,007,a", "seed=1") == [
        f"'{name}' runs/{name}/name={name}" for name in ("12e4567", "007", "a")
    ]
    assert names("-m", "name=1e3", "seed=0,1") == [f"'1e3' runs/1e3/seed={seed}" for seed in (0, 1)]
    assert quote_text("+init_from=1e3") == "+init_from='1e3'"
    for key in ("data.path", "data.tokenizer", "data.text_folder", "tracker.project", "run_dir", "run"):
        assert quote_text(f"{key}=12e4567") == f"{key}='12e4567'"
    for other in ("seed=1e3", "init_from=null", "name=a,b", "name=[1]", "name='1'", "--help", "~name", "model=nano"):
        assert quote_text(other) == other


def test_a_text_that_yaml_reads_as_a_number_beyond_all_is_refused(tmp_path):
    """`name: 12e4567` in a file: it would be the run `inf`, and the next such commit would resume it."""
    (tmp_path / "experiment").mkdir()
    for value, code in (("12e4567", 2), ("'12e4567'", 0)):
        (tmp_path / "experiment" / "mine.yaml").write_text(f"# @package _global_\nname: {value}\n")
        command = [sys.executable, "-c", SHOW, "--config-dir", str(tmp_path), "experiment=mine"]
        ran = subprocess.run(command, cwd=ROOT, env=os.environ, capture_output=True, text=True, timeout=120)
        assert ran.returncode == code, ran.stderr
        expected = "name '12e4567' runs/12e4567\n" if code == 0 else "error: name is inf, as YAML reads a bare 12e4567"
        assert (ran.stdout + ran.stderr).startswith(expected)


@pytest.mark.parametrize("empty", ["", " "])
def test_an_empty_name_is_refused(tmp_path, empty):
    for key in ("name", "run_dir"):
        with pytest.raises(UsageError, match=f"{key} is empty"):
            dataclasses.replace(make_config(tmp_path / "run"), **{key: empty})


def test_the_next_command_after_training_works_when_it_is_pasted(tmp_path):
    stage = "train.stages=[{seq_len: 96, batch_size: 8, steps: 1, learning_rate: 0.01}]"
    small = ["model.hidden_size=32", "model.intermediate_size=32", "model.kv_lora_rank=16", "tracker=none"]
    folder = override("run_dir", str(tmp_path / "ü b=1,c"))
    trained = subprocess.run(
        [sys.executable, "-m", "experiments.sft", *shlex.split(folder), stage, *small], cwd=ROOT, capture_output=True,
        text=True,
    )  # fmt: skip
    assert trained.returncode == 0, trained.stderr
    (printed,) = (line.split("Next: ")[1] for line in trained.stdout.splitlines() if "Next: " in line)
    evaluation = "eval.lengths=[96] eval.depths=[0.5] eval.samples=1 eval.batch_size=1"
    pasted = printed.replace("python", shlex.quote(sys.executable), 1) + f" {evaluation}"
    ran = subprocess.run(["sh", "-c", pasted], cwd=ROOT, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    assert (tmp_path / "ü b=1,c" / "eval" / "passkey.json").is_file()
