"""Low-rank factors with an RMSNorm between them: W x ~ up norm(down x), as MLA has them for keys, values and queries.

The subspace is that of the SVD of weight^1/2 W C^1/2, with C the second moment of x over calibration texts: of all of
its rank it changes least what the outputs are used for.

The norm divides the latent by its RMS, which a linear map cannot undo. But the basis within the subspace is free, and x
has been normalised itself: |x|^2 = D. With an orthonormal basis the latent at rank D has that same length, the norm
changes nothing, and the factors are exact. At a lower rank its length is that of the part of x that is seen and varies
from token to token; `up` is fitted to the normalised latents. (Whitening the latent made its length vary more.)
"""

from typing import NamedTuple

import numpy as np

_RIDGE = 1e-4
"""Of the mean of the second moments, added to each direction: texts are finite."""
_ROWS = 8192
"""Inputs that exist in float64 at one time."""


class Factors(NamedTuple):
    """The norm between has weight 1."""

    down_RD: np.ndarray
    up_YR: np.ndarray
    rms_variation: float
    """Standard deviation of the latent's RMS over tokens, of its mean; what the norm loses."""


def second_moment(x_ND: np.ndarray) -> np.ndarray:
    """float64 mean of x x^T, with a ridge that makes it invertible."""
    moment_DD = _mean_products(x_ND, x_ND)
    return moment_DD + _RIDGE * np.trace(moment_DD) / len(moment_DD) * np.eye(len(moment_DD))


def factorise(w_YD: np.ndarray, cost_DD: np.ndarray, x_ND: np.ndarray, moment_DD: np.ndarray, rank: int) -> Factors:
    """Factors of w of this rank.

    Args:
        w_YD: the matrix, [out, in].
        cost_DD: w^T weight w, with the weight of errors of the outputs.
        x_ND: normalised inputs of the calibration texts, |x|^2 = D.
        moment_DD: their `second_moment`.
        rank: from 1 to D.
    """
    values, vectors = np.linalg.eigh(moment_DD)
    root, inverse_root = ((vectors * values**power) @ vectors.T for power in (0.5, -0.5))
    gram_DD = root @ cost_DD @ root
    # What w does not see comes last, by energy; at a rank beyond that of w it helps to keep the latent's length.
    gram_DD += 1e-9 * np.trace(gram_DD) / np.trace(moment_DD) * moment_DD
    leading_DR = np.linalg.eigh(gram_DD)[1][:, ::-1][:, :rank]
    basis_DR = np.linalg.qr(inverse_root @ leading_DR)[0]

    z_NR = x_ND @ basis_DR
    rms_N = np.sqrt(np.mean(np.square(z_NR), axis=1))
    down_RD, c_NR = basis_DR.T / rms_N.mean(), z_NR / rms_N[:, None]
    # First as if there was no norm, which is exact at full rank; then what is left, by least squares.
    up_YR = w_YD @ moment_DD @ down_RD.T @ np.linalg.inv(down_RD @ moment_DD @ down_RD.T)
    left_YR = w_YD @ _mean_products(x_ND, c_NR) - up_YR @ (seen_RR := _mean_products(c_NR, c_NR))
    up_YR += left_YR @ np.linalg.inv(seen_RR + _RIDGE * np.eye(rank))
    return Factors(down_RD, up_YR, float(rms_N.std() / rms_N.mean()))


def normalised(c_NR: np.ndarray) -> np.ndarray:
    """Each row divided by its RMS."""
    return c_NR / np.sqrt(np.mean(np.square(c_NR), axis=1, keepdims=True))


def _mean_products(a_NX: np.ndarray, b_NY: np.ndarray) -> np.ndarray:
    """float64 mean of a b^T. Where texts say nothing, a rounding error would be taken for something."""
    total_XY = np.zeros((a_NX.shape[1], b_NY.shape[1]))
    for start in range(0, len(a_NX), _ROWS):
        a, b = (array[start : start + _ROWS].astype(np.float64) for array in (a_NX, b_NY))
        total_XY += a.T @ b
    return total_XY / len(a_NX)
