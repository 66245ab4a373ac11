"""config.json of a dense DeepseekV3ForCausalLM, to and from ModelConfig.

Meanings are those of transformers (models/deepseek_v2, models/deepseek_v3, modeling_rope_utils.py).
"""

import math
from typing import Any

from mla_jax.config import ModelConfig, YarnConfig
from mla_jax.errors import InputError, UsageError

NORM_EPS = 1e-6
"""Hugging Face's norms of the latents have this epsilon whatever rms_norm_eps says."""

DTYPES = ("float32", "bfloat16", "float16")

_SIZES = (
    "vocab_size hidden_size num_hidden_layers num_attention_heads qk_nope_head_dim qk_rope_head_dim v_head_dim "
    "kv_lora_rank intermediate_size max_position_embeddings"
).split()
# transformers' default where the key is missing.
_FIRST_MOE_LAYER = {"deepseek_v2": 0, "deepseek_v3": 3}


def to_hf(config: ModelConfig, *, dtype: str, special_ids: dict[str, int | None]) -> dict[str, Any]:
    """The contents of config.json.

    Args:
        config: the model.
        dtype: type of the exported weights.
        special_ids: bos_token_id, eos_token_id, pad_token_id.

    Raises:
        InputError: the model has something that DeepseekV3ForCausalLM has not.
    """
    if config.rms_norm_eps != NORM_EPS:
        raise InputError(
            f"cannot export rms_norm_eps={config.rms_norm_eps}: Hugging Face's DeepseekV3 norms the latents with "
            f"{NORM_EPS} always"
        )
    rope = {"rope_type": "default"} if config.rope_scaling is None else _yarn_to_hf(config.rope_scaling)
    return {
        "architectures": ["DeepseekV3ForCausalLM"],
        "model_type": "deepseek_v3",
        "dtype": dtype,
        **{key: getattr(config, key) for key in _SIZES},
        "q_lora_rank": config.q_lora_rank,
        "num_key_value_heads": config.num_attention_heads,
        "rms_norm_eps": config.rms_norm_eps,
        "initializer_range": config.initializer_range,
        "hidden_act": "silu",
        "attention_bias": False,
        "attention_dropout": 0.0,
        # lm_head.weight is written for tied models too: vLLM gives wrong logits when this says true.
        "tie_word_embeddings": False,
        "rope_interleave": True,
        "rope_parameters": {**rope, "rope_theta": config.rope_theta},
        # The spelling before transformers 5, which would otherwise take its defaults without a word.
        "rope_theta": config.rope_theta,
        "rope_scaling": None if config.rope_scaling is None else rope,
        # No layer has experts; readers still want the numbers.
        "first_k_dense_replace": config.num_hidden_layers,
        "moe_layer_freq": 1,
        "moe_intermediate_size": config.intermediate_size,
        "n_routed_experts": 1,
        "n_shared_experts": 1,
        "num_experts_per_tok": 1,
        "n_group": 1,
        "topk_group": 1,
        "topk_method": "noaux_tc",
        "scoring_func": "sigmoid",
        "norm_topk_prob": True,
        "routed_scaling_factor": 1.0,
        "num_nextn_predict_layers": 0,
        "use_cache": True,
        **special_ids,
    }


def from_hf(hf: dict[str, Any], *, tied: bool, dtype: str) -> ModelConfig:
    """The model that config.json of a dense DeepSeek-V2 or -V3 checkpoint describes.

    Args:
        hf: the contents of config.json.
        tied: whether the checkpoint's head is its embedding table.
        dtype: the type to compute in.

    Raises:
        InputError: another architecture, or something that the model here has not; names the key.
    """
    model_type = hf.get("model_type")
    if model_type not in _FIRST_MOE_LAYER:
        raise InputError(
            f"model_type is {model_type!r}; only {' and '.join(_FIRST_MOE_LAYER)} can be imported "
            "as they are, and llama, mistral and qwen2 converted"
        )
    sizes: dict[str, Any] = {key: _size(hf, key) for key in _SIZES}
    _refuse_experts(hf, _FIRST_MOE_LAYER[model_type], sizes["num_hidden_layers"])
    heads = sizes["num_attention_heads"]
    for key, only in {
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "rms_norm_eps": NORM_EPS,
        "num_key_value_heads": heads,
        "quantization_config": None,
        "partial_rotary_factor": 1.0,
    }.items():
        value = hf.get(key)
        if value is not None and value != only:
            raise InputError(f"{key} is {value!r}; only {only!r} can be imported")
    rope = hf.get("rope_scaling") or hf.get("rope_parameters") or {}
    if not isinstance(rope, dict):
        raise InputError(f"rope_parameters is {rope!r}; expected an object")
    try:
        return ModelConfig(
            **sizes,
            q_lora_rank=None if hf.get("q_lora_rank") is None else _size(hf, "q_lora_rank"),
            rope_theta=_number(rope, "rope_theta", _number(hf, "rope_theta", 10_000.0)),
            rope_scaling=_yarn_from_hf(rope, hf, sizes["max_position_embeddings"]),
            tie_word_embeddings=tied,
            initializer_range=_number(hf, "initializer_range", 0.02),
            dtype=dtype,
        )
    except UsageError as e:  # the file is at fault here, not the command line
        raise InputError(str(e)) from e


def _size(hf: dict, key: str) -> int:
    value = hf.get(key)
    if type(value) is not int:
        raise InputError(f"{key} is {'missing' if value is None else repr(value)}; expected an integer")
    return value


def _number(values: dict, key: str, default: float) -> float:
    value = default if values.get(key) is None else values[key]
    if type(value) not in (int, float) or not math.isfinite(value):
        raise InputError(f"{key} is {value!r}; expected a number")
    return float(value)


def _refuse_experts(hf: dict, default_first: int, layers: int) -> None:
    first = default_first if hf.get("first_k_dense_replace") is None else _size(hf, "first_k_dense_replace")
    # The original DeepSeek code reads null experts as a dense model; a missing key means transformers' default.
    if first < layers and hf.get("n_routed_experts", 1):
        raise InputError(
            f"layers {first} to {layers - 1} have experts (first_k_dense_replace={first}, "
            f"n_routed_experts={hf.get('n_routed_experts')}); only dense checkpoints can be imported"
        )


def _yarn_to_hf(yarn: YarnConfig) -> dict[str, Any]:
    """YaRN in a spelling that every reader takes alike: both mscale keys or none.

    Where mscale_all_dim alone is set, transformers scales cos and sin by m(1), while DeepSeek's own code and vLLM scale
    them by m(1) / m(mscale_all_dim), with m(x) = 0.1 x ln(factor) + 1. The model here does as transformers, and so the
    mscale is written that solves m(mscale) = m(1) m(mscale_all_dim). mscale alone means nothing to transformers.
    """
    hf: dict[str, Any] = {
        "rope_type": "yarn",
        "factor": yarn.factor,
        "original_max_position_embeddings": yarn.original_max_position_embeddings,
        "beta_fast": yarn.beta_fast,
        "beta_slow": yarn.beta_slow,
    }
    if yarn.mscale_all_dim:
        implied = 1 + yarn.mscale_all_dim * (1 + 0.1 * math.log(yarn.factor))
        hf |= {"mscale": yarn.mscale or implied, "mscale_all_dim": yarn.mscale_all_dim}
    return hf


def _yarn_from_hf(rope: dict, hf: dict, max_position: int) -> YarnConfig | None:
    rope_type = rope.get("rope_type") or rope.get("type") or "default"
    if rope_type == "default":
        return None
    if rope_type != "yarn":
        raise InputError(f"rope_type is {rope_type!r}; only default and yarn can be imported")
    for key, only in {"attention_factor": None, "truncate": True, "partial_rotary_factor": 1.0}.items():
        if rope.get(key) is not None and rope[key] != only:
            raise InputError(f"YaRN with {key}={rope[key]!r} cannot be imported")
    original_key = "original_max_position_embeddings"  # beside rope_parameters it takes precedence
    original = int(_number(hf if hf.get(original_key) else rope, original_key, max_position))
    return YarnConfig(
        factor=_number(rope, "factor", max_position / max(original, 1)),
        original_max_position_embeddings=original,
        beta_fast=_number(rope, "beta_fast", 32.0) or 32.0,
        beta_slow=_number(rope, "beta_slow", 1.0) or 1.0,
        **{key: _number(rope, key, 0) for key in ("mscale", "mscale_all_dim") if rope.get(key) is not None},
    )
