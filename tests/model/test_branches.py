"""One pass over a prompt with branches computes what a pass over each prompt and continuation does."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from branch_rows import Prompt, branch_rows, log_probs_of_ordinary_rows, ordinary_rows, random_prompt
from mla_jax.losses.branch_log_probs import branch_log_probs
from mla_jax.model.branches import Branches
from mla_jax.model.transformer import bind
from tiny import MODEL, random_params

CONFIG = dataclasses.replace(MODEL, initializer_range=0.3, q_lora_rank=12, tie_word_embeddings=False, rope_theta=100.0)
LENGTH, SIZE = 48, 24
RNG = np.random.default_rng(0)
CASES = {
    "one pair": (False, [[random_prompt(RNG, 25, 12, 12)]]),  # both regions are full
    "padding, ragged branches": (False, [[random_prompt(RNG, 9, 5, 7)], [random_prompt(RNG, 20, 11, 1)]]),
    "several pairs of a prompt": (False, [[random_prompt(RNG, 20, 3, 4, 5, 2, 1, 6)], [random_prompt(RNG, 20, 3, 4)]]),
    "prompts of one token": (False, [[random_prompt(RNG, 1, 12, 5)]]),  # nothing of them is in the prompt region
    "packed": (True, [[random_prompt(RNG, n, 2, 3) for n in (7, 1, 12)], [random_prompt(RNG, 20, 4, 5, 6, 3)]]),
    "an empty branch and an empty row": (True, [[random_prompt(RNG, 5, 0, 3), random_prompt(RNG, 3, 2, 2)], []]),
}


PARAMS = random_params(CONFIG)


@functools.partial(jax.jit, static_argnums=(0, 3))
def in_one_pass(config, params, rows, packed, weights):
    """Gradients of a loss in which every target counts differently, and the log-probs, 0 on padding."""

    def loss(params):
        found = branch_log_probs(bind(config, params), rows, SIZE, packed, chunk=5).log_probs_BR
        found = jnp.where(rows["targets"][:, -SIZE:] > 0, found, 0)
        return jnp.sum(found * weights), found

    return jax.grad(loss, has_aux=True)(params)


@functools.partial(jax.jit, static_argnums=0)
def in_two_passes(config, params, rows, weights):
    def loss(params):
        found = log_probs_of_ordinary_rows(bind(config, params), rows)
        return jnp.sum(found * weights), found

    return jax.grad(loss, has_aux=True)(params)


def assert_close(a, b):
    np.testing.assert_allclose(a, b, atol=1e-6 + 2e-5 * np.abs(b).max())


@pytest.mark.parametrize(("packed", "prompts"), CASES.values(), ids=CASES)
def test_log_probs_and_gradients_are_those_of_two_passes(packed, prompts):
    prompts = [*prompts, []][:2]  # so that all cases have one shape
    rows = branch_rows(prompts, LENGTH, SIZE)
    weights = np.random.default_rng(1).normal(size=(len(prompts), SIZE))
    expected_grads, expected = in_two_passes(CONFIG, PARAMS, ordinary_rows(prompts, SIZE, 10, LENGTH), weights)
    grads, found = in_one_pass(CONFIG, PARAMS, rows, packed, weights)
    assert np.count_nonzero(expected) == sum(len(x) for row in prompts for p in row for x in p.branches)
    assert_close(found, expected)
    assert all(np.any(x) for x in jax.tree.leaves(expected_grads))
    jax.tree.map(assert_close, grads, expected_grads)


REMAT = {
    "full": {"remat": "full", "mlp_chunk": 16},
    "dots": {"remat": "dots"},
    "names": {"remat": "names", "saved": ("latent_attention", "queries", "latents", "gate"), "unroll": -1},
}


@pytest.mark.parametrize("changes", REMAT.values(), ids=REMAT)
def test_what_the_backward_pass_recomputes_changes_nothing(changes):
    packed, prompts = CASES["padding, ragged branches"]
    rows = branch_rows(prompts, LENGTH, SIZE)
    weights = np.ones((len(prompts), SIZE))
    expected, _ = in_one_pass(CONFIG, PARAMS, rows, packed, weights)
    found, _ = in_one_pass(dataclasses.replace(CONFIG, **changes), PARAMS, rows, packed, weights)
    jax.tree.map(assert_close, found, expected)


def test_a_token_sees_its_prompt_and_its_branch_up_to_itself():
    """Which hidden states change with a token: all that the definition of branches says, and no other."""
    prompts = [[random_prompt(RNG, 4, 2, 3), random_prompt(RNG, 6, 2, 2)]]
    rows = branch_rows(prompts, LENGTH, SIZE)
    branches = Branches(rows["prompts"], rows["branches"], SIZE, packed=True)

    @functools.partial(jax.vmap, in_axes=0)
    def hidden(tokens):
        return bind(CONFIG, PARAMS)(tokens[None], rows["positions"], branches=branches)[0]

    changed = np.tile(rows["tokens"], (LENGTH, 1))
    changed[np.arange(LENGTH), np.arange(LENGTH)] = 511 - changed[np.arange(LENGTH), np.arange(LENGTH)]
    h = jax.jit(hidden)(np.concatenate([rows["tokens"], changed]))
    sees = np.any(np.asarray(h[1:] != h[0]), axis=-1).T  # [query, key]
    prompt, branch = rows["prompts"][0], rows["branches"][0]
    t, s = np.mgrid[:LENGTH, :LENGTH]
    same_prompt, in_prompt = prompt[:, None] == prompt, s < LENGTH - SIZE
    expected = np.where(
        in_prompt, same_prompt & ((t >= LENGTH - SIZE) | (s <= t)), (branch[:, None] == branch) & (s <= t)
    )
    np.testing.assert_array_equal(sees[prompt > 0], expected[prompt > 0])


def test_positions_must_be_given():
    rows = branch_rows([[Prompt([1, 2], [[3], [4]])]], LENGTH, SIZE)
    branches = Branches(rows["prompts"], rows["branches"], SIZE, packed=False)
    with pytest.raises(ValueError, match="positions_BT must be given with branches"):
        bind(CONFIG, PARAMS)(rows["tokens"], branches=branches)
