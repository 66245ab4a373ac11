"""Least squares that bring a converted model back to its source, layer by layer, on the calibration texts.

A converted layer gets the hidden states of the converted layers before it, which are not those of the source, so that
errors would add up. Its projections are fitted to what the source has in their place, from what they get: queries, keys
and values follow a linear map from the one's inputs to the other's (`follow`), and the two projections that add to the
residual stream, of attention and of the feed-forward, take up what linear maps can of the error so far (`refit`).

Texts are finite, and a fit to them alone can be worse than none. So of some ridges, and no
change at all, the one is taken that does best on texts that were not fitted to.
"""

import numpy as np

_RIDGES = (1e-3, 1e-2, 1e-1)
"""Ridges to choose from beside no fit at all, as shares of the mean eigenvalue of the second moment."""
_CHECKED = 8
"""One in this many rows, the last ones, is for the choice of the ridge."""


def follow(x_ND: np.ndarray, source_ND: np.ndarray) -> np.ndarray:
    """The map [D, D] for which map x is nearest to the source's inputs; w map is a projection that takes x."""
    return np.eye(x_ND.shape[1]) + _least_squares(x_ND, source_ND - x_ND).T


def refit(w_XD: np.ndarray, x_NX: np.ndarray, h_ND: np.ndarray, wanted_ND: np.ndarray) -> np.ndarray:
    """The matrix near w for which h + x w is nearest to the hidden states wanted, float32.

    A token's error counts by the inverse of its hidden state's energy, since the next norm divides by that: the first
    token of a text has a hundred times the length of others.
    """
    root_N1 = 1 / np.sqrt(np.mean(np.square(wanted_ND), axis=1, keepdims=True) + 1e-30)
    change_XD = _least_squares(root_N1 * x_NX, root_N1 * (wanted_ND - h_ND - x_NX @ w_XD))
    return (w_XD + change_XD).astype(np.float32)


def _least_squares(x_NX: np.ndarray, y_NY: np.ndarray) -> np.ndarray:
    """The map [X, Y] from x to y at the ridge that is best for the last rows, fitted to the others."""
    fitted = len(x_NX) - len(x_NX) // _CHECKED
    x, y, checked_x, checked_y = x_NX[:fitted], y_NY[:fitted], x_NX[fitted:], y_NY[fitted:]
    moment_XX, product_XY = ((x.T @ other).astype(np.float64) / fitted for other in (x, y))
    best, lowest = np.zeros(product_XY.shape), np.square(checked_y).sum()
    for ridge in _RIDGES:
        ridge_XX = (ridge * np.trace(moment_XX) / len(moment_XX) + 1e-30) * np.eye(len(moment_XX))
        map_XY = np.linalg.solve(moment_XX + ridge_XX, product_XY)
        error = np.square(checked_y - checked_x @ map_XY).sum()
        if error < lowest:
            best, lowest = map_XY, error
    return best
