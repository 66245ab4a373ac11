"""Least squares that bring a converted model back to its source, layer by layer, on the calibration texts.

A converted layer gets the hidden states of the converted layers before it, which are not those of the source, so that
errors would add up. Its projections are fitted to what the source has in their place, from what they get: queries, keys
and values follow a linear map from the one's inputs to the other's (`follow`), and the two projections that add to the
residual stream, of attention and of the feed-forward, take up what linear maps can of the error so far (`refit`). Where
nothing has changed yet, nothing is changed.
"""

import numpy as np

_RIDGE = 1e-3
"""Ridge added to second moments, as a share of their mean eigenvalue: what is not seen often stays as it was."""


def follow(x_ND: np.ndarray, source_ND: np.ndarray) -> np.ndarray:
    """The map [D, D] for which map x is nearest to the source's inputs; w map is a projection that takes x."""
    return np.eye(x_ND.shape[1]) + _least_squares(x_ND, source_ND - x_ND).T


def refit(w_XD: np.ndarray, x_NX: np.ndarray, wanted_ND: np.ndarray) -> np.ndarray:
    """The matrix near w for which x w is nearest to what is wanted, float32."""
    return (w_XD + _least_squares(x_NX, wanted_ND - x_NX @ w_XD)).astype(np.float32)


def _least_squares(x_NX: np.ndarray, y_NY: np.ndarray) -> np.ndarray:
    moment_XX = (x_NX.T @ x_NX).astype(np.float64) / len(x_NX)
    moment_XX[np.diag_indices_from(moment_XX)] += _RIDGE * np.trace(moment_XX) / len(moment_XX) + 1e-30
    return np.linalg.solve(moment_XX, (x_NX.T @ y_NY).astype(np.float64) / len(x_NX))
