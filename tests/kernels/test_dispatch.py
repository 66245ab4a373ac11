"""Which implementation runs, and what is said when it cannot."""

import jax
import jax.numpy as jnp
import pytest

import latent_attention
from latent_attention import UnavailableError, resolve

SHAPE = {"batch": 1, "heads": 2, "queries": 8, "keys": 8}
VARIABLE = "LATENT_ATTENTION_IMPLEMENTATION"


@pytest.fixture(autouse=True)
def no_environment(monkeypatch):
    monkeypatch.delenv(VARIABLE, raising=False)


def test_the_argument_goes_before_the_environment(monkeypatch):
    assert resolve("auto", **SHAPE) == "xla"
    monkeypatch.setenv(VARIABLE, "reference")
    assert resolve("auto", **SHAPE) == "reference"
    assert resolve("xla", **SHAPE) == "xla"
    monkeypatch.setenv(VARIABLE, "auto")
    assert resolve("auto", **SHAPE) == "xla"


def test_the_ops_run_what_is_resolved(monkeypatch):
    def ran(op, *arrays):
        return " ".join(str(jax.make_jaxpr(lambda *x: op(*x, scale=1.0))(*arrays)).split())

    x, c, lengths = jnp.ones((1, 8, 2, 4)), jnp.ones((1, 8, 2)), jnp.array([8])
    calls = (latent_attention.attention, x, x, x), (latent_attention.decode, x, c, c, lengths)
    by_xla = [ran(*call) for call in calls]
    monkeypatch.setenv(VARIABLE, "reference")
    assert all("HIGHEST" in ran(*call) and "HIGHEST" not in xla for call, xla in zip(calls, by_xla, strict=True))


def test_an_unknown_name_is_refused_with_the_known_ones(monkeypatch):
    with pytest.raises(UnavailableError, match=r"implementation='flash' is unknown; known: auto, xla, reference"):
        resolve("flash", **SHAPE)
    monkeypatch.setenv(VARIABLE, "flash")
    with pytest.raises(UnavailableError, match=f"{VARIABLE}='flash' is unknown"):
        resolve("auto", **SHAPE)


def test_the_reference_says_why_it_cannot_run():
    with pytest.raises(UnavailableError, match=r"cannot run: it would hold 128\.0 GiB of scores"):
        resolve("reference", batch=1, heads=32, queries=32768, keys=32768)


def test_shapes_that_do_not_fit_are_named():
    x = jnp.ones((1, 8, 2, 4))
    with pytest.raises(ValueError, match=r"k \(1, 8, 1, 4\)"):
        latent_attention.attention(x, x[:, :, :1], x, scale=1.0)
    with pytest.raises(ValueError, match="together"):
        latent_attention.attention(x, x, x, scale=1.0, q_segments=jnp.ones((1, 8), int))
    with pytest.raises(ValueError, match="W = C"):
        latent_attention.decode(x, x[:, :, 0], x[:, :, 0], jnp.ones(1, int), scale=1.0)
