"""Answers judged by a model: `python -m experiments.judge answers=FILE judge.base_url=URL judge.model=NAME`."""

from experiments.entry import run
from mla_jax.config import JudgeConfig
from mla_jax.evals.judge.run import judge


def main(config: JudgeConfig) -> None:
    """Writes the judge's report beside the answers and prints it."""
    judge(config)


if __name__ == "__main__":
    run("judge", main)
