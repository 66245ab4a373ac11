"""Proofs: what the files in conf/proof say can be run, and steps run once, in order, and go on after any end."""

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


def test_another_command_is_another_step(tmp_path):
    for run in ("one", "two", "two"):
        Proof(tmp_path / "proof", [step("a", appending(tmp_path / run))]).run()
    assert (tmp_path / "one").read_text() == "one " and (tmp_path / "two").read_text() == "two "


def test_what_needs_a_step_is_run_after_it_again(tmp_path):
    def proof(first: str) -> Proof:
        steps = [step("a", appending(tmp_path / first)), step("b", appending(tmp_path / "b"), "a")]
        return Proof(tmp_path / "proof", [*steps, step("c", appending(tmp_path / "c"))])

    proof("one").run()
    changed = proof("two")
    assert not changed.finished(changed.steps[1]), "a has not run with this command"
    record = tmp_path / "proof/steps/a.json"
    record.write_text(json.dumps(json.loads(record.read_bytes()) | {"date": "2999-01-01T00:00:00+00:00"}))
    again = proof("one")
    assert [again.finished(each) for each in again.steps] == [True, False, True]
    changed.run()
    assert (tmp_path / "b").read_text() == "b b " and (tmp_path / "c").read_text() == "c "


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


def test_a_step_runs_once_at_a_time(tmp_path):
    proof = Proof(tmp_path / "proof", [step("a", appending(tmp_path / "a"))])
    (tmp_path / "proof" / "steps").mkdir(parents=True)
    with FileLock(tmp_path / "proof/steps/a.lock"), pytest.raises(InputError, match="step a is running already"):
        proof.run()
    proof.run()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_reaches_the_step_once_and_ends_the_call(number, tmp_path):
    (tmp_path / "step.py").write_text(
        "import signal, sys, time\n"
        "told = []\n"
        "for number in (signal.SIGINT, signal.SIGTERM):\n"
        "    signal.signal(number, lambda number, _: told.append(number))\n"
        "print('ready')\n"
        "while not told:\n"
        "    time.sleep(0.01)\n"
        "time.sleep(0.3)\n"
        "print('told', *map(int, told))\n"
        "sys.exit(130)\n"
    )
    step = Step("a", f"python {tmp_path / 'step.py'}")
    code = (
        "from pathlib import Path; from tools.proof import Proof, Step\n"
        f"Proof(Path({str(tmp_path / 'proof')!r}), [{step!r}]).run()"
    )
    environment = os.environ | {"PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'kernels'}"}
    process = subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, env=environment, start_new_session=True
    )
    assert process.stdout is not None
    for line in process.stdout:
        if line == "ready\n":
            os.killpg(process.pid, number)  # as a terminal and timeout(1) do
            break
    out, _ = process.communicate(timeout=60)
    assert process.returncode == 130
    assert out == f"told {int(number)}\nStopped in step a; the same command goes on from there\n"
    assert not Proof(tmp_path / "proof", [step]).finished(step)


def test_the_command_line(tmp_path, monkeypatch, capsys):
    def call(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["proof", "small_128k", f"folder={tmp_path}", *arguments])
        code: Any = 0
        try:
            tool.main()
        except SystemExit as e:
            code = e.code
        return code, *capsys.readouterr()

    code, out, _ = call("--list")
    assert code == 0 and out.count("    python -m ") == len(read_proof("small_128k", []).steps)
    assert f"run_dir={tmp_path}/seed-0 " in out and not any(tmp_path.iterdir())
    code, out, err = call("--only", "passkey-0")
    assert code == 1 and err == "error: step passkey-0 needs seed-0, which has not finished; run that first\n"
    code, out, err = call("--list", "nothing=1")
    assert code == 2 and err.startswith("error: ") and "nothing" in err and err.count("\n") == 1
