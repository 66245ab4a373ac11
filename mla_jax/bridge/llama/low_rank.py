"""Low-rank factors with an RMSNorm between them: W x ~ up norm(down x), as MLA has them for keys, values and queries.

The subspace comes from the SVD of A^1/2 W C^1/2, with C the second moment of x over calibration texts and A the cost of
errors of W x (`cost_DD` is W^T A W): of all subspaces of its rank it has the lowest cost.

The norm divides the latent by its length, which a linear map cannot undo. At full rank that is harmless: x is the
output of an RMSNorm itself, |x|^2 = D, and an orthonormal basis keeps its length, so the factors are exact. At a lower
rank the latent's length varies from token to token, which costs more than the rank does. So one latent is spent on the
direction u that is nearest to constant over tokens, the least-squares solution of u x = 1, and scaled to be most of the
length; the others hold what varies. The length is then nearly constant, and the norm changes little. The constant also
gives keys and values the bias that matrices lack, and the subspace is chosen for the covariance of x alone.

`up` is fitted to the normalised latents.
"""

from typing import NamedTuple

import numpy as np

_RIDGE = 1e-4
"""Ridge added to second moments, as a share of their mean eigenvalue: texts are finite."""
_CONSTANT = 3.0
"""Length of the constant latent, in RMS lengths of the others together."""
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
    w_YD: np.ndarray, cost_DD: np.ndarray, x_ND: np.ndarray, moment_DD: np.ndarray, rank: int, *, constant: bool = True
) -> LowRankFactors:
    """Factors of `w_YD` of this rank.

    Args:
        w_YD: the matrix, [out, in].
        cost_DD: w^T A w, with A [Y, Y] the cost of a squared error of the outputs.
        x_ND: inputs over the calibration texts, outputs of an RMSNorm: |x|^2 = D.
        moment_DD: their `second_moment`.
        rank: from 1 to D.
        constant: whether one latent is spent on the constant direction, where that makes the length vary less.
    """
    down_RD = _subspace(cost_DD, moment_DD, rank)
    rms_N = _rms(x_ND @ down_RD.T)
    if constant and 1 < rank < len(moment_DD):
        other_RD = _with_constant(cost_DD, x_ND, moment_DD, rank)
        other_N = _rms(x_ND @ other_RD.T)
        if _variation(other_N) < _variation(rms_N):
            down_RD, rms_N = other_RD, other_N
    c_NR = x_ND @ down_RD.T / rms_N[:, None]
    # First the solution without the norm, which is exact at full rank; then the residual, by least squares.
    up_YR = w_YD @ moment_DD @ down_RD.T @ np.linalg.inv(down_RD @ moment_DD @ down_RD.T) * rms_N.mean()
    latent_moment_RR = _mean_outer_products(c_NR, c_NR)
    residual_YR = w_YD @ _mean_outer_products(x_ND, c_NR) - up_YR @ latent_moment_RR
    up_YR += residual_YR @ np.linalg.inv(latent_moment_RR + _RIDGE * np.diag(np.diag(latent_moment_RR)))
    reflection_RR = _reflection(rank)  # the norm does not see it
    return LowRankFactors(reflection_RR @ down_RD / rms_N.mean(), up_YR @ reflection_RR, _variation(rms_N))


def rms_normalize(c_NR: np.ndarray) -> np.ndarray:
    """Each row divided by its RMS."""
    return c_NR / _rms(c_NR)[:, None]


def _subspace(cost_DD: np.ndarray, moment_DD: np.ndarray, rank: int) -> np.ndarray:
    """Orthonormal rows [R, D] of the subspace to which x is confined at the lowest cost."""
    values, vectors = np.linalg.eigh(moment_DD)
    values = np.maximum(values, 1e-12 * values.max())
    root, inverse_root = ((vectors * values**power) @ vectors.T for power in (0.5, -0.5))
    gram_DD = root @ cost_DD @ root
    # Directions in the null space of w come last, by energy; at a rank above w's they help to keep the latent's length.
    gram_DD += 1e-9 * np.trace(gram_DD) / np.trace(moment_DD) * moment_DD
    leading_DR = np.linalg.eigh(gram_DD)[1][:, ::-1][:, :rank]
    return np.linalg.qr(inverse_root @ leading_DR)[0].T


def _with_constant(cost_DD: np.ndarray, x_ND: np.ndarray, moment_DD: np.ndarray, rank: int) -> np.ndarray:
    """Rows [R, D]: first the constant direction, then those of a subspace, each less its mean."""
    mean_D = x_ND.mean(axis=0, dtype=np.float64)
    u_D = np.linalg.solve(moment_DD, mean_D)
    basis_RD = _subspace(cost_DD, moment_DD - np.outer(mean_D, mean_D), rank - 1)
    basis_RD -= np.outer(basis_RD @ mean_D, u_D / (u_D @ mean_D + 1e-30))
    others = np.sqrt(np.mean(np.square(x_ND @ basis_RD.T).sum(axis=1)))
    u_D *= _CONSTANT * others / np.sqrt(np.mean(np.square(x_ND @ u_D)) + 1e-30)
    return np.concatenate([u_D[None], basis_RD])


def _reflection(rank: int) -> np.ndarray:
    """Householder's reflection that spreads the first latent evenly over all: an 8-bit cache has one scale for them."""
    v_R = np.full(rank, -(rank**-0.5))
    v_R[0] += 1
    return np.eye(rank) - 2 * np.outer(v_R, v_R) / (v_R @ v_R + 1e-30)


def _rms(c_NR: np.ndarray) -> np.ndarray:
    return np.sqrt(np.mean(np.square(c_NR), axis=1))


def _variation(rms_N: np.ndarray) -> float:
    return float(rms_N.std() / rms_N.mean())


def _mean_outer_products(a_NX: np.ndarray, b_NY: np.ndarray) -> np.ndarray:
    """Mean of a b^T in float64: in directions that the texts lack, float32's rounding errors would count as signal."""
    total_XY = np.zeros((a_NX.shape[1], b_NY.shape[1]))
    for start in range(0, len(a_NX), _ROWS):
        a, b = (array[start : start + _ROWS].astype(np.float64) for array in (a_NX, b_NY))
        total_XY += a.T @ b
    return total_XY / len(a_NX)
