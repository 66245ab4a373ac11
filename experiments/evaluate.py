"""Evaluation of a run or a Hugging Face folder: `python -m experiments.evaluate run=FOLDER [eval=TASK] [KEY=VALUE]`."""

from collections.abc import Callable
from pathlib import Path

from experiments.entry import run
from mla_jax.bridge.run_or_hf import load_run_or_hf
from mla_jax.compilation_cache import keep_compiled
from mla_jax.config import (
    EvalConfig,
    EvaluateConfig,
    HallucinationConfig,
    HashHopConfig,
    MultikeyConfig,
    NiahConfig,
    PasskeyConfig,
    PerplexityConfig,
    RulerConfig,
)
from mla_jax.evals.hallucination import hallucination_task
from mla_jax.evals.hashhop import hashhop_task
from mla_jax.evals.html_report import report_on
from mla_jax.evals.multikey import multikey_task
from mla_jax.evals.niah import niah_task
from mla_jax.evals.passkey import passkey_task
from mla_jax.evals.perplexity import perplexity_task
from mla_jax.evals.ruler import ruler_task
from mla_jax.evals.runner import evaluate
from mla_jax.evals.task import Task
from mla_jax.evals.tracking import track

TASKS: dict[type[EvalConfig], Callable[..., Task]] = {
    PasskeyConfig: passkey_task,
    HallucinationConfig: hallucination_task,
    HashHopConfig: hashhop_task,
    MultikeyConfig: multikey_task,
    NiahConfig: niah_task,
    PerplexityConfig: perplexity_task,
    RulerConfig: ruler_task,
}
"""The function that makes a task of model, tokenizer and config, by the type of the config."""


def main(config: EvaluateConfig) -> None:
    """Writes RUN/eval/TASK.json, TASK.png and, about all tasks there, report.html; prints the table.

    The trackers that the run was trained with get the rates.
    """
    keep_compiled()
    trained = load_run_or_hf(config.run, config.step)
    task = TASKS[type(config.eval)](trained.model, trained.tokenizer, config.eval)
    out = trained.path / "eval" if config.out is None else Path(config.out)
    results = evaluate(trained, task, out)
    print(f"All tasks of this run: {report_on(out)}")
    track(trained.path, results)


if __name__ == "__main__":
    run("evaluate", main)
