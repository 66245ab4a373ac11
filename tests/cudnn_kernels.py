"""cuDNN's attention where there is no GPU: its kernels in a lowered program, and what stands in for them."""

import collections
import re
from typing import Any

import jax.numpy as jnp

from latent_attention import reference


def cudnn_kernels(text: str) -> collections.Counter[str]:
    """Counts cuDNN's attention kernels in a program that was lowered for a GPU, by name and mask."""
    found = re.findall(r"@__cudnn\$fmha(\w+)\(.*?mask_type[^A-Z]*([A-Z_]+)", text)
    assert len(found) == text.count("@__cudnn$fmha")
    return collections.Counter(f"{name} {mask}" for name, mask in found)


def stand_in(name, mask, scale, q, k, v, lengths, *residuals):
    """Emulates cuDNN for `cudnn._bind`, with NaN where its results are undefined."""
    assert q.shape[-1] == k.shape[-1] == v.shape[-1]
    keys = k.shape[1]
    valid = jnp.arange(keys) < (jnp.full(q.shape[0], keys) if lengths is None else lengths)[:, None]
    assert (lengths is not None) == ("PADDING" in mask)

    options: dict[str, Any] = {"scale": scale, "q_offset": 0 if "CAUSAL" in mask else keys, "kv_lengths": lengths}
    options |= {"q_segments": None, "kv_segments": None}
    # It multiplies what lies beyond the lengths by zero.
    reached = jnp.where(jnp.isfinite(k).all() & jnp.isfinite(v).all(), 0, jnp.nan)
    nothing = jnp.where(valid.any(-1), 0, jnp.nan)[:, None, None] + reached
    if name == "fwd":
        out, lse = reference.attention(q, k, v, **options)
        return out + nothing[..., None], (lse + nothing).swapaxes(1, 2)
    lse, out, d_out = residuals
    assert lse.shape == (q.shape[0], q.shape[2], q.shape[1])
    d_q, d_k, d_v = reference.attention_gradients(q, k, v, out, lse.swapaxes(1, 2), d_out, **options)
    return d_q, *(jnp.where(valid[..., None, None], x, jnp.nan) for x in (d_k, d_v))
