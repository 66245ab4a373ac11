"""Log-likelihoods of given texts through the latent cache: for perplexity, multiple choice and preference data.

A context is read as `Generator.generate` reads a prompt. Of the tokens after it the model computes hidden states, and
logits of a few of these at a time. All logarithms are natural.
"""

import dataclasses
import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from mla_jax import mesh
from mla_jax.config import ModelConfig
from mla_jax.errors import InputError
from mla_jax.inference.generator import Generator
from mla_jax.inference.prompts import check_continuations
from mla_jax.inference.session import Session
from mla_jax.losses.log_probs import target_log_probs
from mla_jax.model.layers import all_gather_weight, matmul, rms_norm, split_tokens

LOGITS_CHUNK = 1024
"""Tokens of a device whose logits exist at one time."""
BATCH = 16
"""Continuations of one context that are scored at one time."""


@dataclasses.dataclass(frozen=True)
class Score:
    """The likelihood of a continuation given its context."""

    log_probs: np.ndarray
    """float32 [tokens], of each token given all before it."""
    greedy: np.ndarray
    """Bool [tokens], true where no other token is more likely."""

    @property
    def is_greedy(self) -> bool:
        """Greedy decoding writes this continuation (or one just as likely)."""
        return bool(self.greedy.all())

    @property
    def log_likelihood(self) -> float:
        """The sum of `log_probs` in nats."""
        return float(self.log_probs.sum(dtype=np.float64))


def score(
    generator: Generator, contexts: Sequence[Sequence[int]], continuations: Sequence[Sequence[int]],
    *, session: Session | None = None, chunk: int = LOGITS_CHUNK,
) -> list[Score]:  # fmt: skip
    """Scores continuation i after context i, all rows as one batch; rows may differ in length.

    Args:
        generator: the model, and how its memory may be used.
        contexts: token ids, at least one each: nothing predicts the first token of a text. Where a text has no context,
            give the token that starts texts (bos).
        continuations: token ids, at least one each.
        session: what was read before. Of each context, the tokens that its row of the session starts with are not read
            again. Afterwards the session holds contexts and continuations.
        chunk: see LOGITS_CHUNK; bounds the memory of logits.

    Raises:
        InputError: an empty context or continuation, a token outside the vocabulary, more tokens than the model takes
            or than fit in the device's memory; found before anything is allocated.
    """
    contexts, continuations = _checked(generator, contexts, continuations, chunk)
    if not contexts:
        return []
    session = session or Session.empty(len(contexts))
    texts = [context + tokens for context, tokens in zip(contexts, continuations, strict=True)]
    generator.read(
        session, [context[:-1] for context in contexts], capacity=max(map(len, texts)) - 1,
        other_bytes=_logits_bytes(generator.config, chunk, len(texts)),
    )  # fmt: skip
    return _score_rows(generator, session, contexts, continuations, chunk)


def score_continuations(
    generator: Generator, context: Sequence[int], continuations: Sequence[Sequence[int]],
    *, session: Session | None = None, chunk: int = LOGITS_CHUNK, batch: int = BATCH,
) -> list[Score]:  # fmt: skip
    """Scores continuations of one context, which is read once: the answers of a multiple choice, chosen and rejected.

    Args:
        generator: see `score`.
        context: see `score`.
        continuations: see `score`.
        session: of one row, see `score`. One haystack serves many questions: pass the same session with
            haystack + question as the context. Afterwards it holds the context.
        chunk: see `score`.
        batch: continuations scored at one time, in copies of the session; fewer where the copies do not fit.

    Raises:
        InputError: see `score`.
        UsageError: a mesh of several devices is set; `score` takes one.
    """
    contexts, continuations = _checked(generator, [context] * len(continuations), continuations, chunk)
    if batch < 1:
        raise InputError(f"batch must be at least 1, got {batch}")
    if not contexts:
        return []
    session = session or Session.empty(1)
    capacity = len(contexts[0]) + max(map(len, continuations)) - 1
    generator.read(
        session, [contexts[0][:-1]], capacity=capacity, other_bytes=_logits_bytes(generator.config, chunk, 1)
    )
    wanted = min(batch, len(continuations))
    logits_bytes = _logits_bytes(generator.config, chunk, wanted)
    rows = generator.most_copies(session, wanted, logits_bytes) if wanted > 1 else 1
    scores: list[Score] = []
    while len(scores) < len(continuations):
        group = continuations[len(scores) : len(scores) + max(rows, 1)]
        # One at a time needs no copy: what was appended is dropped again.
        copies = generator.fork(session, len(group)) if rows > 1 else session
        scores += _score_rows(generator, copies, contexts[: len(group)], group, chunk)
        session.tokens = [contexts[0][:-1]]
    return scores


def rolling_log_probs(
    generator: Generator, tokens: Sequence[int], *, session: Session | None = None, chunk: int = LOGITS_CHUNK
) -> np.ndarray:
    """Log-probability of each token of a text from the second on, given all before it, in one pass.

    The perplexity of the text is `exp(-mean)`; means over parts give it by position.

    Args:
        generator: see `score`.
        tokens: at least two; the first, which nothing predicts, should be the one that starts texts (bos).
        session: see `score`.
        chunk: see `score`.

    Returns:
        float32 [len(tokens) - 1], nats.

    Raises:
        InputError: fewer than two tokens; else see `score`.
    """
    if len(tokens) < 2:
        raise InputError(f"a text needs at least two tokens, the first of which has no prediction; got {len(tokens)}")
    return score(generator, [tokens[:1]], [tokens[1:]], session=session, chunk=chunk)[0].log_probs


def _checked(generator: Generator, contexts, continuations, chunk: int) -> tuple[list[list[int]], list[list[int]]]:
    if chunk < 1:
        raise InputError(f"chunk must be at least 1, got {chunk}")
    contexts, continuations = [list(x) for x in contexts], [list(x) for x in continuations]
    check_continuations(generator.config, contexts, continuations)
    return contexts, continuations


def _logits_bytes(config: ModelConfig, chunk: int, rows: int) -> int:
    """Upper bound of what scoring takes beside prefill: float32 logits and one more array of their size.

    At least one token of each row at a time.
    """
    return 2 * 4 * max(chunk, rows) * config.vocab_size


def _score_rows(
    generator: Generator, session: Session, contexts: list[list[int]], continuations: list[list[int]], chunk: int
) -> list[Score]:
    """Feeds the last token of each context and the continuation, which the session has room for."""
    config = generator.config
    texts = [context + tokens for context, tokens in zip(contexts, continuations, strict=True)]
    log_probs: list[list[np.ndarray]] = [[] for _ in texts]
    greedy: list[list[np.ndarray]] = [[] for _ in texts]
    head = {name: x for name, x in generator.weights.items() if name != "layers"}
    for part in generator.hidden_states(session, [text[:-1] for text in texts]):
        targets_BT = np.zeros(part.h_BTD.shape[:2], np.int32)
        for row, text in enumerate(texts):
            start, valid = part.start[row] + 1, part.valid[row]
            targets_BT[row, :valid] = text[start : start + valid]
        found_BT, best_BT = jax.device_get(
            hidden_log_probs(config, head, part.h_BTD, mesh.shard_batch(targets_BT), chunk)
        )
        for row in range(len(texts)):
            valid = part.valid[row]
            log_probs[row].append(found_BT[row, :valid])
            greedy[row].append(best_BT[row, :valid])
    return [Score(np.concatenate(found), np.concatenate(best)) for found, best in zip(log_probs, greedy, strict=True)]


@functools.partial(jax.jit, static_argnums=(0, 4))
def hidden_log_probs(config: ModelConfig, weights: dict, h_BTD: jax.Array, targets_BT: jax.Array, chunk: int):
    """float32 log-probability of each target, and whether no token is more likely; [B, T] both."""
    head = weights["embed_tokens"].T if config.tie_word_embeddings else weights["lm_head"]

    def on_device(h_BTD, targets_BT, norm, head_DX):
        def some_tokens(arrays):
            h_BtD, targets_Bt = arrays
            logits_BtX = matmul(rms_norm(h_BtD, norm, config.rms_norm_eps), head_DX, jnp.float32)
            found = target_log_probs(logits_BtX, targets_Bt)
            return found.log_probs_Bt, found.is_greedy_Bt

        rows, tokens = targets_BT.shape
        pieces = (split_tokens(x, min(max(chunk // rows, 1), tokens)) for x in (h_BTD, targets_BT))
        found = jax.lax.map(some_tokens, tuple(pieces))
        return jax.tree.map(lambda x_nBt: jnp.moveaxis(x_nBt, 0, 1).reshape(rows, -1)[:, :tokens], found)

    head_DX = all_gather_weight(head, jnp.dtype(config.dtype))
    return mesh.per_device(on_device, h_BTD, targets_BT, weights["norm"], head_DX)
