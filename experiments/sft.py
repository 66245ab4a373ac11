"""Supervised fine-tuning: `python -m experiments.sft [KEY=VALUE ...]`."""

from experiments.entry import run
from mla_jax.bridge.llama.teacher import load_teacher
from mla_jax.config import SftConfig
from mla_jax.data.pipeline import make_pipeline
from mla_jax.losses.cross_entropy import CrossEntropy
from mla_jax.losses.distillation import Distillation
from mla_jax.losses.loss import Loss
from mla_jax.training.job import train_job


def main(config: SftConfig) -> None:
    """Trains on the targets of `config.data`, with cross-entropy or with distillation from `config.loss.source`."""
    chunk = config.train.loss_chunk
    loss: Loss = CrossEntropy(chunk)
    if config.loss.source is not None:
        loss = Distillation(chunk, load_teacher(config.loss.source, config.model), config.loss.kl_weight)
    train_job(config, loss, make_pipeline)


if __name__ == "__main__":
    run("sft", main)
