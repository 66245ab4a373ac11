"""Decoupled RoPE: splits the keys of all heads into one RoPE key, shared by all heads, and keys without position.

A RoPE pair of a query and of a key, as complex numbers, adds Re(conj(q) k exp(-i f t)) to the score, with t the
distance in tokens and f the pair's frequency (inv_freq). In MLA one RoPE key of width R serves all heads. Here it
holds, for each frequency, one complex number in place of those of all key heads: mixing pairs of different heads that
have the same frequency commutes with the rotation, so they are projected onto their principal component (RoRoPE of
TransMLA, arXiv 2502.07864). Where R is less than the head width, every s-th frequency is kept, as "uniform" in MHA2MLA
(arXiv 2502.14837), and the frequencies up to the next kept one share its component (FreqFold of TransMLA).

The remainder becomes part of the keys without position. For these the papers drop the rotation: they replace
exp(-i f t) by 1. Here it is replaced by its mean over distances, the best constant in the least-squares sense: about 1
for a low frequency, about 0 for a high one, where 1 would add a score unrelated to the source's. Likewise, for
frequencies that share the component of f0 it is replaced by the best a exp(-i f0 t) + b. A distance t has weight
1 / (t + 1), so that every doubling of the distance counts the same.
"""

from typing import NamedTuple

import numpy as np


class Decoupled(NamedTuple):
    """Projections of the normalised input, [out, in], and how much of RoPE's effect they keep."""

    q_rope_HRD: np.ndarray
    k_rope_RD: np.ndarray
    k_nope_GND: np.ndarray
    """Keys without position, of each key head; their queries are the source's."""
    share: float
    """Share of the variation of scores with distance, in energy, that the RoPE key can represent."""


def decouple(
    q_HND: np.ndarray, k_GND: np.ndarray, moment_DD: np.ndarray, inv_freq: np.ndarray, length: int, width: int
) -> Decoupled:
    """Splits keys into one RoPE key and the keys without position.

    Args:
        q_HND: query projection, RoPE pairs interleaved.
        k_GND: key projection of each of G key heads.
        moment_DD: second moment of the projections' input.
        inv_freq: frequencies of the N/2 pairs, radians per token.
        length: the fit is over distances from 0 to length - 1.
        width: width of the RoPE key; divides N.
    """
    heads, n, d = q_HND.shape
    groups, fold = len(k_GND), n // width
    q_HPD, k_GPD = (w[:, 0::2] + 1j * w[:, 1::2] for w in (q_HND, k_GND))
    energy_HP = np.einsum("hpd,hpd->hp", (q_HPD.reshape(-1, d) @ moment_DD).reshape(q_HPD.shape), q_HPD.conj()).real
    energy_GP = energy_HP.reshape(groups, heads // groups, n // 2).mean(1)
    rotating_P, constant_P, mean_P, gain_P = _fit_rotations(inv_freq, length, fold)
    weight_GP = np.sqrt(energy_GP * np.maximum(gain_P, 1e-9))
    weight_GP = np.maximum(weight_GP, 1e-9 * weight_GP.max())

    q_rope_HSD = np.zeros((heads, width // 2, d), complex)
    k_rope_SD = np.zeros((width // 2, d), complex)
    k_nope_GPD = mean_P[:, None] * k_GPD
    kept = 0.0
    for slot in range(width // 2):
        pairs = slice(slot * fold, (slot + 1) * fold)
        weighted_MD = (weight_GP[:, pairs, None] * k_GPD[:, pairs]).reshape(-1, d)
        energies, components = np.linalg.eigh(weighted_MD @ moment_DD @ weighted_MD.conj().T)
        first_M = components[:, -1]
        k_rope_SD[slot] = first_M.conj() @ weighted_MD
        # The RoPE key times `back` is the projection of each pair's key onto the shared component.
        back_GF = first_M.reshape(groups, fold) / weight_GP[:, pairs]
        k_nope_GPD[:, pairs] += ((constant_P - mean_P)[pairs] * back_GF)[..., None] * k_rope_SD[slot]
        factor_HF = np.repeat(rotating_P[pairs] * back_GF, heads // groups, axis=0)
        q_rope_HSD[:, slot] = np.einsum("hf,hfd->hd", factor_HF.conj(), q_HPD[:, pairs])
        kept += energies[-1]
    k_energy_GP = np.einsum("gpd,gpd->gp", (k_GPD.reshape(-1, d) @ moment_DD).reshape(k_GPD.shape), k_GPD.conj()).real
    variation = (energy_GP * k_energy_GP * (1 - np.abs(mean_P) ** 2)).sum()
    share = float(kept / variation) if variation > 0 else 1.0
    return Decoupled(_pairs(q_rope_HSD), _pairs(k_rope_SD), _pairs(k_nope_GPD), share)


def _fit_rotations(inv_freq: np.ndarray, length: int, fold: int):
    """Least-squares approximations of each pair's rotation over the distances: a, b, c and a gain, [P] each.

    exp(-i f t) ~ a exp(-i f0 t) + b, with f0 the first of the `fold` frequencies that share a component, and
    exp(-i f t) ~ c. The gain is the share of its energy that the first explains and the second does not.
    """
    t_T = np.arange(length)
    weight_T = 1 / (t_T + 1)
    weight_T /= weight_T.sum()
    first_P = inv_freq[np.arange(len(inv_freq)) // fold * fold]
    rotation_TP, first_TP = (np.exp(-1j * t_T[:, None] * f) for f in (inv_freq, first_P))
    c_P, c0_P = weight_T @ rotation_TP, weight_T @ first_TP
    covariance_P = weight_T @ (rotation_TP * first_TP.conj()) - c_P * c0_P.conj()
    variance_P = np.maximum(1 - np.abs(c0_P) ** 2, 1e-12)
    a_P = np.where(first_P == inv_freq, 1, covariance_P / variance_P)
    return a_P, c_P - a_P * c0_P, c_P, np.abs(covariance_P) ** 2 / variance_P


def _pairs(complex_XPD: np.ndarray) -> np.ndarray:
    """[..., P, D] complex to [..., 2 P, D], real and imaginary parts interleaved."""
    both = np.stack([np.real(complex_XPD), np.imag(complex_XPD)], axis=-2)
    return both.reshape(*complex_XPD.shape[:-2], -1, complex_XPD.shape[-1])
