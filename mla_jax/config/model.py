"""The model: its shape, and how it is computed."""

from typing import Optional

from omegaconf import MISSING

from mla_jax.config.schema import require, require_at_least, require_choice, schema


@schema
class YarnConfig:
    """YaRN (arXiv 2309.00071) as DeepSeek-V3 configures it; keys are those of Hugging Face's `rope_scaling`."""

    factor: float = MISSING
    original_max_position_embeddings: int = MISSING
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    mscale: Optional[float] = None
    mscale_all_dim: Optional[float] = None

    def __post_init__(self):
        require(self.factor >= 1.0, f"model.rope_scaling.factor must be at least 1, got {self.factor}")
        require_at_least(
            1, **{"model.rope_scaling.original_max_position_embeddings": self.original_max_position_embeddings}
        )


REMAT_NAMES = ("layer_input", "latents", "queries", "latent_attention", "attention_residual", "gate", "up")
"""Activations of a layer that rematerialization can keep, by `checkpoint_name`: see `ModelConfig.saved`."""
NUMERICALLY_NEUTRAL_KEYS = ("remat", "saved", "offloaded", "mlp_chunk", "unroll", "attention", "decode")
"""Keys of ModelConfig that change neither weights nor, but for rounding, results: a resumed run may change them."""

WEIGHT_KEYS = (
    "vocab_size",
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "qk_nope_head_dim",
    "qk_rope_head_dim",
    "v_head_dim",
    "kv_lora_rank",
    "q_lora_rank",
    "intermediate_size",
    "tie_word_embeddings",
)
"""Keys of ModelConfig that say which weights there are, and of which shape; `init_from` may change the others."""


@schema
class ModelConfig:
    """A dense DeepSeek-V3 decoder. The first block of keys carries Hugging Face's DeepseekV3Config names."""

    vocab_size: int = MISSING
    hidden_size: int = MISSING
    num_hidden_layers: int = MISSING
    num_attention_heads: int = MISSING
    qk_nope_head_dim: int = MISSING
    qk_rope_head_dim: int = MISSING
    v_head_dim: int = MISSING
    kv_lora_rank: int = MISSING
    q_lora_rank: Optional[int] = None
    intermediate_size: int = MISSING
    rms_norm_eps: float = 1e-6
    rope_theta: float = 10_000.0
    rope_scaling: Optional[YarnConfig] = None
    max_position_embeddings: int = MISSING
    tie_word_embeddings: bool = True
    initializer_range: float = 0.02
    """Standard deviation of the initial matrices."""

    embedding_initializer_range: Optional[float] = None
    """Standard deviation of the initial embedding; `initializer_range` if None."""
    dtype: str = "bfloat16"
    """Compute type of activations; parameters are kept in `param_dtype`, softmax, norms and loss in float32."""
    param_dtype: str = "float32"
    """Type of the parameters; only float32 can be trained."""
    remat: str = "full"
    """Rematerialization: the backward pass recomputes in each layer nothing (`none`), all but matrix products (`dots`),
    all but what `saved` and `offloaded` name (`names`) or everything (`full`)."""
    saved: tuple[str, ...] = ()
    """Under `remat=names`: activations of REMAT_NAMES kept in device memory; see `docs/training.md` for their sizes."""
    offloaded: tuple[str, ...] = ()
    """Under `remat=names`: activations kept in host memory."""
    mlp_chunk: Optional[int] = None
    """Tokens of a sequence whose feed-forward activations exist at one time; None for all."""
    unroll: int = 1
    """Layers in each iteration of training's scan over layers: more of them need fewer copies of what is kept and more
    time to compile. -1 unrolls all."""
    attention: str = "auto"
    """Implementation of attention in training and prefill; see `latent_attention.dispatch`."""
    decode: str = "auto"
    """Implementation of attention over the latent cache."""

    def __post_init__(self):
        for name in (
            "vocab_size hidden_size num_hidden_layers num_attention_heads qk_nope_head_dim qk_rope_head_dim v_head_dim "
            "kv_lora_rank q_lora_rank intermediate_size max_position_embeddings"
        ).split():
            require_at_least(1, **{f"model.{name}": getattr(self, name)})
        require(
            self.qk_rope_head_dim % 2 == 0,
            f"model.qk_rope_head_dim must be even (RoPE rotates pairs), got {self.qk_rope_head_dim}",
        )
        require(self.rope_theta > 1, f"model.rope_theta must be above 1, got {self.rope_theta}")
        require_choice("model.dtype", self.dtype, ("float32", "bfloat16", "float16"))
        require_choice("model.param_dtype", self.param_dtype, ("float32", "bfloat16"))
        require_choice("model.remat", self.remat, ("none", "dots", "names", "full"))
        self.saved, self.offloaded = tuple(self.saved), tuple(self.offloaded)  # OmegaConf gives lists
        for key in ("saved", "offloaded"):
            for name in getattr(self, key):
                require_choice(f"model.{key}", name, REMAT_NAMES)
        both = sorted(set(self.saved) & set(self.offloaded))
        require(not both, f"model.saved and model.offloaded both have {', '.join(both)}; choose one")
        named = bool(self.saved or self.offloaded)
        require(self.remat == "names" or not named, "model.saved and model.offloaded need model.remat=names")
        require_at_least(1, **{"model.mlp_chunk": self.mlp_chunk})
        kept = sorted({"gate", "up"} & {*self.saved, *self.offloaded})
        require(
            not (kept and self.mlp_chunk), f"model.mlp_chunk keeps no {' and '.join(kept)}; leave one or the other out"
        )
        require(self.unroll == -1 or self.unroll >= 1, f"model.unroll must be -1 or at least 1, got {self.unroll}")

    @property
    def qk_head_dim(self) -> int:
        """Width of one head's query and key: the part without position and the rotary part."""
        return self.qk_nope_head_dim + self.qk_rope_head_dim

    @property
    def cache_width(self) -> int:
        """Elements of the latent cache per token and layer: the latent and the shared rotary key."""
        return self.kv_lora_rank + self.qk_rope_head_dim

    def cache_bytes_per_token(self, bytes_per_element: int = 2) -> int:
        """Bytes of latent cache per token over all layers."""
        return self.cache_width * self.num_hidden_layers * bytes_per_element
