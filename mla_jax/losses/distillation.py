"""Distillation: KL divergence from another model's predictions, mixed with cross-entropy, chunk by chunk."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from mla_jax import mesh
from mla_jax.losses.cross_entropy import CrossEntropy
from mla_jax.losses.log_probs import target_log_probs
from mla_jax.losses.loss import Arrays, mean
from mla_jax.model.layers import matmul, split_tokens
from mla_jax.model.transformer import Transformer


class Teacher(NamedTuple):
    """A model whose predictions are learned; it has the vocabulary of the one that is trained."""

    params: Any
    """A pytree of arrays."""
    hidden_states: Callable[[Any, jax.Array, jax.Array, jax.Array | None], jax.Array]
    """From params, tokens, positions and segments [B, T] to the output [B, T, D'] after the final norm."""
    head: Callable[[Any], jax.Array]
    """From params to the weight [D', X] of the output head."""


@dataclass(frozen=True)
class Distillation(CrossEntropy):
    """(1 - w) cross-entropy + w KL(teacher || model), the `Loss`: a weighted mean over the batch, in nats.

    Batches are those of `CrossEntropy`, and their weights count for both parts.
    """

    teacher: Teacher
    kl_weight: float
    """w, from 0 to 1."""

    @property
    def shared(self) -> dict[str, Any]:
        """The teacher's parameters, as `teacher`."""
        return {"teacher": self.teacher.params}

    def sums(self, transformer: Transformer, rows: Arrays) -> dict[str, jax.Array]:
        """The fields of `DistillationSums`; only `loss` has gradients."""

        def teacher(tokens, positions, segments, params):
            return self.teacher.hidden_states(params, tokens, positions, segments)

        h_BTD = transformer(rows["tokens"], rows["positions"], rows.get("segments"))
        inputs = rows["tokens"], rows["positions"], rows.get("segments"), rows["teacher"]
        teacher_BTD = jax.lax.stop_gradient(mesh.per_device(teacher, *inputs))
        heads = transformer.head(), self.teacher.head(rows["teacher"])
        targets = rows["targets"], rows["weights"], rows["answers"]
        sums = chunked_divergence(*heads, h_BTD, teacher_BTD, *targets, self.chunk)
        loss = (1 - self.kl_weight) * sums.cross_entropy + self.kl_weight * sums.kl
        return {"loss": loss, **jax.lax.stop_gradient(sums._asdict())}

    def means(self, sums: Mapping[str, float]) -> dict[str, float]:
        """The loss and its two parts in nats per weighted token; the share of answer tokens predicted right."""
        weight = sums.get("weight", 0.0)
        return super().means(sums) | {name: mean(sums.get(name, 0.0), weight) for name in ("cross_entropy", "kl")}

    def progress(self, means: Mapping[str, float]) -> str:
        """Loss and its two parts."""
        return f"loss {means['loss']:.3f}  KL {means['kl']:.3f}  cross-entropy {means['cross_entropy']:.3f}"


class DistillationSums(NamedTuple):
    """Sums over tokens, float32 scalars."""

    cross_entropy: jax.Array
    """Weighted negative log-likelihood in nats."""
    kl: jax.Array
    """Weighted KL(teacher || model) in nats."""
    weight: jax.Array
    correct: jax.Array
    """Answer tokens whose target is the most likely token."""
    answers: jax.Array


def chunked_divergence(
    head_DX: jax.Array, teacher_head_DX: jax.Array, h_BTD: jax.Array, teacher_BTD: jax.Array,
    targets_BT: jax.Array, weights_BT: jax.Array, answers_BT: jax.Array, chunk: int,
) -> DistillationSums:  # fmt: skip
    """Cross-entropy and KL divergence, `chunk` tokens of each sequence at a time; the backward pass repeats logits.

    Args:
        head_DX: projects the model's output to logits; the teacher's head may have another D.
        teacher_head_DX: the same of the teacher.
        h_BTD: the model's output.
        teacher_BTD: the teacher's.
        targets_BT: int32 token ids.
        weights_BT: float32 weight of each target, 0 to leave it out.
        answers_BT: bool, the targets of which `correct` and `answers` tell.
        chunk: tokens of a sequence whose logits exist at one time.
    """

    def local_sums(h_BTD, teacher_BTD, targets_BT, weights_BT, answers_BT, head_DX, teacher_head_DX):
        """Sums [1, 1] over the tokens of this device."""

        @jax.checkpoint
        def body(total: DistillationSums, xs) -> tuple[DistillationSums, None]:
            return jax.tree.map(jnp.add, total, _chunk_sums(head_DX, teacher_head_DX, *xs)), None

        zeros = DistillationSums(*(jnp.zeros((), jnp.float32) for _ in DistillationSums._fields))
        arrays = h_BTD, teacher_BTD, targets_BT, weights_BT, answers_BT
        chunks = tuple(split_tokens(x, min(chunk, h_BTD.shape[1])) for x in arrays)
        return jax.tree.map(lambda x: x[None, None], jax.lax.scan(body, zeros, chunks)[0])

    arrays = h_BTD, teacher_BTD, targets_BT, weights_BT, answers_BT
    by_device = mesh.per_device(local_sums, *arrays, mesh.all_gather(head_DX), teacher_head_DX)
    return jax.tree.map(jnp.sum, by_device)


def _chunk_sums(head_DX, teacher_head_DX, h_BtD, teacher_BtD, targets_Bt, weights_Bt, answers_Bt) -> DistillationSums:
    logits_BtX, wanted_BtX = (
        matmul(h, head, jnp.float32) for h, head in ((h_BtD, head_DX), (teacher_BtD, teacher_head_DX))
    )
    log_probs_Bt, _, is_greedy_Bt = target_log_probs(logits_BtX, targets_Bt)
    wanted_BtX = jax.nn.log_softmax(wanted_BtX)
    kl_Bt = jnp.sum(jnp.exp(wanted_BtX) * (wanted_BtX - jax.nn.log_softmax(logits_BtX)), axis=-1)
    return DistillationSums(
        cross_entropy=jnp.sum(-log_probs_Bt * weights_Bt),
        kl=jnp.sum(kl_Bt * weights_Bt),
        weight=jnp.sum(weights_Bt),
        correct=jnp.sum(answers_Bt & is_greedy_Bt, dtype=jnp.float32),
        answers=jnp.sum(answers_Bt, dtype=jnp.float32),
    )
