"""The two decompositions alone, in float64: joint low-rank factors with a norm between them, decoupled rotary keys."""

import numpy as np
import pytest

from mla_jax.bridge.llama.low_rank import low_rank_factors, rms_normalize, second_moment
from mla_jax.bridge.llama.rope import _fit_rotations, decouple

D = 24
RNG = np.random.default_rng(0)


@pytest.fixture(scope="module")
def x_ND():
    """Inputs with |x|^2 = D, most of whose energy is in few directions that are no axes."""
    spread = RNG.normal(size=(D, D)) * np.geomspace(1, 0.02, D)[:, None]
    return rms_normalize(RNG.normal(size=(4000, D)) @ spread)


def factors(w_YD, x_ND, rank, weights_Y=None):
    weighted = w_YD if weights_Y is None else w_YD * weights_Y[:, None]
    return low_rank_factors(w_YD, weighted.T @ weighted, x_ND, second_moment(x_ND), rank)


def errors_Y(w_YD, made, x_ND):
    return np.square(x_ND @ w_YD.T - rms_normalize(x_ND @ made.down_RD.T) @ made.up_YR.T).mean(0)


@pytest.mark.parametrize("outputs", [5, D, 60])
def test_full_rank_is_exact_on_inputs_never_seen(outputs, x_ND):
    w_YD = RNG.normal(size=(outputs, D))
    made = factors(w_YD, x_ND, D)
    np.testing.assert_allclose(made.down_RD @ made.down_RD.T, np.eye(D), atol=1e-9)
    assert errors_Y(w_YD, made, rms_normalize(RNG.normal(size=(100, D)))).max() < 1e-12
    assert made.rms_variation < 1e-9


def test_inputs_that_the_texts_do_not_have():
    """Fewer tokens than directions: still exact at full rank."""
    x_ND = rms_normalize(RNG.normal(size=(10, D)))
    w_YD = RNG.normal(size=(7, D))
    assert errors_Y(w_YD, factors(w_YD, x_ND, D), rms_normalize(RNG.normal(size=(100, D)))).max() < 1e-12


def test_activations_choose_the_subspace(x_ND):
    """Against the SVD of the weights alone with the best linear map behind it, and against a bound no map can beat."""
    w_YD = RNG.normal(size=(40, D))
    made = factors(w_YD, x_ND, 8)
    ours = errors_Y(w_YD, made, x_ND).sum()
    basis_RD = np.linalg.svd(w_YD)[2][:8]
    z_NR = x_ND @ basis_RD.T
    plain = np.square(x_ND @ w_YD.T - z_NR @ np.linalg.lstsq(z_NR, x_ND @ w_YD.T, rcond=None)[0]).mean(0).sum()
    bound = (np.linalg.svd(x_ND @ w_YD.T, compute_uv=False)[8:] ** 2).sum() / len(x_ND)
    assert bound < ours < 0.7 * plain


def test_errors_fall_with_rank(x_ND):
    w_YD = RNG.normal(size=(40, D))
    by_rank = [errors_Y(w_YD, factors(w_YD, x_ND, rank), x_ND).sum() for rank in (1, 4, 8, 16, 20, D)]
    assert by_rank == sorted(by_rank, reverse=True)


def test_outputs_that_count_more_are_kept_better(x_ND):
    w_YD = RNG.normal(size=(40, D))
    weights_Y = np.where(np.arange(40) < 5, 30.0, 1.0)
    alike, unlike = (errors_Y(w_YD, factors(w_YD, x_ND, 8, w), x_ND)[:5].sum() for w in (None, weights_Y))
    assert unlike < 0.5 * alike


HEADS, GROUPS, N, THETA = 4, 2, 8, 50.0
FREQUENCIES = THETA ** (-np.arange(0, N, 2) / N)


def rotated(x_TX, positions_T, frequencies):
    pairs = (x_TX[:, 0::2] + 1j * x_TX[:, 1::2]) * np.exp(1j * positions_T[:, None] * frequencies)
    return np.stack([pairs.real, pairs.imag], axis=-1).reshape(x_TX.shape)


def scores(q_HND, k_GND, x_TD, positions_T, parts=None):
    """[H, T, T], of the source or of its decoupled parts."""
    out = []
    for h in range(HEADS):
        q, k = x_TD @ q_HND[h].T, x_TD @ k_GND[h * GROUPS // HEADS].T
        if parts is None:
            out.append(rotated(q, positions_T, FREQUENCIES) @ rotated(k, positions_T, FREQUENCIES).T)
        else:
            kept = FREQUENCIES[:: N // len(parts.k_rope_RD)]
            q_rope, k_rope = (rotated(x_TD @ w.T, positions_T, kept) for w in (parts.q_rope_HRD[h], parts.k_rope_RD))
            out.append(q @ (x_TD @ parts.k_nope_GND[h * GROUPS // HEADS].T).T + q_rope @ k_rope.T)
    return np.array(out)


def projections(groups):
    return RNG.normal(size=(HEADS, N, D)), RNG.normal(size=(groups, N, D))


@pytest.mark.parametrize("width", [2, 4, 8])
def test_without_distance_the_parts_add_up(width, x_ND):
    q_HND, k_GND = projections(GROUPS)
    parts = decouple(q_HND, k_GND, second_moment(x_ND), FREQUENCIES, 1, width)
    nowhere = np.zeros(20)
    np.testing.assert_allclose(
        scores(q_HND, k_GND, x_ND[:20], nowhere, parts), scores(q_HND, k_GND, x_ND[:20], nowhere), atol=1e-9
    )


def test_one_key_head_loses_nothing(x_ND):
    q_HND, k_1ND = projections(1)
    parts = decouple(q_HND, k_1ND, second_moment(x_ND), FREQUENCIES, 64, N)
    assert parts.share == pytest.approx(1)
    assert np.abs(parts.k_nope_GND).max() < 1e-9
    both = (k_1ND.repeat(GROUPS, axis=0), x_ND[:20], np.arange(20))
    parts = parts._replace(k_nope_GND=parts.k_nope_GND.repeat(GROUPS, axis=0))
    np.testing.assert_allclose(scores(q_HND, *both, parts), scores(q_HND, *both), atol=1e-9)


def score_error(parts, q_HND, k_GND, x_ND, length=64):
    """Mean squared error of scores over tokens, for the distances as they count."""
    total = 0.0
    for t in range(length):
        pairs = [x_ND[i : i + 2] for i in range(0, 100, 10)]
        where = np.array([t, 0])
        total += sum(
            np.square((scores(q_HND, k_GND, x, where, parts) - scores(q_HND, k_GND, x, where))[:, 0, 1]).sum()
            for x in pairs
        ) / (t + 1)
    return total


@pytest.mark.parametrize("width", [4, 8])
def test_keys_without_position_are_better_damped_than_left_unrotated(width, x_ND):
    """Distance 1 alone is the papers' way: nothing is damped, and frequencies that share a component rotate alike."""
    q_HND, k_GND = projections(GROUPS)
    ours, stopped = (decouple(q_HND, k_GND, second_moment(x_ND), FREQUENCIES, n, width) for n in (64, 1))
    assert score_error(ours, q_HND, k_GND, x_ND) < 0.8 * score_error(stopped, q_HND, k_GND, x_ND)


def test_wider_rotary_keys_lose_less(x_ND):
    q_HND, k_GND = projections(GROUPS)
    parts = [decouple(q_HND, k_GND, second_moment(x_ND), FREQUENCIES, 64, width) for width in (2, 4, 8)]
    errors = [score_error(p, q_HND, k_GND, x_ND) for p in parts]
    assert errors == sorted(errors, reverse=True)
    assert [p.share for p in parts] == sorted(p.share for p in parts)


def test_rotations_are_fitted_by_least_squares():
    t = np.arange(64)
    root = np.sqrt(1 / (t + 1))
    rotating, constant, mean, gain = _fit_rotations(FREQUENCIES, 64, fold=2)
    for pair, f in enumerate(FREQUENCIES):
        wanted = np.exp(-1j * f * t)
        columns = np.stack([np.exp(-1j * FREQUENCIES[pair // 2 * 2] * t), np.ones(64)], axis=1)
        both = np.linalg.lstsq(root[:, None] * columns, root * wanted, rcond=None)[0]
        one = np.linalg.lstsq(root[:, None] * columns[:, 1:], root * wanted, rcond=None)[0]
        np.testing.assert_allclose([rotating[pair], constant[pair], mean[pair]], [*both, *one], atol=1e-9)
        left = [np.square(np.abs(root * (c - wanted))).sum() / (root**2).sum() for c in (columns @ both, one)]
        assert gain[pair] == pytest.approx(left[1] - left[0])
