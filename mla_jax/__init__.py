"""InfiniteContext-1B: DeepSeek-V3's Multi-Head Latent Attention in JAX, from data to served weights."""

__version__ = "0.1.0"
