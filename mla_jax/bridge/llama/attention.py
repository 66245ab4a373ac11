"""Conversion of one layer's grouped-query attention to MLA weights, and the errors that it makes."""

from typing import NamedTuple

import numpy as np

from mla_jax.bridge.llama.config import LlamaConfig, Method
from mla_jax.bridge.llama.layer import LlamaLayer
from mla_jax.bridge.llama.low_rank import low_rank_factors, rms_normalize, second_moment
from mla_jax.bridge.llama.rope import decouple
from mla_jax.config import ModelConfig
from mla_jax.model.rope import inv_freq, softmax_scale


class Converted(NamedTuple):
    """The latent attention of one layer."""

    weights: dict[str, np.ndarray]
    """Weights of `self_attn` by name, [in, out], float32."""
    errors: dict[str, float]
    """By the names of `docs/importing.md`."""


def convert_attention(
    source: LlamaConfig,
    target: ModelConfig,
    layer: LlamaLayer,
    length: int,
    x_ND: np.ndarray,
    held_out_ND: np.ndarray,
    method: Method,
) -> Converted:
    """Converts the attention of one layer.

    Args:
        source: the checkpoint's attention.
        target: the model that it is converted to.
        layer: the layer's weights.
        length: distances in tokens up to which decoupled RoPE is fitted.
        x_ND: normalised inputs of the layer over calibration texts, float32.
        held_out_ND: the same over held-out texts, for the errors.
        method: what is left out.
    """
    q_HND, k_GND, v_GND, o_DHN = (np.asarray(w, np.float64) for w in layer[:4])
    d, groups = target.hidden_size, source.kv_heads
    moment_DD = second_moment(x_ND)
    decoupled = decouple(
        q_HND, k_GND, moment_DD, source.inv_freq, inv_freq(target), length, fit=method.fitted_positions
    )

    key_cost, value_cost = _costs(q_HND, v_GND, o_DHN, moment_DD, source.softmax_scale)
    k_nope_GND = decoupled.k_nope_GND
    cost_DD = np.zeros((d, d))
    for w, cost in zip((*k_nope_GND, *v_GND), (*key_cost, *value_cost), strict=True):
        cost_DD += w.T @ cost @ w
    kv_YD = np.concatenate([k_nope_GND, v_GND], axis=1).reshape(-1, d)  # of each key head: key, then value
    kv = low_rank_factors(kv_YD, cost_DD, x_ND, moment_DD, target.kv_lora_rank, constant=method.constant_latent)
    kv_up_RGX = kv.up_YR.T.reshape(target.kv_lora_rank, groups, -1)
    weights = {
        "kv_a_proj_with_mqa": np.concatenate([kv.down_RD, decoupled.k_rope_RD]).T,
        "kv_a_layernorm": np.ones(target.kv_lora_rank),
        "kv_b_proj": np.repeat(kv_up_RGX, source.heads // groups, axis=1).reshape(target.kv_lora_rank, -1),
        "o_proj": o_DHN.reshape(d, -1).T,
    }
    queries = np.concatenate([q_HND, decoupled.q_rope_HRD], axis=1).reshape(-1, d)
    queries *= source.softmax_scale / softmax_scale(target)
    errors = {}
    if target.q_lora_rank is None:
        weights["q_proj"] = queries.T
    else:
        q = low_rank_factors(
            queries, queries.T @ queries, x_ND, moment_DD, target.q_lora_rank, constant=method.constant_latent
        )
        weights |= {
            "q_a_proj": q.down_RD.T, "q_a_layernorm": np.ones(target.q_lora_rank), "q_b_proj": q.up_YR.T
        }  # fmt: skip
        errors["query_error"] = _error(queries, q.down_RD, q.up_YR, held_out_ND)
    width = source.head_dim
    key_rows = np.arange(len(kv_YD)).reshape(groups, 2 * width)[:, :width].ravel()
    value_rows = np.setdiff1d(np.arange(len(kv_YD)), key_rows)
    for name, rows in (("key_error", key_rows), ("value_error", value_rows)):
        errors[name] = _error(kv_YD[rows], kv.down_RD, kv.up_YR[rows], held_out_ND)
    errors |= {"rotary_share": decoupled.share, "latent_rms_variation": kv.rms_variation}
    return Converted({name: w.astype(np.float32) for name, w in weights.items()}, errors)


def _costs(q_HND, v_GND, o_DHN, moment_DD, scale: float) -> tuple[np.ndarray, np.ndarray]:
    """Costs [G, N, N] of a squared error of keys and of values at the output of attention, to first order.

    An error e of a value becomes an error O e of the head's contribution to the residual stream. An error e of a key
    shifts a score by q e, and so moves probability to or from a token that contributes O v.
    """
    heads, n, _ = q_HND.shape
    groups = len(v_GND)
    o_HDN = np.moveaxis(o_DHN, 1, 0)
    outputs_HNN = np.swapaxes(o_HDN, 1, 2) @ o_HDN
    queries_HNN = q_HND @ moment_DD @ np.swapaxes(q_HND, 1, 2) * scale**2
    values_GNN = v_GND @ moment_DD @ np.swapaxes(v_GND, 1, 2)
    added_H = np.einsum("hnm,hmn->h", outputs_HNN, np.repeat(values_GNN, heads // groups, axis=0))
    by_group = (groups, heads // groups, n, n)
    key_cost = (queries_HNN * added_H[:, None, None]).reshape(by_group).sum(1)
    return key_cost, outputs_HNN.reshape(by_group).sum(1)


def _error(w_YD: np.ndarray, down_RD: np.ndarray, up_YR: np.ndarray, x_ND: np.ndarray) -> float:
    """Energy of the error of low-rank factors with their norm, as a share of the outputs' energy."""
    wanted_NY = x_ND @ w_YD.T
    got_NY = rms_normalize(x_ND @ down_RD.T) @ up_YR.T
    return float(np.square(wanted_NY - got_NY).sum() / np.square(wanted_NY).sum())
