"""Supervised fine-tuning: `python -m experiments.sft [KEY=VALUE ...]`."""

from experiments.entry import run
from mla_jax.config import SftConfig
from mla_jax.data.pipeline import make_pipeline
from mla_jax.losses.cross_entropy import CrossEntropy
from mla_jax.training.job import train_job


def main(config: SftConfig) -> None:
    """Trains with cross-entropy on the targets of `config.data`."""
    train_job(config, CrossEntropy(config.train.loss_chunk), make_pipeline)


if __name__ == "__main__":
    run("sft", main)
