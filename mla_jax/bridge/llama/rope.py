"""Decoupled rotary positions: which part of the keys keeps turning, once for all heads, and what stands for the rest.

A pair of a query and of a key, as complex numbers, adds Re(conj(q) k exp(-i f t)) to the score, with t tokens between
the two and f the pair's frequency. In MLA one rotary key of width R serves all heads. Here it holds, for each
frequency, one complex number in place of those of all key heads: mixing pairs of different heads that turn at the same
rate commutes with turning, so they are taken onto their principal component (RoRoPE of TransMLA, arXiv 2502.07864).
Where R is less than the head width, every s-th frequency is kept, as "uniform" in MHA2MLA (arXiv 2502.14837), and the
frequencies up to the next share its component (FreqFold of TransMLA).

What is left becomes part of the keys without position, for which the papers stop the turning: exp(-i f t) is taken for
1. Here it is taken for what is nearest to it, its mean: about 1 where a frequency hardly turns, about 0 where it turns
often, in which case 1 would add a score that has nothing to do with the source's. In the same way frequencies that
share a component take the nearest a exp(-i f0 t) + b. Distances count by 1 / (t + 1), so each doubling of the distance
alike.
"""

from typing import NamedTuple

import numpy as np


class Decoupled(NamedTuple):
    """Projections of the normalised input, [out, in]."""

    q_rope_HRD: np.ndarray
    k_rope_RD: np.ndarray
    k_nope_GND: np.ndarray
    """Keys without position, of each key head; the queries for it are the source's."""
    share: float
    """Of the change of scores with distance, in energy, the part that the rotary key can represent."""


def decouple(
    q_HND: np.ndarray, k_GND: np.ndarray, moment_DD: np.ndarray, frequencies: np.ndarray, length: int, width: int
) -> Decoupled:
    """Splits keys into one rotary key and the keys without position.

    Args:
        q_HND: query projection, rotary pairs interleaved.
        k_GND: key projection of each of G key heads.
        moment_DD: second moment of what they project.
        frequencies: of the pairs, radians per token.
        length: distances from 0 to length - 1 count.
        width: of the rotary key; divides N.
    """
    heads, n, d = q_HND.shape
    groups, fold = len(k_GND), n // width
    q_HPD, k_GPD = (w[:, 0::2] + 1j * w[:, 1::2] for w in (q_HND, k_GND))
    energy_HP = np.einsum("hpd,hpd->hp", (q_HPD.reshape(-1, d) @ moment_DD).reshape(q_HPD.shape), q_HPD.conj()).real
    energy_GP = energy_HP.reshape(groups, heads // groups, n // 2).mean(1)
    turning_P, still_P, alone_P, gain_P = _nearest(frequencies, length, fold)
    weight_GP = np.sqrt(energy_GP * np.maximum(gain_P, 1e-9))
    weight_GP = np.maximum(weight_GP, 1e-9 * weight_GP.max())

    q_rope_HSD = np.zeros((heads, width // 2, d), complex)
    k_rope_SD = np.zeros((width // 2, d), complex)
    k_nope_GPD = alone_P[:, None] * k_GPD
    kept = 0.0
    for slot in range(width // 2):
        pairs = slice(slot * fold, (slot + 1) * fold)
        weighted_MD = (weight_GP[:, pairs, None] * k_GPD[:, pairs]).reshape(-1, d)
        energies, components = np.linalg.eigh(weighted_MD @ moment_DD @ weighted_MD.conj().T)
        first_M = components[:, -1]
        k_rope_SD[slot] = first_M.conj() @ weighted_MD
        # In each pair, the rotary key times `back` is the component that the pair has in it.
        back_GF = first_M.reshape(groups, fold) / weight_GP[:, pairs]
        k_nope_GPD[:, pairs] += ((still_P - alone_P)[pairs] * back_GF)[..., None] * k_rope_SD[slot]
        turned_HF = np.repeat(turning_P[pairs] * back_GF, heads // groups, axis=0)
        q_rope_HSD[:, slot] = np.einsum("hf,hfd->hd", turned_HF.conj(), q_HPD[:, pairs])
        kept += energies[-1]
    k_energy_GP = np.einsum("gpd,gpd->gp", (k_GPD.reshape(-1, d) @ moment_DD).reshape(k_GPD.shape), k_GPD.conj()).real
    turning = (energy_GP * k_energy_GP * (1 - np.abs(alone_P) ** 2)).sum()
    share = float(kept / turning) if turning > 0 else 1.0
    return Decoupled(_pairs(q_rope_HSD), _pairs(k_rope_SD), _pairs(k_nope_GPD), share)


def _nearest(frequencies: np.ndarray, length: int, fold: int):
    """What turning is taken for: a, b, c and a share, [P] each, by least squares over the distances.

    exp(-i f t) ~ a exp(-i f0 t) + b, with f0 the first frequency of the pair's slot, and exp(-i f t) ~ c. The share is
    how much more of it the first explains than the second, of 1.
    """
    t_T = np.arange(length)
    counts_T = 1 / (t_T + 1)
    counts_T /= counts_T.sum()
    first_P = frequencies[np.arange(len(frequencies)) // fold * fold]
    turns_TP, first_TP = (np.exp(-1j * t_T[:, None] * f) for f in (frequencies, first_P))
    c_P, c0_P = counts_T @ turns_TP, counts_T @ first_TP
    covariance_P = counts_T @ (turns_TP * first_TP.conj()) - c_P * c0_P.conj()
    variance_P = np.maximum(1 - np.abs(c0_P) ** 2, 1e-12)
    a_P = np.where(first_P == frequencies, 1, covariance_P / variance_P)
    return a_P, c_P - a_P * c0_P, c_P, np.abs(covariance_P) ** 2 / variance_P


def _pairs(complex_XPD: np.ndarray) -> np.ndarray:
    """[..., P, D] complex to [..., 2 P, D], real and imaginary parts interleaved."""
    both = np.stack([np.real(complex_XPD), np.imag(complex_XPD)], axis=-2)
    return both.reshape(*complex_XPD.shape[:-2], -1, complex_XPD.shape[-1])
