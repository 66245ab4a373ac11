"""Decoupled rotary positions: which part of the keys keeps turning, once for all heads, and which no longer does.

In MLA one rotary key of width R serves all heads. Here it holds, for each frequency, one complex number in place of
those of all key heads: mixing pairs of different heads that turn at the same rate commutes with turning, so the pairs
are rotated onto their principal component, which keeps its position, and the rest becomes part of the keys without
position (RoRoPE of TransMLA, arXiv 2502.07864). Where R is less than the head width, every s-th frequency is kept, as
"uniform" in MHA2MLA (arXiv 2502.14837), and the s frequencies from it on share its component (FreqFold of TransMLA).
Heads are weighted by how strongly their queries look at each pair: what counts is the error of the scores.
"""

from typing import NamedTuple

import numpy as np


class Decoupled(NamedTuple):
    """Projections of the normalised input, [out, in]; with all positions 0 their scores add up to the source's."""

    q_rope_HRD: np.ndarray
    k_rope_RD: np.ndarray
    k_nope_GND: np.ndarray
    """Of each key head: its key less what the rotary key stands for. The queries for it are the source's."""
    share: float
    """Of the keys' energy, weighted by the queries, the part that still turns."""


def decouple(q_HND: np.ndarray, k_GND: np.ndarray, moment_DD: np.ndarray, width: int) -> Decoupled:
    """Splits keys into one rotary key and the keys without position.

    Args:
        q_HND: query projection, rotary pairs interleaved.
        k_GND: key projection of each of G key heads.
        moment_DD: second moment of what they project.
        width: of the rotary key; divides N.
    """
    heads, n, d = q_HND.shape
    groups = len(k_GND)
    q_HPD, k_GPD = (w[:, 0::2] + 1j * w[:, 1::2] for w in (q_HND, k_GND))
    looked_at_HP = np.einsum("hpd,hpd->hp", (q_HPD.reshape(-1, d) @ moment_DD).reshape(q_HPD.shape), q_HPD.conj()).real
    looked_at_GP = looked_at_HP.reshape(groups, heads // groups, n // 2).mean(1)
    weight_GP = np.sqrt(looked_at_GP + 1e-12 * looked_at_GP.max() + np.finfo(np.float64).tiny)

    fold = n // width
    q_rope_HSD = np.zeros((heads, width // 2, d), complex)
    k_rope_SD = np.zeros((width // 2, d), complex)
    k_nope_GPD = k_GPD.copy()
    kept = total = 0.0
    for slot in range(width // 2):
        pairs = slice(slot * fold, (slot + 1) * fold)
        weighted_MD = (weight_GP[:, pairs, None] * k_GPD[:, pairs]).reshape(-1, d)
        energies, components = np.linalg.eigh(weighted_MD @ moment_DD @ weighted_MD.conj().T)
        first_M = components[:, -1]
        k_rope_SD[slot] = first_M.conj() @ weighted_MD
        # In each pair, the rotary key times `back` is the component that the pair has in it.
        back_GF = first_M.reshape(groups, fold) / weight_GP[:, pairs]
        k_nope_GPD[:, pairs] -= back_GF[..., None] * k_rope_SD[slot]
        back_HF = np.repeat(back_GF, heads // groups, axis=0)
        q_rope_HSD[:, slot] = np.einsum("hf,hfd->hd", back_HF.conj(), q_HPD[:, pairs])
        kept += energies[-1]
        total += energies.sum()
    return Decoupled(_pairs(q_rope_HSD), _pairs(k_rope_SD), _pairs(k_nope_GPD), float(kept / total))


def _pairs(complex_XPD: np.ndarray) -> np.ndarray:
    """[..., P, D] complex to [..., 2 P, D], real and imaginary parts interleaved."""
    both = np.stack([complex_XPD.real, complex_XPD.imag], axis=-2)
    return both.reshape(*complex_XPD.shape[:-2], -1, complex_XPD.shape[-1])
