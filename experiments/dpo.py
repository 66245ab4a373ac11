"""Direct preference optimisation: `python -m experiments.dpo init_from=RUN [KEY=VALUE ...]`."""

from experiments.entry import run
from mla_jax.config import DpoConfig
from mla_jax.distributed.preemption import StopRequest
from mla_jax.evals.mining import mine_pairs
from mla_jax.losses.preference import PreferenceLoss
from mla_jax.training.job import train_job
from mla_jax.training.reference import ReferencePipelines


def main(config: DpoConfig) -> None:
    """Trains on the pairs of `config.data` against a reference model."""
    data = config.data
    loss = PreferenceLoss(config.loss, data.branch_tokens, data.pairs_per_row, data.packed, config.train.loss_chunk)
    stop = StopRequest()
    train_job(config, loss, ReferencePipelines(config, loss, stop, mine_pairs), stop)


if __name__ == "__main__":
    run("dpo", main)
