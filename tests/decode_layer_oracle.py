"""The decoder layer in float64, from its equations."""

from typing import NamedTuple

import numpy as np

from latent_attention.call_shapes import LayerShape


class ExactLayer(NamedTuple):
    """One layer for one token; `weights` as of `decode_layer_weights.random_weights`."""

    shape: LayerShape
    weights: dict
    eps: float
    scale: float

    def _matrix(self, part: str, name: str) -> np.ndarray:
        weight = self.weights[part][name]
        rows, scales = np.asarray(weight.rows, np.float64), weight.scale_out
        return rows if scales is None else rows * np.asarray(scales, np.float64)[:, None]

    def _norm(self, x: np.ndarray, gamma) -> np.ndarray:
        return x / np.sqrt(np.mean(x * x) + self.eps) * np.asarray(gamma, np.float64)

    def new_token(self, h: np.ndarray, cos: np.ndarray, sin: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The latent [C] and the rotary key [R] of the token (equations 9, 15)."""
        attn, x = self.weights["self_attn"], self._norm(h, self.weights["input_layernorm"])
        kv = self._matrix("self_attn", "kv_a_proj_with_mqa") @ x
        return self._norm(kv[: self.shape.C], attn["kv_a_layernorm"]), _rotate(kv[self.shape.C :], cos, sin)

    def output(self, h: np.ndarray, cos: np.ndarray, sin: np.ndarray, c: np.ndarray, k_rope: np.ndarray) -> np.ndarray:
        """The hidden state [D] after the layer, over the latents [T, C] and rotary keys [T, R] of all tokens."""
        _, _, _, R, N, V, H, _ = self.shape
        attn, x = self.weights["self_attn"], self._norm(h, self.weights["input_layernorm"])
        c_q = self._norm(self._matrix("self_attn", "q_a_proj") @ x, attn["q_a_layernorm"])
        q = (self._matrix("self_attn", "q_b_proj") @ c_q).reshape(H, N + R)
        kv_b = self._matrix("self_attn", "kv_b_proj").reshape(H, N + V, -1)
        scores = np.einsum("hn,hnc->hc", q[:, :N], kv_b[:, :N]) @ c.T + _rotate(q[:, N:], cos, sin) @ k_rope.T
        p = np.exp(self.scale * (scores - scores.max(1, keepdims=True)))
        values = np.einsum("hc,hvc->hv", p / p.sum(1, keepdims=True) @ c, kv_b[:, N:])
        h = h + self._matrix("self_attn", "o_proj") @ values.reshape(-1)
        x = self._norm(h, self.weights["post_attention_layernorm"])
        gate = self._matrix("mlp", "gate_proj") @ x
        return h + self._matrix("mlp", "down_proj") @ (
            gate / (1 + np.exp(-gate)) * (self._matrix("mlp", "up_proj") @ x)
        )


def _rotate(x: np.ndarray, cos: np.ndarray, sin: np.ndarray) -> np.ndarray:
    even, odd = x[..., ::2], x[..., 1::2]
    return np.stack([even * cos - odd * sin, odd * cos + even * sin], -1).reshape(x.shape)
