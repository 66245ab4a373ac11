"""Passkey evaluation of a run: `python -m experiments.evaluate run=RUN_DIR [KEY=VALUE ...]`."""

from experiments.entry import run
from mla_jax.checkpoint.run_folder import load_run
from mla_jax.config import EvaluateConfig
from mla_jax.evals.passkey import passkey_task
from mla_jax.evals.runner import evaluate


def main(config: EvaluateConfig) -> None:
    """Writes RUN/eval/passkey.json and passkey.png and prints the table."""
    trained = load_run(config.run, config.step)
    evaluate(trained, passkey_task(trained.model, trained.tokenizer, config.eval), trained.path / "eval")


if __name__ == "__main__":
    run("evaluate", main)
