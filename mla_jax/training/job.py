"""A training job from its start to its exit code, the same for every objective."""

import shlex
import sys

from mla_jax.compilation_cache import keep_compiled
from mla_jax.config import RunConfig
from mla_jax.config.command_line import override
from mla_jax.config.data import NeedleMixtureConfig
from mla_jax.data.pipeline import MakePipeline
from mla_jax.distributed.join import check_same_config, is_main, join_job, print_on_main
from mla_jax.distributed.preemption import StopRequest, requeue
from mla_jax.errors import INTERRUPTED
from mla_jax.losses.loss import Loss
from mla_jax.training.loop import train
from mla_jax.training.summary import write_summary


def train_job(config: RunConfig, loss: Loss, make_pipeline: MakePipeline, stop: StopRequest | None = None) -> None:
    """Joins the other processes, trains, writes RUN/summary.json and prints where the result is.

    A run that was interrupted ends the process with exit code INTERRUPTED; a SLURM job that was told to stop goes back
    into the queue. Must run before anything uses a device.

    Args:
        config: see `train`; the same on all processes.
        loss: see `train`.
        make_pipeline: see `train`.
        stop: see `train`.

    Raises:
        UsageError: the processes disagree on the config, or the environment contradicts itself.
        InputError: see `train`; the other processes cannot be reached, or the summary cannot be written.
    """
    join_job()
    check_same_config(config)
    keep_compiled(config.train.compilation_cache)
    result = train(config, loss, make_pipeline, stop)
    if not result.finished:
        if result.terminated:
            requeue()
        print_on_main(f"Interrupted: step {result.step} is saved in {result.run_dir}; the same command resumes it")
        sys.exit(INTERRUPTED)
    if is_main():
        write_summary(result)
    if isinstance(config.data, NeedleMixtureConfig):
        command = f"python -m experiments.evaluate {override('run', str(result.run_dir))}"
    else:
        command = shlex.join(["python", "-m", "tools.generate", str(result.run_dir)])
    print_on_main(f"Finished at step {result.step}. Next: {command}")
