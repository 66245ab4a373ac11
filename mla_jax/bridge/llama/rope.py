"""Decoupled RoPE: splits the keys of all heads into one RoPE key, shared by all heads, and keys without position.

A RoPE pair of a query and of a key, as complex numbers, adds Re(conj(q) k exp(-i f t)) to the score, with t the
distance in tokens and f the pair's frequency (inv_freq). In MLA one RoPE key of width R serves all heads: R/2 slots,
each a complex number with a frequency g of the target. With q and k those of key head and pair i, this file fits

    k_i exp(-i f_i t)  ~  sum_s c_si r_s exp(-i g_s t) + n_i

over distances t and inputs: r_s = m_s k is slot s of the RoPE key, c_si becomes part of the queries, and n_i is the key
without position. An error of k_i counts by the energy of its queries, and a distance t has weight 1 / (t + 1), so that
every doubling of the distance counts the same. The best n_i, given the rest, replaces every rotation by its mean over
distances: about 1 for a low frequency, about 0 for a high one.

The rest is alternating least squares. Each slot begins with the principal component of the pairs whose frequencies are
nearest to its own, which is RoRoPE and FreqFold of TransMLA (arXiv 2502.07864); then slot after slot is fitted to what
all others leave. Going far from the beginning costs a little: rotations by nearby low frequencies are so alike that the
plain fit is a small difference of large, opposite parts, which holds for no other text.
"""

from typing import NamedTuple

import numpy as np

_RIDGE = 1e-2
"""Cost of a slot's change from its beginning, in energy, beside that of the error."""
_MAX_SWEEPS = 30
_ENOUGH = 1e-4
"""A sweep that explains no more than this share of the variation is the last one."""


class Decoupled(NamedTuple):
    """Projections of the normalised input, [out, in], and how much of RoPE's effect they keep."""

    q_rope_HRD: np.ndarray
    k_rope_RD: np.ndarray
    k_nope_GND: np.ndarray
    """Keys without position, of each key head; their queries are the source's."""
    share: float
    """Share of the variation of scores with distance, in energy, that the RoPE key represents."""


def decouple(
    q_HND: np.ndarray,
    k_GND: np.ndarray,
    moment_DD: np.ndarray,
    inv_freq: np.ndarray,
    slot_inv_freq: np.ndarray,
    length: int,
    *,
    fit: bool = True,
) -> Decoupled:
    """Splits keys into one RoPE key and the keys without position.

    Args:
        q_HND: query projection, RoPE pairs interleaved.
        k_GND: key projection of each of G key heads.
        moment_DD: second moment of the projections' input.
        inv_freq: frequencies of the N/2 pairs, radians per token.
        slot_inv_freq: frequencies of the R/2 pairs of the RoPE key.
        length: the fit is over distances from 0 to length - 1.
        fit: whether slots are fitted after they began.
    """
    heads, n, d = q_HND.shape
    groups, slots = len(k_GND), len(slot_inv_freq)
    q_HPD, k_GPD = (w[:, 0::2] + 1j * w[:, 1::2] for w in (q_HND, k_GND))
    energy_HP = np.einsum("hpd,hpd->hp", (q_HPD.reshape(-1, d) @ moment_DD).reshape(q_HPD.shape), q_HPD.conj()).real
    root_I = np.sqrt(energy_HP.reshape(groups, heads // groups, n // 2).mean(1)).ravel()
    root_I = np.maximum(root_I, 1e-9 * root_I.max() + 1e-30)
    k_ID = k_GPD.reshape(-1, d)

    mean_P, mean_S, by_slot_SS, by_pair_SP, variance_P = _rotations(inv_freq, slot_inv_freq, length)
    nearest_P = np.abs(np.log(slot_inv_freq + 1e-30)[:, None] - np.log(inv_freq + 1e-30)).argmin(axis=0)
    use_SI, mix_SI, share = _fit_slots(
        (k_ID @ moment_DD) @ k_ID.conj().T,
        root_I,
        by_slot_SS,
        np.tile(by_pair_SP, groups),
        np.tile(variance_P, groups),
        np.tile(nearest_P, groups),
        _MAX_SWEEPS if fit else 0,
    )
    k_rope_SD = mix_SI @ k_ID
    back_SGP = (use_SI / root_I).reshape(slots, groups, n // 2)
    q_rope_HSD = np.einsum("hpd,shp->hsd", q_HPD, np.repeat(back_SGP, heads // groups, axis=1).conj())
    k_nope_GPD = mean_P[:, None] * k_GPD - np.einsum("sgp,s,sd->gpd", back_SGP, mean_S, k_rope_SD)
    return Decoupled(_pairs(q_rope_HSD), _pairs(k_rope_SD), _pairs(k_nope_GPD), share)


def _rotations(inv_freq: np.ndarray, slot_inv_freq: np.ndarray, length: int):
    """Means over the distances of the pairs' and slots' rotations, and what is left without them: inner products.

    Returns:
        Means [P] and [S]; inner products of slots with slots [S, S] and with pairs [S, P]; the pairs' energies [P].
    """
    t_T = np.arange(length)
    weight_T = 1 / (t_T + 1)
    weight_T /= weight_T.sum()
    pair_TP, slot_TS = (np.exp(-1j * t_T[:, None] * f) for f in (inv_freq, slot_inv_freq))
    mean_P, mean_S = weight_T @ pair_TP, weight_T @ slot_TS
    pair_TP, slot_TS = pair_TP - mean_P, slot_TS - mean_S
    weighted_ST = (weight_T[:, None] * slot_TS).conj().T
    return mean_P, mean_S, weighted_ST @ slot_TS, weighted_ST @ pair_TP, weight_T @ np.abs(pair_TP) ** 2


def _fit_slots(gram_II, root_I, by_slot_SS, by_pair_SI, variance_I, nearest_I, sweeps):
    """Alternating least squares, a slot at a time.

    Args:
        gram_II: inner products of the keys of all heads and pairs.
        root_I: roots of their queries' energies.
        by_slot_SS: inner products of the slots' rotations.
        by_pair_SI: those of slots with pairs.
        variance_I: energies of the pairs' rotations.
        nearest_I: the slot that each pair begins in.
        sweeps: how often each slot is fitted, at most.

    Returns:
        use_SI and mix_SI: slot s is mix_s k, and root_i k_i exp(-i f_i t) takes use_si of it; the share explained.
    """
    wanted_SI = by_pair_SI * root_I
    use_SI, mix_SI = np.zeros_like(wanted_SI), np.zeros_like(wanted_SI)
    norm_S = by_slot_SS.diagonal().real
    for s in range(len(norm_S)):
        of_slot_I = wanted_SI[s] * (nearest_I == s)
        if norm_S[s] > 1e-12 and of_slot_I.any():
            use_SI[s] = _principal(np.diag(of_slot_I), gram_II)
            mix_SI[s] = use_SI[s].conj() * of_slot_I / norm_S[s]
    begin_use_SI, begin_mix_SI = use_SI.copy(), mix_SI.copy()
    total = (variance_I * root_I**2 * gram_II.diagonal().real).sum()
    if total <= 0:
        return use_SI, mix_SI, 1.0

    def explained() -> float:
        cross = np.einsum("si,si,ij,sj->", use_SI.conj(), wanted_SI, gram_II, mix_SI.conj(), optimize=True).real
        both_SS = (use_SI.conj() @ use_SI.T) * (mix_SI.conj() @ gram_II.T @ mix_SI.T)
        return float((2 * cross - (by_slot_SS * both_SS).sum().real) / total)

    def left_of(u_I, s: int):
        """u^H of what the other slots leave to slot s, as a combination of keys."""
        weight_S = by_slot_SS[s] * (u_I.conj() @ use_SI.T)
        weight_S[s] = 0
        return u_I.conj() * wanted_SI[s] - weight_S @ mix_SI + _RIDGE * (u_I.conj() @ begin_use_SI[s]) * begin_mix_SI[s]

    share = explained()
    for _ in range(sweeps):
        for s, norm in enumerate(norm_S):
            if use_SI[s].any():
                seen_I = gram_II @ mix_SI[s].conj()
                weight_S = by_slot_SS[s] * (mix_SI @ seen_I)
                weight_S[s] = 0
                u_I = wanted_SI[s] * seen_I - weight_S @ use_SI
                u_I += _RIDGE * begin_use_SI[s] * (begin_mix_SI[s] @ seen_I)
                use_SI[s] = u_I / (np.linalg.norm(u_I) + 1e-30)
            else:
                use_SI[s] = _principal(np.diag(wanted_SI[s]) - (use_SI.T * by_slot_SS[s]) @ mix_SI, gram_II)
            mix_SI[s] = left_of(use_SI[s], s) / (norm + _RIDGE)
        before, share = share, explained()
        if share - before < _ENOUGH:
            break
    return use_SI, mix_SI, share


def _principal(coefficients_II: np.ndarray, gram_II: np.ndarray) -> np.ndarray:
    """The unit vector u for which u^H of these combinations of keys has the most energy."""
    return np.linalg.eigh(coefficients_II @ gram_II @ coefficients_II.conj().T)[1][:, -1]


def _pairs(complex_XPD: np.ndarray) -> np.ndarray:
    """[..., P, D] complex to [..., 2 P, D], real and imaginary parts interleaved."""
    both = np.stack([np.real(complex_XPD), np.imag(complex_XPD)], axis=-2)
    return both.reshape(*complex_XPD.shape[:-2], -1, complex_XPD.shape[-1])
