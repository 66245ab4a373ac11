"""Preference optimisation: losses of pairs of answers against a reference model (docs/dpo.md has the formulas)."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from mla_jax import mesh
from mla_jax.config import PreferenceLossConfig
from mla_jax.losses.branch_log_probs import TokenStatistics, branch_log_probs
from mla_jax.losses.loss import Arrays, mean
from mla_jax.model.branches import branch_region
from mla_jax.model.transformer import Transformer

FALL = 0.1
"""Nats by which the log-probability of chosen answers is below the reference's before it is called falling."""


@dataclass(frozen=True)
class PreferenceLoss:
    """The `Loss` of preference optimisation: a mean over pairs, each a prompt with a chosen and a rejected answer.

    Batches have `tokens`, `positions`, `targets`, `completion`, `prompts`, `branches` and `reference`; see
    `data.preference`. Metrics have the names and the meaning that TRL (1.16) gives them.
    """

    config: PreferenceLossConfig
    branch_tokens: int
    """Tokens R at the end of each row that hold answers."""
    pairs_per_row: int
    """Most pairs N in a row."""
    packed: bool
    """True if rows hold several prompts."""
    chunk: int
    """Tokens of a row whose logits exist at one time."""
    accuracy_metric: ClassVar[str] = "rewards/accuracies"
    totals: ClassVar[tuple[str, ...]] = ("num_tokens",)

    def statistics(self, transformer: Transformer, rows: Arrays) -> TokenStatistics:
        """Log-probabilities and other statistics of the targets [B, R] of the branch region."""
        return branch_log_probs(transformer, rows, self.branch_tokens, self.packed, self.chunk)

    @property
    def shared(self) -> dict[str, Any]:
        """Nothing."""
        return {}

    def sums(self, transformer: Transformer, rows: Arrays) -> dict[str, jax.Array]:
        """Sums over pairs and tokens; `loss` has gradients."""
        found = self.statistics(transformer, rows)
        arrays = branch_region(
            {name: rows[name] for name in ("completion", "branches", "reference")}, self.branch_tokens
        )
        sums = preference_sums(self.config, self.pairs_per_row, found, **arrays)
        return sums | {"num_tokens": jnp.sum(rows["prompts"] > 0, dtype=jnp.float32)}

    def normalizer(self, batch: Arrays) -> jax.Array:
        """The pairs of all rows."""
        return jnp.maximum(jnp.sum(jnp.max(batch["branches"], axis=-1) // 2, dtype=jnp.float32), 1.0)

    def means(self, sums: Mapping[str, float]) -> dict[str, float]:
        """Means over pairs, `logits/*`, entropy and mean_token_accuracy over tokens of answers; `num_tokens` so far.

        `preference_loss` and `sft_loss` are the two parts of `loss`, the latter without its weight.
        """

        def over(count: str, *names: str) -> dict[str, float]:
            return {name: mean(sums.get(name, 0.0), sums.get(count, 0.0)) for name in names}

        return {
            **over("pairs", *_PAIR_METRICS),
            **over("chosen_tokens", "logits/chosen", "mean_token_accuracy"),
            **over("rejected_tokens", "logits/rejected"),
            "entropy": mean(
                sums.get("entropy", 0.0), sums.get("chosen_tokens", 0.0) + sums.get("rejected_tokens", 0.0)
            ),
            "num_tokens": sums.get("num_tokens", 0.0),
        }

    def progress(self, means: Mapping[str, float]) -> str:
        """Loss, the share of pairs whose chosen answer won, and the margin."""
        accuracy, margin = means["rewards/accuracies"], means["rewards/margins"]
        return f"loss {means['loss']:.3f}  preferred {accuracy:.1%}  margin {margin:.2f}"

    def warning(self, before: Mapping[str, float], now: Mapping[str, float]) -> str | None:
        """Says that chosen answers become less likely, the failure of DPO that arXiv 2402.13228 describes."""
        ratio, earlier = (means["rewards/chosen"] / self.config.beta for means in (now, before))
        if not (ratio < -FALL and ratio < earlier):
            return None
        return (
            f"chosen answers became less likely over a whole window (log-probability {now['logps/chosen']:.2f}, "
            f"{-ratio:.2f} nats below the reference's; {-earlier:.2f} before): the loss can fall while both answers "
            "become unlikely (arXiv 2402.13228); loss=rpo (loss.sft_weight above 0) and loss=dpop prevent that"
        )


_PAIR_METRICS = (
    "loss", "preference_loss", "sft_loss", "rewards/chosen", "rewards/rejected", "rewards/margins",
    "rewards/accuracies", "logps/chosen", "logps/rejected",
)  # fmt: skip


def preference_sums(
    config: PreferenceLossConfig, pairs_per_row: int, found: TokenStatistics,
    completion: jax.Array, branches: jax.Array, reference: jax.Array,
) -> dict[str, jax.Array]:  # fmt: skip
    """Sums over the pairs and the answers' tokens of a branch region.

    Args:
        config: the loss.
        pairs_per_row: N.
        found: of the model that is trained.
        completion: bool [B, R], targets that belong to an answer.
        branches: int32 [B, R], 2p - 1 on the chosen and 2p on the rejected answer of pair p of a row, else 0.
        reference: float32 [B, R], the reference's log-probability of each target of an answer.
    """

    def by_branch(completion, branches, log_probs, reference):
        """Sums [b, 1, 2N] over the tokens of this device."""
        of_branch = (branches[..., None] == jnp.arange(1, 2 * pairs_per_row + 1)) & completion[..., None]
        values = jnp.ones_like(log_probs), log_probs, log_probs - reference
        return tuple(jnp.sum(jnp.where(of_branch, x[..., None], 0.0), axis=1)[:, None] for x in values)

    parts = mesh.per_device(by_branch, completion, branches, found.log_probs_BR, reference)
    tokens, log_probs, log_ratios = (jnp.sum(x, axis=1).reshape(-1, pairs_per_row, 2) for x in parts)  # [B, N, 2]
    pair = jnp.min(tokens, axis=-1) > 0
    preference = pair_losses(config, log_ratios, tokens)
    sft = -log_probs[..., 0] / jnp.maximum(tokens[..., 0], 1.0)
    rewards = config.beta * log_ratios
    by_pair = {
        "loss": preference + config.sft_weight * sft,
        "pairs": jnp.ones_like(sft),
        "preference_loss": preference,
        "sft_loss": sft,
        "rewards/chosen": rewards[..., 0],
        "rewards/rejected": rewards[..., 1],
        "rewards/margins": rewards[..., 0] - rewards[..., 1],
        "rewards/accuracies": jnp.where(rewards[..., 0] > rewards[..., 1], 1.0, 0.0),
        "logps/chosen": log_probs[..., 0],
        "logps/rejected": log_probs[..., 1],
    }
    chosen, rejected = completion & (branches % 2 == 1), completion & (branches % 2 == 0)
    by_token = {
        "chosen_tokens": (chosen, jnp.ones_like(reference)),
        "rejected_tokens": (rejected, jnp.ones_like(reference)),
        "logits/chosen": (chosen, found.mean_logit_BR),
        "logits/rejected": (rejected, found.mean_logit_BR),
        "mean_token_accuracy": (chosen, found.is_greedy_BR.astype(jnp.float32)),
        "entropy": (completion, found.entropy_BR),
    }
    sums = {name: jnp.sum(jnp.where(pair, x, 0.0)) for name, x in by_pair.items()}
    return sums | {name: jnp.sum(jnp.where(mask, x, 0.0)) for name, (mask, x) in by_token.items()}


def pair_losses(config: PreferenceLossConfig, log_ratios: jax.Array, tokens: jax.Array) -> jax.Array:
    """The preference loss [...] of each pair, without the SFT term.

    Sources: DPO arXiv 2305.18290, equation 7; hinge 2309.06657; IPO 2310.12036, equation 17, on means over tokens as
    its authors told TRL's; robust 2403.00409; cDPO https://ericmitchell.ai/cdpo.pdf; length-normalised as in OLMo 3,
    2512.13961; DPOP 2402.13228, in its last version (the penalty is inside beta).

    Args:
        config: the loss.
        log_ratios: [..., 2], log-probability of the chosen and the rejected answer minus the reference's, in nats.
        tokens: [..., 2], how many tokens they have.
    """
    delta = log_ratios[..., 0] - log_ratios[..., 1]
    means = log_ratios / jnp.maximum(tokens, 1.0)
    mean_delta = means[..., 0] - means[..., 1]
    beta, flipped = config.beta, config.label_smoothing
    match config.name:
        case "sigmoid":
            return jax.nn.softplus(-beta * delta)
        case "hinge":
            return jax.nn.relu(1 - beta * delta)
        case "ipo":
            return (mean_delta - 1 / (2 * beta)) ** 2
        case "robust":
            right, wrong = jax.nn.softplus(-beta * delta), jax.nn.softplus(beta * delta)
            return ((1 - flipped) * right - flipped * wrong) / (1 - 2 * flipped)
        case "cdpo":
            return (1 - flipped) * jax.nn.softplus(-beta * delta) + flipped * jax.nn.softplus(beta * delta)
        case "sigmoid_norm":
            return jax.nn.softplus(-beta * mean_delta)
        case "dpop":
            return jax.nn.softplus(-beta * (delta - config.dpop_lambda * jax.nn.relu(-log_ratios[..., 0])))
    raise ValueError(config.name)
