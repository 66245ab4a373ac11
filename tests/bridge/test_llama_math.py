"""The two decompositions alone, in float64: joint low-rank factors with a norm between them, decoupled rotary keys."""

import numpy as np
import pytest

from mla_jax.bridge.llama.low_rank import low_rank_factors, rms_normalize, second_moment
from mla_jax.bridge.llama.refit import follow, refit
from mla_jax.bridge.llama.rope import decouple

D = 24
RNG = np.random.default_rng(5)
FIRST = RNG.bit_generator.state


@pytest.fixture(autouse=True)
def same_draws():
    """Whichever tests ran before: some of what is asserted holds for most draws, not for all."""
    RNG.bit_generator.state = FIRST


@pytest.fixture(scope="module")
def x_ND():
    """Inputs with |x|^2 = D, most of whose energy is in few directions that are no axes."""
    rng = np.random.default_rng(7)
    spread = rng.normal(size=(D, D)) * np.geomspace(1, 0.02, D)[:, None]
    return rms_normalize(rng.normal(size=(4000, D)) @ spread)


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


def scores(q_HND, k_GND, x_TD, positions_T, parts=None, slots=FREQUENCIES):
    """[H, T, T], of the source or of its decoupled parts."""
    out = []
    for h in range(HEADS):
        q, k = x_TD @ q_HND[h].T, x_TD @ k_GND[h * GROUPS // HEADS].T
        if parts is None:
            out.append(rotated(q, positions_T, FREQUENCIES) @ rotated(k, positions_T, FREQUENCIES).T)
        else:
            q_rope, k_rope = (rotated(x_TD @ w.T, positions_T, slots) for w in (parts.q_rope_HRD[h], parts.k_rope_RD))
            out.append(q @ (x_TD @ parts.k_nope_GND[h * GROUPS // HEADS].T).T + q_rope @ k_rope.T)
    return np.array(out)


def projections(groups):
    return RNG.normal(size=(HEADS, N, D)), RNG.normal(size=(groups, N, D))


def slots_of(width, theta=THETA):
    return theta ** (-np.arange(0, width, 2) / width)


@pytest.mark.parametrize("width", [2, 4, 8])
def test_without_distance_the_parts_add_up(width, x_ND):
    q_HND, k_GND = projections(GROUPS)
    parts = decouple(q_HND, k_GND, second_moment(x_ND), FREQUENCIES, slots_of(width), 1)
    nowhere = np.zeros(20)
    np.testing.assert_allclose(
        scores(q_HND, k_GND, x_ND[:20], nowhere, parts, slots_of(width)),
        scores(q_HND, k_GND, x_ND[:20], nowhere),
        atol=1e-9,
    )


def test_one_key_head_loses_nothing(x_ND):
    q_HND, k_1ND = projections(1)
    parts = decouple(q_HND, k_1ND, second_moment(x_ND), FREQUENCIES, FREQUENCIES, 64)
    assert parts.share == pytest.approx(1)
    assert np.abs(parts.k_nope_GND).max() < 1e-9
    both = (k_1ND.repeat(GROUPS, axis=0), x_ND[:20], np.arange(20))
    parts = parts._replace(k_nope_GND=parts.k_nope_GND.repeat(GROUPS, axis=0))
    np.testing.assert_allclose(scores(q_HND, *both, parts), scores(q_HND, *both), atol=1e-9)


def score_error(parts, q_HND, k_GND, x_ND, slots, length=64):
    """Mean squared error of scores over tokens, for the distances as they count."""
    total = 0.0
    for t in range(length):
        pairs = [x_ND[i : i + 2] for i in range(0, 100, 10)]
        where = np.array([t, 0])
        total += sum(
            np.square((scores(q_HND, k_GND, x, where, parts, slots) - scores(q_HND, k_GND, x, where))[:, 0, 1]).sum()
            for x in pairs
        ) / (t + 1)
    return total


@pytest.mark.parametrize("width", [4, 8])
def test_keys_without_position_are_better_damped_than_left_unrotated(width, x_ND):
    """Distance 1 alone is the papers' way: nothing is damped, and frequencies that share a component rotate alike."""
    q_HND, k_GND = projections(GROUPS)
    slots = slots_of(width)
    ours, stopped = (decouple(q_HND, k_GND, second_moment(x_ND), FREQUENCIES, slots, n, fit=False) for n in (64, 1))
    assert score_error(ours, q_HND, k_GND, x_ND, slots) < 0.8 * score_error(stopped, q_HND, k_GND, x_ND, slots)


def test_wider_rotary_keys_lose_less(x_ND):
    q_HND, k_GND = projections(GROUPS)
    widths = (2, 4, 8)
    parts = [decouple(q_HND, k_GND, second_moment(x_ND), FREQUENCIES, slots_of(width), 64) for width in widths]
    errors = [score_error(p, q_HND, k_GND, x_ND, slots_of(width)) for p, width in zip(parts, widths, strict=True)]
    assert errors == sorted(errors, reverse=True)
    assert [p.share for p in parts] == sorted(p.share for p in parts)


def share_by_hand(parts, q_HND, k_GND, moment_DD, slots, length):
    """The share of keys' variation with distance that is explained, from the keys at every distance, [G, P, T, D].

    Keys of pair i count by the energy of their queries. What the RoPE key gives back to them is found by least squares,
    with a constant, from its own rotations alone.
    """
    t = np.arange(length)
    weight_T = 1 / (t + 1) / (1 / (t + 1)).sum()
    root_DD = np.linalg.cholesky(moment_DD)
    q, k, k_rope = ((w[..., 0::2, :] + 1j * w[..., 1::2, :]) @ root_DD for w in (q_HND, k_GND, parts.k_rope_RD))
    columns = np.exp(-1j * t[:, None] * slots)[:, None, :] * k_rope.T[None]  # [T, D, S]
    constant = np.repeat(np.eye(len(root_DD))[None], length, axis=0)
    root_T = np.sqrt(weight_T)
    design = (root_T[:, None, None] * np.concatenate([columns, constant], axis=2)).reshape(
        -1, len(slots) + len(root_DD)
    )
    left = total = 0.0
    for g in range(len(k)):
        for p, f in enumerate(FREQUENCIES):
            energy = np.square(np.abs(q[g * HEADS // len(k) : (g + 1) * HEADS // len(k), p])).sum(-1).mean()
            wanted = np.exp(-1j * f * t)[:, None] * k[g, p]
            fitted = design @ np.linalg.lstsq(design, (root_T[:, None] * wanted).ravel(), rcond=None)[0]
            left += energy * np.square(np.abs((root_T[:, None] * wanted).ravel() - fitted)).sum()
            total += energy * np.square(np.abs(root_T[:, None] * (wanted - weight_T @ wanted))).sum()
    return 1 - left / total


@pytest.mark.parametrize("theta", [THETA, THETA**0.5], ids=["source's base", "its root"])
def test_slots_are_fitted_to_all_frequencies(theta, x_ND):
    q_HND, k_GND = projections(GROUPS)
    slots, moment_DD = slots_of(N, theta), second_moment(x_ND)
    begin, fitted = (decouple(q_HND, k_GND, moment_DD, FREQUENCIES, slots, 64, fit=fit) for fit in (False, True))
    assert fitted.share > begin.share
    assert score_error(fitted, q_HND, k_GND, x_ND, slots) < score_error(begin, q_HND, k_GND, x_ND, slots)
    # With these keys no use of them explains more than was found.
    best = share_by_hand(fitted, q_HND, k_GND, moment_DD, slots, 64)
    assert fitted.share <= best + 1e-9
    assert fitted.share == pytest.approx(best, abs=0.03)


def test_frequencies_that_look_alike_do_not_make_large_opposite_parts(x_ND):
    """Over 64 tokens most of these frequencies only grow with distance, each at its own rate."""
    q_HND, k_GND = projections(GROUPS)
    slow = 1e5 ** (-np.arange(0, N, 2) / N)
    parts = decouple(q_HND, k_GND, second_moment(x_ND), slow, slow, 64)
    rope, source = ((x_ND[:100] @ k.reshape(-1, D).T) for k in (parts.k_rope_RD, k_GND))
    q_rope, q = ((x_ND[:100] @ w.reshape(-1, D).T) for w in (parts.q_rope_HRD, q_HND))
    assert np.abs(q_rope).max() * np.abs(rope).max() < 5 * np.abs(q).max() * np.abs(source).max()
    assert np.abs(parts.k_nope_GND).max() < 3 * np.abs(k_GND).max()


def with_constant(x_ND):
    """Inputs with |x|^2 = D that have a direction which varies little."""
    return rms_normalize(x_ND + 1.5 * (1 + 0.02 * RNG.normal(size=(len(x_ND), 1))) * RNG.normal(size=D))


def test_a_constant_latent_keeps_the_length(x_ND):
    x_ND = with_constant(x_ND)
    w_YD = RNG.normal(size=(40, D))
    arguments = w_YD, w_YD.T @ w_YD, x_ND, second_moment(x_ND), 8
    plain, ours = (low_rank_factors(*arguments, constant=constant) for constant in (False, True))
    assert ours.rms_variation < 0.3 * plain.rms_variation
    assert errors_Y(w_YD, ours, x_ND).sum() < 0.97 * errors_Y(w_YD, plain, x_ND).sum()
    # Spread over all latents: none is much longer than the others.
    lengths_R = np.sqrt(np.square(x_ND @ ours.down_RD.T).mean(0))
    assert lengths_R.max() < 3 * lengths_R.min()


def test_inputs_without_a_constant_do_without_its_latent(x_ND):
    w_YD = RNG.normal(size=(40, D))
    arguments = w_YD, w_YD.T @ w_YD, x_ND - x_ND.mean(0), second_moment(x_ND), 8
    plain, ours = (low_rank_factors(*arguments, constant=constant) for constant in (False, True))
    np.testing.assert_allclose(ours.up_YR @ ours.down_RD, plain.up_YR @ plain.down_RD)


def test_a_bias_is_found(x_ND):
    """A bias on inputs that have a constant direction is linear in them: rank 2 has room for it."""
    x_ND = with_constant(x_ND)
    w_YD = np.outer(np.ones(3), np.linalg.solve(second_moment(x_ND), x_ND.mean(0)))
    made = low_rank_factors(w_YD, w_YD.T @ w_YD, x_ND, second_moment(x_ND), 2)
    assert errors_Y(w_YD, made, x_ND).sum() < 1e-2 * np.square(x_ND @ w_YD.T).mean(0).sum()


def test_least_squares_bring_back_what_a_linear_map_took(x_ND):
    lost_DD = np.eye(D) + 0.1 * RNG.normal(size=(D, D))
    seen_ND = x_ND @ lost_DD.T
    before = np.square(seen_ND - x_ND).sum()
    assert np.square(seen_ND @ follow(seen_ND, x_ND).T - x_ND).sum() < 0.05 * before
    w_DY = RNG.normal(size=(D, 7))
    before = np.square(seen_ND @ w_DY - x_ND @ w_DY).sum()
    h_NY = RNG.normal(size=(len(x_ND), 7))
    refitted_DY = refit(w_DY, seen_ND, h_NY, h_NY + x_ND @ w_DY)
    assert np.square((seen_ND @ refitted_DY) - x_ND @ w_DY).sum() < 0.05 * before


def test_least_squares_change_nothing_that_is_right(x_ND):
    np.testing.assert_allclose(follow(x_ND, x_ND), np.eye(D), atol=1e-12)
    w_DY = RNG.normal(size=(D, 7)).astype(np.float32)
    h_NY = RNG.normal(size=(len(x_ND), 7))
    np.testing.assert_allclose(refit(w_DY, x_ND, h_NY, h_NY + x_ND @ w_DY), w_DY, atol=1e-6)


def test_least_squares_leave_alone_what_only_these_texts_have():
    """More directions than rows, and nothing to find in them: a fit would be to noise."""
    x_ND, y_ND = RNG.normal(size=(2, 40, D))
    np.testing.assert_array_equal(follow(x_ND, x_ND + y_ND), np.eye(D))


def test_tokens_count_by_their_hidden_states_inverse(x_ND):
    """One token a hundred times as long as the others does not decide the fit."""
    w_DY, lost_DY = RNG.normal(size=(2, D, 7))
    wanted_NY = x_ND @ w_DY
    long_N = np.arange(len(x_ND)) % 64 == 0
    seen_ND = np.where(long_N[:, None], 100 * x_ND[::-1], x_ND)
    wanted_NY[long_N] = 100 * RNG.normal(size=(long_N.sum(), 7))
    refitted_DY = refit(lost_DY, seen_ND, 0 * wanted_NY, wanted_NY)
    others = ~long_N
    error = np.square(seen_ND[others] @ refitted_DY - wanted_NY[others]).sum()
    assert error < 0.1 * np.square(wanted_NY[others]).sum()
