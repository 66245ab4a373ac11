"""A loss and a pipeline that have nothing in common with those of fine-tuning."""

import jax.numpy as jnp
import numpy as np

from mla_jax.data import pipeline


class MeanSquare:
    """Mean square of the model's output, which the last norm's scale decides; `small` is the share below 0.9."""

    accuracy_metric = "small"
    branch_tokens = 0
    totals = ("seen",)

    @property
    def shared(self):
        return {}

    def sums(self, transformer, rows):
        square_BT = jnp.mean(transformer(rows["tokens"], rows["positions"]) ** 2, axis=-1)
        return {
            "loss": jnp.sum(square_BT),
            "tokens": jnp.float32(square_BT.size),
            "small": jnp.sum(1.0 * (square_BT < 0.9)),
            "seen": jnp.float32(len(square_BT)),
        }

    def normalizer(self, batch):
        return jnp.float32(batch["tokens"].size)

    def means(self, sums):
        tokens = max(sums.get("tokens", 0.0), 1.0)
        means = {name: sums.get(name, 0.0) / tokens for name in ("loss", "small")}
        return means | {"seen": sums.get("seen", 0.0)}

    def progress(self, means):
        return f"squared {means['loss']:.3f}"

    def warning(self, before, now):
        return "it falls" if now["loss"] < before["loss"] else None


def sevens(data, tokenizer, stages, stage, seed, rows_of, validation=False):
    """Batches whose tokens are all 7, without targets and weights."""
    shape = len(rows_of(stages[stage].batch_size)), stages[stage].seq_len

    class Sevens:
        def __len__(self):
            return pipeline.ENDLESS

        def __getitem__(self, index):
            positions = np.tile(np.arange(shape[1], dtype=np.int32), (shape[0], 1))
            return {"tokens": np.full(shape, 7, np.int32), "positions": positions}

    return pipeline.Pipeline(Sevens(), workers=0)
