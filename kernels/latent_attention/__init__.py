"""Attention ops for Multi-Head Latent Attention (MLA), usable without the rest of the project.

`attention` is the expanded form (training, prefill), `decode` the absorbed form over a latent cache, `merge` combines
partial results. Letters in names: B batch, T queries, S keys, H heads, K query/key width, V value width, C latent
width, R rotary width, W = C + R.
"""

from latent_attention.dispatch import IMPLEMENTATIONS, UnavailableError, attention, decode, merge, resolve

__all__ = ["IMPLEMENTATIONS", "UnavailableError", "attention", "decode", "merge", "resolve"]
