"""A measured result from its first command to its table: `python -m tools.proof small_128k`."""

import argparse
import json
import os
import shlex
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from experiments.entry import CONF, as_usage_errors
from mla_jax.errors import INTERRUPTED, InputError, UsageError, check_text, one_line_errors
from mla_jax.evals.results_table import format_markdown, read_runs, results_table
from mla_jax.files import write_json
from mla_jax.observability.environment import git_revision

PROOFS = sorted(path.stem for path in (CONF / "proof").glob("*.yaml"))


@dataclass(frozen=True)
class Step:
    """A command of a proof."""

    name: str
    run: str
    """The command, as a shell would take it apart; `python` is this interpreter."""
    needs: tuple[str, ...] = ()
    """Steps that must have finished before."""


class Proof:
    """Steps that run one after another, each once.

    FOLDER/steps has of each NAME.log, all its output, and NAME.json: command, git_revision and date of the last call,
    calls, and seconds, the wall time of the last call, if the step finished. A step that was called keeps its command,
    since a training goes on, or has ended, where another one left it.
    """

    def __init__(self, folder: Path, steps: list[Step]):
        self.folder, self.steps = folder, steps

    def record(self, step: Step) -> dict[str, Any]:
        """What NAME.json says of a step, empty if it was not called yet.

        Raises:
            InputError: it was called with another command.
        """
        path = self._path(step, "json")
        try:
            found = json.loads(path.read_bytes())
        except (OSError, ValueError):
            return {}
        if found["command"] != step.run:
            raise InputError(
                f"step {step.name} was called with another command, which {path} has; choose another folder=FOLDER, or "
                "delete that file and, if the step trained, its run"
            )
        return found

    def finished(self, step: Step) -> bool:
        """Whether the step need not be run again."""
        return "seconds" in self.record(step)

    def run(self, only: list[str] | None = None) -> None:
        """Runs the steps that have not finished.

        Args:
            only: names of steps; None for all.

        Raises:
            UsageError: there is no step of such a name.
            InputError: a step failed, needs one that has not finished, or was called with another command.
            SystemExit: Ctrl-C or SIGTERM, which the step gets too; its code is INTERRUPTED.
        """
        if unknown := set(only or ()) - {step.name for step in self.steps}:
            names = ", ".join(step.name for step in self.steps)
            raise UsageError(f"no step is called {' or '.join(sorted(unknown))}; steps: {names}")
        for step in self.steps:
            if only is None or step.name in only:
                self._run(step)

    def _run(self, step: Step) -> None:
        lacking = [each.name for each in self.steps if each.name in step.needs and not self.finished(each)]
        if lacking:
            raise InputError(f"step {step.name} needs {', '.join(lacking)}, which has not finished; run that first")
        self._path(step, "log").parent.mkdir(parents=True, exist_ok=True)
        lock = FileLock(self._path(step, "lock"))
        try:
            held = lock.acquire(timeout=0)
        except Timeout:
            print(f"== {step.name}: waiting for another call, which runs it", flush=True)
            held = lock.acquire()
        with held:
            if self.finished(step):
                print(f"== {step.name}: finished before, in {self.record(step)['seconds']:.0f} s", flush=True)
            else:
                self._call(step)

    def _call(self, step: Step) -> None:
        record = {
            "command": step.run,
            "git_revision": git_revision(),
            "date": datetime.now(UTC).isoformat(),
            "calls": self.record(step).get("calls", 0) + 1,
        }
        write_json(self._path(step, "json"), record)
        print(f"== {step.name}: {step.run}", flush=True)
        start = time.perf_counter()
        code, stopped = _tee(step.run, self._path(step, "log"))
        seconds = round(time.perf_counter() - start, 1)
        if code and not stopped:
            log = self._path(step, "log")
            raise InputError(
                f"step {step.name} failed with exit code {code}, see {log}; the same command tries it again"
            )
        if code == 0:
            write_json(self._path(step, "json"), record | {"seconds": seconds})
            print(f"== {step.name}: {seconds:.0f} s", flush=True)
        if stopped:
            print(f"Stopped in step {step.name}; the same command goes on from there", flush=True)
            sys.exit(INTERRUPTED)

    def _path(self, step: Step, suffix: str) -> Path:
        return self.folder / "steps" / f"{step.name}.{suffix}"

    def tables(self) -> str:
        """The results in the folder, if there are any, and what each step took, in Markdown."""
        rows = [["step", "seconds", "calls", "commit"]]
        for step in self.steps:
            record = self.record(step) if self.finished(step) else {}
            rows.append([step.name, *(str(record.get(key) or "") for key in ("seconds", "calls", "git_revision"))])
        runs = read_runs([self.folder])
        return (results_table(runs) + "\n" if runs else "") + format_markdown(rows)


def _tee(command: str, log: Path) -> tuple[int, bool]:
    """Runs a command, its output going to stdout and to the end of a file; signals to stop go on to it, once.

    Returns:
        Its exit code, and whether it was told to stop.
    """
    arguments = [sys.executable if word == "python" else word for word in shlex.split(command)]
    environment = os.environ | {"PYTHONUNBUFFERED": "1"}
    told, too_early, process = False, [], None

    def stop(number: int, _: object) -> None:
        nonlocal told
        told = True
        too_early.append(number) if process is None else process.send_signal(number)

    before = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    try:
        with log.open("a", encoding="utf-8") as file:
            print(f"$ {command}", file=file, flush=True)
            process = subprocess.Popen(
                arguments, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace",
                env=environment, process_group=0,
            )  # fmt: skip
            for number in too_early:
                process.send_signal(number)
            assert process.stdout is not None
            for line in process.stdout:
                print(line, end="", flush=True)
                print(line, end="", file=file, flush=True)
            process.wait()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    return process.returncode, told


def read_proof(name: str, overrides: list[str], *, tiny: bool = False) -> Proof:
    """The proof of conf/proof/NAME.yaml with overrides of its keys; tiny: with the file's `tiny` behind commands.

    Raises:
        UsageError: a wrong override.
    """
    check_text(*overrides)
    with initialize_config_dir(str(CONF), version_base=None), as_usage_errors():
        composed = compose(f"proof/{name}", overrides=overrides)
        if tiny:
            composed.folder = f"{composed.folder}-tiny"
        config: Any = OmegaConf.to_container(composed, resolve=True)
    steps = []
    for key, step in config["steps"].items():
        words = step["run"].split()  # python -m MODULE ...
        more = config["tiny"].get(words[2], "").split() if tiny else []
        steps.append(Step(key, " ".join([*words, *more]), tuple(step.get("needs", ()))))
    return Proof(Path(config["folder"]), steps)


def main() -> None:
    """The command line; exit code 1 if a step failed, 130 if it was stopped."""
    parser = argparse.ArgumentParser(
        prog="python -m tools.proof",
        description="Runs the steps of conf/proof/PROOF.yaml that have not finished, then prints their results and "
        "times as Markdown tables. Interrupted, the same command goes on. Output and times of each step: FOLDER/steps.",
    )
    parser.add_argument("proof", choices=PROOFS)
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="of the file; before --only")
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--only", nargs="+", metavar="STEP", help="only these steps, beside other calls for instance")
    which.add_argument("--list", action="store_true", help="print the steps and run nothing")
    parser.add_argument("--tiny", action="store_true", help="all of it on a model that knows nothing, in FOLDER-tiny")
    args = parser.parse_intermixed_args()
    with one_line_errors():
        proof = read_proof(args.proof, args.overrides, tiny=args.tiny)
        if args.list:
            for step in proof.steps:
                print(f"{step.name}{' (finished)' if proof.finished(step) else ''}\n    {step.run}")
            return
        proof.run(args.only)
        print(f"\n{proof.tables()}", end="")


if __name__ == "__main__":
    main()
