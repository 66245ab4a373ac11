"""config.json of a Llama-style checkpoint (Llama, Mistral, Qwen), and the config of the MLA model made of it."""

import dataclasses
import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from mla_jax.bridge.hf.config import NORM_EPS, from_hf
from mla_jax.config import ModelConfig
from mla_jax.errors import InputError, UsageError
from mla_jax.model import rope

LLAMA_STYLE = ("llama", "mistral", "qwen2", "qwen3")
"""Values of model_type that are converted."""
_NO_BIASES = {"attention_bias": False, "mlp_bias": False}
"""`LlamaCheckpoint` has refused biases that are not 0."""
_ORIGINAL = "original_max_position_embeddings"
WIDEST_ROPE = 64
"""The default of the RoPE key's width: DeepSeek's own, which vLLM's and FlashAttention's kernels support."""


@dataclass(frozen=True)
class Ranks:
    """Widths and positions of the latent attention to make."""

    kv_lora_rank: int
    qk_rope_head_dim: int | None = None
    """None for the source's head width, WIDEST_ROPE at most."""
    q_lora_rank: int | None = None
    rope_theta: float | None = None
    """Base of the RoPE frequencies; the source's own keeps its RoPE with its scaling, others are plain RoPE.

    None for the source's own or its square root, whichever `convert` finds to be better.
    """


@dataclass(frozen=True)
class Method:
    """Parts of a conversion, each of which can be left out to see what it brings."""

    constant_latent: bool = True
    """See `low_rank`."""
    fitted_positions: bool = True
    """See `rope`; without, slots stay as they begin."""
    refit: bool = True
    """See `refit`; without, layers are converted for the source's own hidden states."""


WHOLE_METHOD = Method()


@dataclass(frozen=True)
class LlamaConfig:
    """The attention of a pre-norm decoder with grouped-query attention, RoPE and SwiGLU."""

    model_type: str
    heads: int
    kv_heads: int
    head_dim: int
    rms_norm_eps: float
    inv_freq: np.ndarray
    """Frequencies of the head_dim / 2 RoPE pairs, radians per token."""
    rope_theta: float
    """Base of the frequencies, before scaling."""
    softmax_scale: float
    """Factor of the attention scores: head_dim^-1/2, times the square of YaRN's attention_factor."""

    @property
    def cache_width(self) -> int:
        """Elements that its KV cache has per token and layer."""
        return 2 * self.kv_heads * self.head_dim


def read_config(hf: dict[str, Any]) -> LlamaConfig:
    """The attention that config.json describes.

    Raises:
        InputError: something that latent attention, or the model here, cannot represent; names the key and the reason.
    """
    heads = _integer(hf, "num_attention_heads")
    head_dim = _integer(hf, "head_dim") if hf.get("head_dim") else _integer(hf, "hidden_size") // heads
    kv_heads = heads if hf.get("num_key_value_heads") is None else _integer(hf, "num_key_value_heads")
    if kv_heads < 1 or heads % kv_heads:
        raise InputError(f"num_key_value_heads={kv_heads} does not divide num_attention_heads={heads}")
    if head_dim % 2:
        raise InputError(f"head_dim is {head_dim}; rotary positions need an even width")
    # Qwen2 writes a window and use_sliding_window=false beside it.
    windowed = hf.get("use_sliding_window", True) and hf.get("sliding_window") is not None
    if windowed and _integer(hf, "sliding_window") < _integer(hf, "max_position_embeddings"):
        raise InputError(f"sliding_window is {hf['sliding_window']}; the model here attends to everything")
    inv_freq, attention_factor = _source_rope(hf, head_dim)
    return LlamaConfig(
        model_type=hf["model_type"],
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        rms_norm_eps=float(hf.get("rms_norm_eps") or NORM_EPS),
        inv_freq=inv_freq,
        rope_theta=_rope(hf)["rope_theta"],
        softmax_scale=head_dim**-0.5 * attention_factor**2,
    )


def target_config(hf: dict[str, Any], source: LlamaConfig, ranks: Ranks, *, tied: bool, dtype: str) -> ModelConfig:
    """The model that the checkpoint is converted to. Head widths stay; each head also attends to the RoPE key.

    Raises:
        UsageError: ranks that this checkpoint cannot have.
        InputError: something in config.json that the model here has not.
    """
    possible = [n for n in range(2, source.head_dim + 1, 2) if source.head_dim % n == 0]
    if ranks.qk_rope_head_dim is None:
        ranks = dataclasses.replace(ranks, qk_rope_head_dim=max(n for n in possible if n <= WIDEST_ROPE))
    if ranks.qk_rope_head_dim not in possible:
        raise UsageError(
            f"--rope-dim {ranks.qk_rope_head_dim} cannot hold every s-th frequency of heads {source.head_dim} wide; "
            f"possible are {', '.join(map(str, possible))}"
        )
    if ranks.rope_theta is not None and not ranks.rope_theta > 1:
        raise UsageError(f"--rope-theta {ranks.rope_theta} must be above 1")
    for flag, rank in (("--kv-lora-rank", ranks.kv_lora_rank), ("--q-lora-rank", ranks.q_lora_rank)):
        if rank is not None and not 1 <= rank <= _integer(hf, "hidden_size"):
            raise UsageError(f"{flag} {rank} must be from 1 to hidden_size={hf['hidden_size']}")
    return from_hf(
        {
            **hf,
            "model_type": "deepseek_v3",
            "first_k_dense_replace": hf.get("num_hidden_layers"),
            "num_key_value_heads": source.heads,
            "rms_norm_eps": NORM_EPS,
            "qk_nope_head_dim": source.head_dim,
            "v_head_dim": source.head_dim,
            "kv_lora_rank": ranks.kv_lora_rank,
            "qk_rope_head_dim": ranks.qk_rope_head_dim,
            "q_lora_rank": ranks.q_lora_rank,
            **_NO_BIASES,
            "rope_scaling": None,
            "rope_parameters": _target_rope(hf, source, ranks),
        },
        tied=tied,
        dtype=dtype,
    )


def frequency_error(source: LlamaConfig, target: ModelConfig) -> float:
    """Largest relative difference between a kept frequency and the target's; 0 unless a scaled RoPE is kept."""
    if target.rope_theta != source.rope_theta:
        return 0.0
    kept = source.inv_freq[:: source.head_dim // target.qk_rope_head_dim]
    return float(np.abs(rope.inv_freq(target) / kept - 1).max())


def _integer(hf: dict, key: str) -> int:
    value = hf.get(key)
    if type(value) is not int or value < 1:
        raise InputError(f"{key} is {value!r}; expected a positive integer")
    return value


def _rope(hf: dict) -> dict[str, Any]:
    """The rope settings in one spelling: rope_type and rope_theta in one dict."""
    settings = hf.get("rope_scaling") or hf.get("rope_parameters") or {}
    if not isinstance(settings, dict):
        raise InputError(f"rope_parameters is {settings!r}; expected an object")
    theta = settings.get("rope_theta") or hf.get("rope_theta") or 10_000.0
    rope_type = settings.get("rope_type") or settings.get("type") or "default"
    if rope_type not in ("default", "llama3", "yarn"):
        raise InputError(f"rope_type is {rope_type!r}; only default, llama3 and yarn can be converted")
    for key in ("mscale", "mscale_all_dim", "attention_factor", "partial_rotary_factor"):
        if settings.get(key) is not None and (key, settings[key]) != ("partial_rotary_factor", 1):
            raise InputError(f"rope_type {rope_type} with {key}={settings[key]!r} cannot be converted")
    return {**settings, "rope_type": rope_type, "rope_theta": float(theta)}


def _target_rope(hf: dict, source: LlamaConfig, ranks: Ranks) -> dict[str, Any]:
    """The target's rope_parameters: for Llama 3's scaling the YaRN whose frequencies are nearest to those kept.

    With both mscale keys attention_factor is 1; the queries are divided by the temperature that the keys give.
    """
    settings = _rope(hf)
    if ranks.rope_theta not in (None, source.rope_theta):
        return {"rope_type": "default", "rope_theta": ranks.rope_theta}
    if settings["rope_type"] == "llama3":
        assert ranks.qk_rope_head_dim is not None
        kept = source.inv_freq[:: source.head_dim // ranks.qk_rope_head_dim]
        settings = {
            "rope_type": "yarn",
            **_nearest_yarn(kept, settings["rope_theta"], settings["factor"], settings[_ORIGINAL]),
            **{key: settings[key] for key in ("rope_theta", "factor", "original_max_position_embeddings")},
        }
    if settings["rope_type"] == "yarn":
        settings |= {"mscale": 1.0, "mscale_all_dim": 1.0}
    return settings


def _nearest_yarn(kept: np.ndarray, theta: float, factor: float, original: float) -> dict[str, float]:
    """beta_fast and beta_slow of the ramp, from one pair to another, with the least squared error of logarithms."""
    pairs = np.arange(len(kept))
    whole = theta ** (-pairs / len(kept))

    def error(ramp: tuple[int, int]) -> float:
        share = np.clip((pairs - ramp[0]) / (ramp[1] - ramp[0]), 0, 1)
        return np.square(np.log(whole * (1 - share + share / factor) / kept)).sum()

    low, high = min(((low, high) for high in pairs[1:].tolist() for low in range(high)), key=error)

    def rotations(pair: float) -> float:
        """Full rotations over the original context."""
        return original * theta ** (-pair / len(kept)) / (2 * math.pi)

    # YaRN rounds the first pair down and the last one up.
    return {"beta_fast": rotations(low + 0.5), "beta_slow": rotations(high - 0.5)}


def _source_rope(hf: dict, head_dim: int) -> tuple[np.ndarray, float]:
    """inv_freq and attention_factor of the source, as in transformers' modeling_rope_utils."""
    settings = _rope(hf)
    if settings["rope_type"] == "llama3":
        for key in ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"):
            if type(settings.get(key)) not in (int, float):
                raise InputError(f"rope_type llama3 needs {key}, a number; it is {settings.get(key)!r}")
        inv_freq = settings["rope_theta"] ** (-np.arange(0, head_dim, 2, dtype=np.float64) / head_dim)
        rotations = settings["original_max_position_embeddings"] * inv_freq / (2 * math.pi)
        low, high = settings["low_freq_factor"], settings["high_freq_factor"]
        kept = np.clip((rotations - low) / (high - low), 0, 1)
        return inv_freq * (kept + (1 - kept) / settings["factor"]), 1.0
    if settings["rope_type"] == "default":
        return settings["rope_theta"] ** (-np.arange(0, head_dim, 2, dtype=np.float64) / head_dim), 1.0
    # Read as a DeepSeek config whose RoPE part is the whole head: YaRN means the same there.
    as_deepseek = {
        **hf, "model_type": "deepseek_v3", "first_k_dense_replace": hf.get("num_hidden_layers"),
        "num_key_value_heads": None, "rms_norm_eps": NORM_EPS, "qk_nope_head_dim": 1, "v_head_dim": 1,
        "kv_lora_rank": 1, "q_lora_rank": None, "qk_rope_head_dim": head_dim,
        "rope_scaling": None, "rope_parameters": settings, **_NO_BIASES,
    }  # fmt: skip
    config = from_hf(as_deepseek, tied=False, dtype="float32")
    return rope.inv_freq(config), rope.attention_factor(config.rope_scaling)
