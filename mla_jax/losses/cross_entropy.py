"""Chunked cross-entropy: the logits of a whole sequence never exist, and those of a chunk are computed once."""

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp

from mla_jax import mesh
from mla_jax.losses.log_probs import target_log_probs
from mla_jax.losses.loss import Arrays, mean
from mla_jax.model.layers import join_chunks, matmul, split_tokens
from mla_jax.model.transformer import Transformer


@dataclass(frozen=True)
class CrossEntropy:
    """Next-token cross-entropy, the `Loss` of supervised fine-tuning: a weighted mean over the batch, in nats.

    Batches have `tokens`, `targets`, `weights`, `answers`, `positions` and optionally `segments`; see `data.pipeline`.
    """

    chunk: int
    """Tokens of a sequence whose logits exist at one time."""
    accuracy_metric: ClassVar[str] = "answer_accuracy"
    totals: ClassVar[tuple[str, ...]] = ()

    @property
    def branch_tokens(self) -> int:
        """None: rows have no branches."""
        return 0

    @property
    def shared(self) -> dict[str, Any]:
        """Nothing."""
        return {}

    def sums(self, transformer: Transformer, rows: Arrays) -> dict[str, jax.Array]:
        """The fields of `LossSums`."""
        h_BTD = transformer(rows["tokens"], rows["positions"], rows.get("segments"))
        targets = rows["targets"], rows["weights"], rows["answers"]
        return chunked_cross_entropy(transformer.head(), h_BTD, *targets, self.chunk)._asdict()

    def normalizer(self, batch: Arrays) -> jax.Array:
        """The loss weight of all targets."""
        return jnp.maximum(batch["weights"].sum(), 1e-9)

    def means(self, sums: Mapping[str, float]) -> dict[str, float]:
        """Loss in nats per weighted token, and the share of answer tokens predicted right, teacher-forced."""
        return {
            "loss": mean(sums.get("loss", 0.0), sums.get("weight", 0.0)),
            "answer_accuracy": mean(sums.get("correct", 0.0), sums.get("answers", 0.0)),
        }

    def progress(self, means: Mapping[str, float]) -> str:
        """Loss and answer accuracy."""
        return f"loss {means['loss']:.3f}  answers {means['answer_accuracy']:.1%}"

    def warning(self, before: Mapping[str, float], now: Mapping[str, float]) -> str | None:
        """None: its curve says it all."""
        return None


class LossSums(NamedTuple):
    """Sums over tokens, float32 scalars; divide by what the caller averages over."""

    loss: jax.Array
    """Weighted negative log-likelihood in nats; only this has gradients."""
    weight: jax.Array
    correct: jax.Array
    """Answer tokens whose target is the most likely token."""
    answers: jax.Array


def chunked_cross_entropy(
    head_DX: jax.Array,
    h_BTD: jax.Array,
    targets_BT: jax.Array,
    weights_BT: jax.Array,
    answers_BT: jax.Array,
    chunk: int,
) -> LossSums:
    """Cross-entropy of next-token targets, `chunk` tokens of each sequence at a time.

    Where gradients are asked for, the forward pass computes them with the logits at hand: they are those of a sum,
    which the backward pass only has to scale.

    Args:
        head_DX: projects the model's output to logits; see `Transformer.head`.
        h_BTD: the model's output.
        targets_BT: int32 token ids.
        weights_BT: float32 loss weight of each target, 0 to leave it out.
        answers_BT: bool, the targets of which `correct` and `answers` tell.
        chunk: tokens of a sequence whose logits exist at one time.
    """

    def local_sums(h_BTD, targets_BT, weights_BT, answers_BT, head_DX) -> LossSums:
        """Sums [1, 1] over the tokens of this device."""
        sums = _sums(head_DX, h_BTD, targets_BT, weights_BT, answers_BT, min(chunk, h_BTD.shape[1]))
        return jax.tree.map(lambda x: x[None, None], sums)

    by_device = mesh.per_device(local_sums, h_BTD, targets_BT, weights_BT, answers_BT, mesh.all_gather(head_DX))
    return jax.tree.map(jnp.sum, by_device)


@functools.partial(jax.custom_vjp, nondiff_argnums=(5,))
def _sums(head_DX, h_BTD, targets_BT, weights_BT, answers_BT, chunk: int) -> LossSums:
    def body(total: LossSums, xs) -> tuple[LossSums, None]:
        return jax.tree.map(jnp.add, total, _chunk_sums(head_DX, *xs)[0]), None

    return jax.lax.scan(body, _zero_sums(), _chunks(chunk, h_BTD, targets_BT, weights_BT, answers_BT))[0]


def _sums_forward(head_DX, h_BTD, targets_BT, weights_BT, answers_BT, chunk: int):
    """The sums, and the gradients of the summed loss by head and hidden states."""

    def body(carry, xs):
        total, d_head_DX = carry
        h_BtD, targets_Bt, weights_Bt, _ = xs
        sums, logits_BtX, lse_Bt = _chunk_sums(head_DX, *xs)
        target_BtX = jax.nn.one_hot(targets_Bt, logits_BtX.shape[-1])
        d_logits_BtX = (jnp.exp(logits_BtX - lse_Bt[..., None]) - target_BtX) * weights_Bt[..., None]
        d_logits_BtX = d_logits_BtX.astype(h_BtD.dtype)
        d_head_DX += jnp.einsum("btd,btx->dx", h_BtD, d_logits_BtX, preferred_element_type=jnp.float32)
        return (jax.tree.map(jnp.add, total, sums), d_head_DX), matmul(d_logits_BtX, head_DX.T)

    start = _zero_sums(), jnp.zeros(head_DX.shape, jnp.float32)
    (total, d_head_DX), d_h_nBtD = jax.lax.scan(body, start, _chunks(chunk, h_BTD, targets_BT, weights_BT, answers_BT))
    return total, (d_head_DX.astype(head_DX.dtype), join_chunks(d_h_nBtD, h_BTD.shape[1]))


def _sums_backward(_, gradients, d_sums: LossSums):
    d_head_DX, d_h_BTD = ((g * d_sums.loss).astype(g.dtype) for g in gradients)
    return d_head_DX, d_h_BTD, None, None, None


_sums.defvjp(_sums_forward, _sums_backward)


def _chunk_sums(head_DX, h_BtD, targets_Bt, weights_Bt, answers_Bt) -> tuple[LossSums, jax.Array, jax.Array]:
    """The sums over a chunk, its logits and their log-sum-exp."""
    logits_BtX = matmul(h_BtD, head_DX, jnp.float32)
    log_probs_Bt, lse_Bt, is_greedy_Bt = target_log_probs(logits_BtX, targets_Bt)
    sums = LossSums(
        loss=jnp.sum(-log_probs_Bt * weights_Bt),
        weight=jnp.sum(weights_Bt),
        correct=jnp.sum(answers_Bt & is_greedy_Bt, dtype=jnp.float32),
        answers=jnp.sum(answers_Bt, dtype=jnp.float32),
    )
    return sums, logits_BtX, lse_Bt


def _chunks(chunk: int, *arrays: jax.Array) -> tuple[jax.Array, ...]:
    return tuple(split_tokens(x, chunk) for x in arrays)  # padding has weight 0 and is no answer


def _zero_sums() -> LossSums:
    return LossSums(*(jnp.zeros((), jnp.float32) for _ in LossSums._fields))
