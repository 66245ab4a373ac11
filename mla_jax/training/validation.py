"""Validation while training: held-out batches, the same ones of a stage at every time, forward only."""

import itertools
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import jax

from mla_jax.config import RunConfig
from mla_jax.data.pipeline import Pipeline
from mla_jax.losses.loss import Loss
from mla_jax.mesh import place_batch
from mla_jax.observability.metrics import Window
from mla_jax.training.step import make_forward_step


class Validation:
    """The metrics of a loss on held-out batches of the stage that is trained.

    All processes of a job call it at the same steps and get the same numbers.

    Args:
        config: the run's configuration.
        loss: what is trained.
        make_pipeline: makes the held-out batches of a stage, given its number.
        stage: the stage to begin with.
        shared: `Loss.shared`, on the mesh.

    Raises:
        InputError: held-out data that cannot be used.
        UsageError: the data holds nothing out.
    """

    def __init__(
        self, config: RunConfig, loss: Loss, make_pipeline: Callable[[int], Pipeline], stage: int, shared: dict
    ):
        self._train, self._loss, self._make_pipeline = config.train, loss, make_pipeline
        self._sums = make_forward_step(config.model, loss)
        self._stage, self._data, self._shared = stage, make_pipeline(stage), shared

    def means(self, params: dict, stage: int) -> dict[str, float]:
        """The means of the loss, as it names them, over at most `train.validation_batches` batches."""
        if stage != self._stage:
            self._stage, self._data = stage, self._make_pipeline(stage)
        window = Window()
        with self._batches() as batches:
            for rows in batches:
                batch = place_batch(rows, self._train.grad_accumulation, self._loss.branch_tokens)
                sums = jax.device_get(self._sums(params, batch, self._shared))
                window.add({name: float(value) for name, value in sums.items()})
        return self._loss.means(window.sums)

    @contextmanager
    def _batches(self) -> Iterator[Iterator[dict]]:
        """The batches from the first on, which nothing makes ahead afterwards."""
        self._data.set_state({"next_batch": 0})
        try:
            yield itertools.islice(self._data, self._train.validation_batches)
        finally:
            self._data.close()
