import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mla_jax.config import OptimConfig, StageConfig
from mla_jax.optim import apply_updates, learning_rate, make_optimizer

STAGES = [
    StageConfig(seq_len=8, batch_size=1, steps=10, learning_rate=1.0),
    StageConfig(seq_len=16, batch_size=1, steps=30, learning_rate=0.5),
]


def _rates(**kwargs):
    config = OptimConfig(name="adamw", **kwargs)
    return [learning_rate(config, STAGES, s, i) for s, stage in enumerate(STAGES) for i in range(stage.steps)]


def test_constant_rate_is_each_stages_own_after_warmup():
    rates = _rates(schedule="constant", warmup_steps=4)
    np.testing.assert_allclose(rates, [0.25, 0.5, 0.75] + [1.0] * 7 + [0.5] * 30)


def test_cosine_starts_at_the_peak_and_ends_near_the_final_ratio():
    rates = _rates(schedule="cosine", final_ratio=0.1)
    assert rates[0] == 1.0
    assert rates[20] == pytest.approx(0.5 * (0.1 + 0.9 * 0.5))
    assert 0.5 * 0.1 <= rates[-1] < 0.5 * 0.11


def test_wsd_is_flat_then_falls_linearly():
    rates = _rates(schedule="wsd", decay_fraction=0.25)
    np.testing.assert_allclose(rates[10:31], 0.5)
    np.testing.assert_allclose(np.diff(rates[30:]), -0.05)
    assert rates[-1] == pytest.approx(0.05)


def _params():
    rng = np.random.default_rng(0)
    shapes = {"embed_tokens": (6, 4), "norm": (4,), "layers": {"w": (2, 4, 8), "input_layernorm": (2, 4)}}
    return jax.tree.map(
        lambda s: jnp.asarray(rng.normal(size=s), jnp.float32), shapes, is_leaf=lambda s: type(s) is tuple
    )


def test_adamw_equals_torch():
    torch = pytest.importorskip("torch")
    config = OptimConfig(name="adamw", weight_decay=0.1, clip_norm=0.5)
    params, optimizer = _params(), make_optimizer(config)
    names = ["embed_tokens", "layers/input_layernorm", "layers/w", "norm"]
    decays = {"embed_tokens", "layers/w"}
    theirs = {
        n: torch.nn.Parameter(torch.tensor(np.array(x))) for n, x in zip(names, jax.tree.leaves(params), strict=True)
    }
    groups = [{"params": [p], "weight_decay": 0.1 if n in decays else 0.0} for n, p in theirs.items()]
    reference = torch.optim.AdamW(groups, lr=0.01, betas=(config.b1, config.b2), eps=config.eps)
    state = optimizer.init(params)
    for step in range(5):
        grads = jax.tree.map(lambda p, k=step: jnp.sin(p * (k + 1)), params)
        for p, g in zip(theirs.values(), jax.tree.leaves(grads), strict=True):
            p.grad = torch.tensor(np.array(g))
        torch.nn.utils.clip_grad_norm_(theirs.values(), 0.5)
        reference.step()
        updates, state = optimizer.update(grads, state, params)
        params = apply_updates(params, updates, 0.01)
    for ours, p in zip(jax.tree.leaves(params), theirs.values(), strict=True):
        np.testing.assert_allclose(ours, p.detach().numpy(), rtol=2e-5, atol=1e-6)


def test_muon_orthogonalises_each_layers_matrix_and_leaves_the_rest_to_adam():
    params = _params()
    optimizer = make_optimizer(OptimConfig(name="muon", weight_decay=0.0, adam_lr_ratio=0.25, clip_norm=1e9))
    grads = jax.tree.map(jnp.cos, params)
    updates, _ = optimizer.update(grads, optimizer.init(params), params)
    for w in updates["layers"]["w"]:
        singular = np.linalg.svd(w / np.sqrt(8 / 4), compute_uv=False)  # Muon scales by sqrt(out / in)
        assert np.all((0.6 < singular) & (singular < 1.3))
    for name in ("embed_tokens", "norm"):  # Adam's first step has one size and the sign of the gradient
        sizes = -np.asarray(updates[name]) * np.sign(grads[name])
        assert sizes.min() > 0.2
        np.testing.assert_allclose(sizes, sizes.min(), rtol=1e-4)
