"""Supervised fine-tuning: `python -m experiments.sft [KEY=VALUE ...]`."""

import sys

from experiments.entry import run
from mla_jax.config import SftConfig
from mla_jax.data.pipeline import make_pipeline
from mla_jax.distributed.join import check_same_config, is_main, join_job, print_on_main
from mla_jax.distributed.preemption import requeue
from mla_jax.losses.cross_entropy import CrossEntropy
from mla_jax.training.loop import train
from mla_jax.training.summary import write_summary

INTERRUPTED = 130


def main(config: SftConfig) -> None:
    """Trains and prints where the result is; a SLURM job that was told to stop goes back into the queue."""
    join_job()
    check_same_config(config)
    result = train(config, CrossEntropy(config.train.loss_chunk), make_pipeline)
    if not result.finished:
        if result.terminated:
            requeue()
        print_on_main(f"Interrupted: step {result.step} is saved in {result.run_dir}; the same command resumes it")
        sys.exit(INTERRUPTED)
    if is_main():
        write_summary(result)
    print_on_main(f"Finished at step {result.step}. Next: python -m experiments.evaluate run={result.run_dir}")


if __name__ == "__main__":
    run("sft", main)
