"""Low-rank factors with an RMSNorm between them: W x ~ up norm(down x), as MLA has them for keys, values and queries.

The subspace comes from the SVD of A^1/2 W C^1/2, with C the second moment of x over calibration texts and A the cost of
errors of W x (`cost_DD` is W^T A W): of all subspaces of its rank it has the lowest cost.

The norm divides the latent by its RMS, which a linear map cannot undo. But the basis within the subspace is free, and x
is the output of an RMSNorm itself: |x|^2 = D. With an orthonormal basis the latent at rank D has the same length, the
norm changes nothing, and the factors are exact. At a lower rank the latent's length is that of the projection of x on
the subspace and varies from token to token; `up` is fitted to the normalised latents. (Whitening the latent made its
length vary more.)
"""

from typing import NamedTuple

import numpy as np

_RIDGE = 1e-4
"""Ridge added to second moments, as a share of their mean eigenvalue: texts are finite."""
_ROWS = 8192
"""Inputs that are converted to float64 at a time."""


class LowRankFactors(NamedTuple):
    """W x ~ up norm(down x); the norm has weight 1."""

    down_RD: np.ndarray
    up_YR: np.ndarray
    rms_variation: float
    """Standard deviation of the latent's RMS over tokens, as a share of its mean: what the norm loses."""


def second_moment(x_ND: np.ndarray) -> np.ndarray:
    """float64 mean of x x^T, with a ridge that makes it invertible."""
    moment_DD = _mean_outer_products(x_ND, x_ND)
    return moment_DD + _RIDGE * np.trace(moment_DD) / len(moment_DD) * np.eye(len(moment_DD))


def low_rank_factors(
    w_YD: np.ndarray, cost_DD: np.ndarray, x_ND: np.ndarray, moment_DD: np.ndarray, rank: int
) -> LowRankFactors:
    """Factors of `w_YD` of this rank.

    Args:
        w_YD: the matrix, [out, in].
        cost_DD: w^T A w, with A [Y, Y] the cost of a squared error of the outputs.
        x_ND: inputs over the calibration texts, outputs of an RMSNorm: |x|^2 = D.
        moment_DD: their `second_moment`.
        rank: from 1 to D.
    """
    values, vectors = np.linalg.eigh(moment_DD)
    root, inverse_root = ((vectors * values**power) @ vectors.T for power in (0.5, -0.5))
    gram_DD = root @ cost_DD @ root
    # Directions in the null space of w come last, by energy; at a rank above w's they help to keep the latent's length.
    gram_DD += 1e-9 * np.trace(gram_DD) / np.trace(moment_DD) * moment_DD
    leading_DR = np.linalg.eigh(gram_DD)[1][:, ::-1][:, :rank]
    basis_DR = np.linalg.qr(inverse_root @ leading_DR)[0]

    z_NR = x_ND @ basis_DR
    rms_N = np.sqrt(np.mean(np.square(z_NR), axis=1))
    down_RD, c_NR = basis_DR.T / rms_N.mean(), z_NR / rms_N[:, None]
    # First the solution without the norm, which is exact at full rank; then the residual, by least squares.
    up_YR = w_YD @ moment_DD @ down_RD.T @ np.linalg.inv(down_RD @ moment_DD @ down_RD.T)
    latent_moment_RR = _mean_outer_products(c_NR, c_NR)
    residual_YR = w_YD @ _mean_outer_products(x_ND, c_NR) - up_YR @ latent_moment_RR
    up_YR += residual_YR @ np.linalg.inv(latent_moment_RR + _RIDGE * np.eye(rank))
    return LowRankFactors(down_RD, up_YR, float(rms_N.std() / rms_N.mean()))


def rms_normalize(c_NR: np.ndarray) -> np.ndarray:
    """Each row divided by its RMS."""
    return c_NR / np.sqrt(np.mean(np.square(c_NR), axis=1, keepdims=True))


def _mean_outer_products(a_NX: np.ndarray, b_NY: np.ndarray) -> np.ndarray:
    """Mean of a b^T in float64: in directions that the texts lack, float32's rounding errors would count as signal."""
    total_XY = np.zeros((a_NX.shape[1], b_NY.shape[1]))
    for start in range(0, len(a_NX), _ROWS):
        a, b = (array[start : start + _ROWS].astype(np.float64) for array in (a_NX, b_NY))
        total_XY += a.T @ b
    return total_XY / len(a_NX)
