"""Proofs: what the files in conf/proof say can be run, and steps run once, in order, and go on after any end."""

import dataclasses
import functools
import importlib.util
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from filelock import FileLock
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from experiments.entry import CONF, compose_config
from mla_jax.config import EvaluateConfig, SftConfig, register_schemas
from mla_jax.errors import InputError, UsageError
from tools import proof as tool
from tools.proof import PROOFS, Proof, Step, read_proof

ROOT = Path(__file__).resolve().parent.parent.parent


@functools.cache
def composed(step: Step) -> Any:
    """The config that the command of a step composes; None for a command without one."""
    python, m, module, *arguments = step.run.split()
    assert (python, m) == ("python", "-m")
    if module == "experiments.sft":
        return compose_config(arguments)
    if module == "experiments.evaluate":
        register_schemas()
        with initialize_config_dir(str(CONF), version_base=None):
            return OmegaConf.to_object(compose("evaluate", overrides=arguments))
    spec = importlib.util.find_spec(module)
    assert spec and spec.origin
    source = Path(spec.origin).read_text()
    assert all(f'"{word}"' in source for word in arguments if word.startswith("--"))
    return None


@pytest.mark.parametrize("tiny", [False, True])
@pytest.mark.parametrize("name", PROOFS)
def test_every_command_can_be_composed(name, tiny):
    for config in map(composed, read_proof(name, [], tiny=tiny).steps):
        if isinstance(config, SftConfig):
            assert (max(stage.seq_len for stage in config.train.stages) <= 256) == tiny
        elif config:
            assert (max(config.eval.lengths) <= 8192) == tiny


@pytest.mark.parametrize("name", PROOFS)
def test_steps_need_earlier_ones_that_make_what_they_read_and_share_no_output(name):
    proof = read_proof(name, [])
    earlier, outputs = {}, set()
    for step in proof.steps:
        assert set(step.needs) <= earlier.keys() and step.name not in earlier
        config = composed(step)
        if isinstance(config, EvaluateConfig):
            made = [word.removeprefix("run_dir=") for needed in step.needs for word in earlier[needed].run.split()]
            assert config.run in made and config.run.startswith(f"{proof.folder}/")
            output = (config.out or f"{config.run}/eval", type(config.eval), getattr(config.eval, "format", ""))
            assert output not in outputs
            outputs.add(output)
        earlier[step.name] = step


def test_the_board_of_the_speedrun_is_asked_of_three_seeds():
    steps = {step.name: composed(step) for step in read_proof("small_128k", []).steps}
    trained = [steps[f"seed-{n}"] for n in range(3)]
    assert [config.seed for config in trained] == [0, 1, 2]
    assert len({config.train.compilation_cache for config in trained} - {"auto", None}) == 3
    for n in range(3):
        passkeys, keys = steps[f"passkey-{n}"].eval, steps[f"keys-{n}"].eval
        assert 131072 in passkeys.lengths and passkeys.samples * len(passkeys.depths) == 110
        assert 131072 in keys.lengths and 16 in keys.keys and keys.samples == 40


def test_each_ablation_changes_what_its_name_says_and_trains_on_as_many_tokens():
    steps = {step.name: composed(step) for step in read_proof("ablations", []).steps}
    base = steps["base"]

    def tokens(config: SftConfig) -> int:
        return sum(stage.seq_len * stage.batch_size * stage.steps for stage in config.train.stages)

    models = {
        "theta-1e7": {"rope_theta": 1e7},
        "theta-2.7e8": {"rope_theta": 2.7e8},
        "rank-64": {"kv_lora_rank": 64},
        "rank-128": {"kv_lora_rank": 128},
        "rank-256": {"kv_lora_rank": 256},
        "rotary-32": {"qk_rope_head_dim": 32},
    }
    lengths = {
        "no-skips": [256, 1024, 4096, 16384, 65536, 131072],
        "at-most-16384": [256, 1024, 4096, 16384],
        "no-16384-no-65536": [256, 1024, 4096, 131072],
    }
    for name, change in models.items():
        model = dataclasses.replace(base.model, **change)
        assert model != base.model
        assert steps[name] == dataclasses.replace(base, model=model, run_dir=steps[name].run_dir)
    for name, trained in lengths.items():
        assert steps[name] == dataclasses.replace(base, train=steps[name].train, run_dir=steps[name].run_dir)
        assert [stage.seq_len for stage in steps[name].train.stages] == trained
        assert tokens(steps[name]) == tokens(base)
    without = [
        dataclasses.replace(stage, position_skip_fraction=0.0, position_skip_max=0) for stage in base.train.stages
    ]
    assert steps["no-skips"].train.stages == without


def test_a_proof_can_be_elsewhere():
    assert [read_proof("passkey_1m", ["folder=F"], tiny=tiny).folder for tiny in (False, True)] == [
        Path("F"),
        Path("F-tiny"),
    ]
    steps = read_proof("passkey_1m", ["folder=F", "start=S"]).steps
    assert "run_dir=S" in steps[0].run and "init_from=S run_dir=F/passkey-1m" in steps[1].run


def step(name: str, code: str, *needs: str) -> Step:
    return Step(name, f"python -c '{code}'", needs)


def appending(path: Path, code: int = 0) -> str:
    """Code that appends its name to a file and ends with an exit code."""
    return f'open("{path}", "a").write("{path.name} "); print("said {path.name}"); raise SystemExit({code})'


def test_it_says_which_step_failed_and_goes_on_there(tmp_path, capsys):
    wanted = tmp_path / "wanted"
    fails = f'print("wanted:", open("{wanted}").read())'
    steps = [step("a", appending(tmp_path / "a")), step("b", fails, "a"), step("c", appending(tmp_path / "c"), "b")]
    proof = Proof(tmp_path / "proof", steps)
    with pytest.raises(InputError, match=r"step b failed with exit code 1, see .*/steps/b\.log"):
        proof.run()
    assert "said a\n" in capsys.readouterr().out and not (tmp_path / "c").exists()
    assert "FileNotFoundError" in (tmp_path / "proof/steps/b.log").read_text()
    wanted.write_text("this")
    proof.run()
    assert "== a: finished before" in capsys.readouterr().out
    proof.run()
    assert (tmp_path / "a").read_text() == "a " and (tmp_path / "c").read_text() == "c "
    log = (tmp_path / "proof/steps/b.log").read_text()
    assert log.count("$ python -c") == 2 and log.endswith("wanted: this\n")
    record = json.loads((tmp_path / "proof/steps/b.json").read_bytes())
    assert record["calls"] == 2 and record["seconds"] >= 0 and record["command"] == steps[1].run
    table = [line.split(" | ")[0] for line in proof.tables().splitlines()]
    assert table == ["| step", "| ---", "| a", "| b", "| c"]


def test_a_step_keeps_its_command(tmp_path):
    Proof(tmp_path / "proof", [step("a", appending(tmp_path / "one"))]).run()
    with pytest.raises(InputError, match=r"step a was called with another command, which .*/steps/a\.json has; choose"):
        Proof(tmp_path / "proof", [step("a", appending(tmp_path / "two"))]).run()
    (tmp_path / "proof/steps/a.json").unlink()
    Proof(tmp_path / "proof", [step("a", appending(tmp_path / "two"))]).run()
    assert (tmp_path / "one").read_text() == "one " and (tmp_path / "two").read_text() == "two "


def test_only_some_steps(tmp_path):
    steps = [step(name, appending(tmp_path / name), *needs) for name, needs in (("a", ()), ("b", "a"), ("c", ()))]
    proof = Proof(tmp_path / "proof", steps)
    with pytest.raises(InputError, match="step b needs a, which has not finished"):
        proof.run(["b"])
    with pytest.raises(UsageError, match="no step is called d; steps: a, b, c"):
        proof.run(["a", "d"])
    assert not (tmp_path / "a").exists()
    proof.run(["c"])
    proof.run(["a", "b"])
    assert all(proof.finished(each) for each in steps)


def start(proof: Path, step: Step) -> subprocess.Popen:
    """A process, in a group of its own, that runs a proof of one step."""
    code = (
        f"from pathlib import Path; from tools.proof import Proof, Step; Proof(Path({str(proof)!r}), [{step!r}]).run()"
    )
    environment = os.environ | {"PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'kernels'}"}
    return subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, env=environment, start_new_session=True
    )


def test_a_step_that_another_call_runs_is_waited_for(tmp_path):
    (tmp_path / "proof" / "steps").mkdir(parents=True)
    with FileLock(tmp_path / "proof/steps/a.lock"):
        process = start(tmp_path / "proof", step("a", appending(tmp_path / "a")))
        assert process.stdout is not None
        assert process.stdout.readline() == "== a: waiting for another call, which runs it\n"
        assert not (tmp_path / "a").exists()
    process.communicate(timeout=60)
    assert process.returncode == 0 and (tmp_path / "a").read_text() == "a "


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
@pytest.mark.parametrize("code", [130, 0])
def test_a_signal_reaches_the_step_once_and_ends_the_call(number, code, tmp_path):
    (tmp_path / "step.py").write_text(
        "import signal, sys, time\n"
        "told = []\n"
        "for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):\n"
        "    signal.signal(number, lambda number, _: told.append(number))\n"
        "print('ready')\n"
        "while not told:\n"
        "    time.sleep(0.01)\n"
        "time.sleep(0.3)\n"
        "print('told', *map(int, told))\n"
        f"sys.exit({code})\n"
    )
    step = Step("a", f"python {tmp_path / 'step.py'}")
    process = start(tmp_path / "proof", step)
    assert process.stdout is not None
    for line in process.stdout:
        if line == "ready\n":
            os.killpg(process.pid, number)  # as a terminal and timeout(1) do
            break
    out, _ = process.communicate(timeout=60)
    assert process.returncode == 130
    assert out.startswith(f"told {int(number)}\n")
    assert out.endswith("Stopped in step a; the same command goes on from there\n")
    assert Proof(tmp_path / "proof", [step]).finished(step) == (code == 0)


def call(monkeypatch, capsys, *arguments: str) -> tuple[int, str, str]:
    """Exit code, output and errors of the command line."""
    monkeypatch.setattr(sys, "argv", ["proof", *arguments])
    code: Any = 0
    try:
        tool.main()
    except SystemExit as e:
        code = e.code
    return code, *capsys.readouterr()


def test_the_command_line(tmp_path, monkeypatch, capsys):
    here = functools.partial(call, monkeypatch, capsys, "small_128k", f"folder={tmp_path}")
    code, out, _ = here("--list")
    assert code == 0 and out.count("    python -m ") == len(read_proof("small_128k", []).steps)
    assert f"run_dir={tmp_path}/seed-0 " in out and not any(tmp_path.iterdir())
    code, out, err = here("--only", "passkey-0")
    assert code == 1 and err == "error: step passkey-0 needs seed-0, which has not finished; run that first\n"
    code, out, err = here("--list", "nothing=1")
    assert code == 2 and err.startswith("error: ") and "nothing" in err and err.count("\n") == 1


@pytest.mark.integration
def test_a_whole_proof_with_a_model_that_learns_nothing(tmp_path, monkeypatch, capsys):
    code, out, _ = call(monkeypatch, capsys, "passkey_1m", f"folder={tmp_path / 'proof'}", "--tiny")
    assert code == 0
    results, steps = out.split("\n\n")[-3:-1], out.split("\n\n")[-1].splitlines()
    assert any(line.startswith("| ") and "/" in line for line in results[0].splitlines())
    assert [line.split(" | ")[2] for line in steps[2:]] == ["1"] * 8
    assert (tmp_path / "proof-tiny" / "attention.json").exists()
