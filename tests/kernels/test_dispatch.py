"""Which implementation runs, and what is said when it cannot."""

import sys

import jax
import jax.numpy as jnp
import pytest

import latent_attention
from latent_attention import IMPLEMENTATIONS, UnavailableError, choices, dispatch, resolve
from latent_attention.call_shapes import AttentionShape, DecodeShape
from latent_attention.dispatch import ENVIRONMENT
from latent_attention.gpu import make_gpu

SHAPES = {
    "attention": AttentionShape(1, 8, 8, 2, 4, 4, "float32", False, False, 0),
    "decode": DecodeShape(1, 1, 2, 64, 32, 1, 8, "float32", "float32", False),
}
OPS = list(SHAPES)


@pytest.fixture(autouse=True)
def no_environment(monkeypatch):
    for variable in ENVIRONMENT.values():
        monkeypatch.delenv(variable, raising=False)


@pytest.mark.parametrize("op", OPS)
def test_the_argument_goes_before_the_environment(op, monkeypatch):
    shape = SHAPES[op]
    assert resolve(op, "auto", shape) == "xla"
    monkeypatch.setenv(ENVIRONMENT[op], "reference")
    assert resolve(op, "auto", shape) == "reference"
    assert resolve(op, "xla", shape) == "xla"
    monkeypatch.setenv(ENVIRONMENT[op], "auto")
    assert resolve(op, "auto", shape) == "xla"


def test_the_ops_run_what_is_resolved(monkeypatch):
    def ran(op, *arrays):
        return " ".join(str(jax.make_jaxpr(lambda *x: op(*x, scale=1.0))(*arrays)).split())

    x, c, lengths = jnp.ones((1, 8, 2, 4)), jnp.ones((1, 8, 2)), jnp.array([8])
    calls = (latent_attention.attention, x, x, x), (latent_attention.decode, x, c, c, lengths)
    by_xla = [ran(*call) for call in calls]
    for variable in ENVIRONMENT.values():
        monkeypatch.setenv(variable, "reference")
    assert all("HIGHEST" in ran(*call) and "HIGHEST" not in xla for call, xla in zip(calls, by_xla, strict=True))


@pytest.mark.parametrize("op", OPS)
def test_an_unknown_name_is_refused_with_the_known_ones(op, monkeypatch):
    with pytest.raises(
        UnavailableError, match=rf"implementation='flash' is unknown for {op}; known: auto, \w+, triton"
    ):
        resolve(op, "flash", SHAPES[op])
    monkeypatch.setenv(ENVIRONMENT[op], "flash")
    with pytest.raises(UnavailableError, match=f"{ENVIRONMENT[op]}='flash' is unknown"):
        resolve(op, "auto", SHAPES[op])


def test_the_reference_says_why_it_cannot_run():
    with pytest.raises(UnavailableError, match=r"cannot run attention: it would hold 128\.0 GiB of scores"):
        resolve("attention", "reference", SHAPES["attention"]._replace(heads=32, queries=32768, keys=32768))
    with pytest.raises(UnavailableError, match=r"cannot run decode: it would hold 8\.0 GiB of scores"):
        shape = SHAPES["decode"]._replace(batch=2, heads=16, queries=4, page_size=64, pages_per_row=1 << 18)
        resolve("decode", "reference", shape)


def test_shapes_that_do_not_fit_are_named():
    x = jnp.ones((1, 8, 2, 4))
    with pytest.raises(ValueError, match=r"k \(1, 8, 1, 4\)"):
        latent_attention.attention(x, x[:, :, :1], x, scale=1.0)
    with pytest.raises(ValueError, match="together"):
        latent_attention.attention(x, x, x, scale=1.0, q_segments=jnp.ones((1, 8), int))
    with pytest.raises(ValueError, match="one type"):
        latent_attention.attention(x, x.astype("bfloat16"), x, scale=1.0)
    with pytest.raises(ValueError, match=r"k has the shape \(1, 8, 4\)"):
        latent_attention.attention(x, x[:, :, 0], x, scale=1.0)
    with pytest.raises(ValueError, match=r"kv_lengths is int32 \(2,\), expected int32 \(1,\)"):
        latent_attention.attention(x, x, x, scale=1.0, kv_lengths=jnp.ones(2, int))
    with pytest.raises(ValueError, match=r"kv_segments is int32 \(1, 7\)"):
        latent_attention.attention(
            x, x, x, scale=1.0, q_segments=jnp.ones((1, 8), int), kv_segments=jnp.ones((1, 7), int)
        )
    with pytest.raises(ValueError, match="W = C"):
        latent_attention.decode(x, x[:, :, 0], x[:, :, 0], jnp.ones(1, int), scale=1.0)


@pytest.mark.parametrize("op", OPS)
def test_a_gpu_gets_the_fastest_that_has_no_reason_against_it(op, monkeypatch):
    first, second, *_ = IMPLEMENTATIONS[op]
    reasons = {}
    monkeypatch.setattr(dispatch, "_why_not", lambda op, name, shape, gpu: reasons.get(name))
    monkeypatch.setattr(dispatch, "local_gpu", lambda: make_gpu((9, 0), 132))
    assert resolve(op, "auto", SHAPES[op]) == first
    reasons[first] = "it does not want to"
    assert resolve(op, "auto", SHAPES[op]) == second
    with pytest.raises(UnavailableError, match=f"implementation='{first}' cannot run {op}: it does not want to"):
        resolve(op, first, SHAPES[op])
    reasons[second] = "neither"
    assert resolve(op, "auto", SHAPES[op]) == "xla"
    # Below Ampere Triton has no tensor cores: it can be asked for, but is not chosen.
    reasons.clear()
    monkeypatch.setattr(dispatch, "local_gpu", lambda: make_gpu((7, 5), 40))
    assert resolve(op, "auto", SHAPES[op]) == "xla"
    assert resolve(op, "triton", SHAPES[op]) == "triton"


def test_what_auto_chose_is_kept_with_the_reasons_against_what_is_faster(monkeypatch):
    monkeypatch.setattr(dispatch, "_choices", {"attention": {}, "decode": {}})
    monkeypatch.setattr(dispatch, "local_gpu", lambda: make_gpu((9, 0), 132))
    monkeypatch.setattr(dispatch, "_why_not", lambda op, name, *_: None if name == "xla" else f"no {name} here")
    assert resolve("attention", "xla", SHAPES["attention"]) == "xla" and choices("attention") == {}
    resolve("attention", "auto", SHAPES["attention"])
    assert choices("attention") == {"xla": {"cudnn": "no cudnn here", "triton": "no triton here"}}
    assert choices("decode") == {}


@pytest.mark.parametrize("op", OPS)
def test_on_a_cpu_every_implementation_says_whether_it_can_run(op):
    reasons = {name: dispatch._why_not(op, name, SHAPES[op], None) for name in IMPLEMENTATIONS[op]}
    assert {name for name, reason in reasons.items() if reason is None} == {"xla", "reference"}
    assert all("GPU" in reason for reason in reasons.values() if reason is not None)


@pytest.mark.parametrize(
    ("replaced", "words"),
    [
        ({"k_rope_PSR": jnp.ones((3, 8, 32), jnp.float16)}, "k_rope is float16"),
        ({"c_PSC": jnp.ones((3, 8, 64), jnp.int8), "k_rope_PSR": jnp.ones((3, 8, 32), jnp.int8)}, "not given"),
        ({"scales_P2S": jnp.ones((3, 2, 8))}, "are given"),
        ({"block_table_BN": jnp.ones((2, 1), int)}, r"block_table \(2, 1\)"),
        ({"block_table_BN": None}, "P = B without"),
        ({"lengths_B": jnp.ones(2, int)}, r"lengths is int32 \(2,\), expected int32 \(1,\)"),
        ({"lengths_B": jnp.ones(1)}, "lengths is float32"),
        ({"q_BTHW": jnp.ones((1, 2, 96))}, r"q has the shape \(1, 2, 96\), expected 4 dimensions"),
        ({"k_rope_PSR": jnp.ones((3, 9, 32))}, r"k_rope \(3, 9, 32\)"),
    ],
)
def test_what_decode_is_given_must_fit_together(replaced, words):
    arrays = {
        "q_BTHW": jnp.ones((1, 1, 2, 96)), "c_PSC": jnp.ones((3, 8, 64)), "k_rope_PSR": jnp.ones((3, 8, 32)),
        "lengths_B": jnp.ones(1, int), "block_table_BN": jnp.ones((1, 2), int),
    }  # fmt: skip
    latent_attention.decode(**arrays, scale=1.0)
    with pytest.raises(ValueError, match=words):
        latent_attention.decode(**arrays | replaced, scale=1.0)


def test_an_implementation_that_does_not_load_is_passed_over(monkeypatch):
    shape = DecodeShape(1, 1, 32, 256, 64, 1, 8192, "bfloat16", "bfloat16", False)
    gpu = make_gpu((9, 0), 132)
    monkeypatch.setattr(dispatch, "local_gpu", lambda: gpu)
    monkeypatch.setitem(sys.modules, "latent_attention.decode.mosaic", None)
    monkeypatch.setattr("latent_attention.jax_triton_loader.why_not", lambda: None)
    assert resolve("decode", "auto", shape) == "triton"
    with pytest.raises(UnavailableError, match=f"it does not load with jax {jax.__version__}"):
        resolve("decode", "mosaic", shape)


def test_int8_scales_have_the_shape_of_the_pages():
    x = jnp.ones((3, 8, 64), jnp.int8)
    with pytest.raises(ValueError, match=r"scales \(3, 8\) are not P2S \(3, 2, 8\)"):
        latent_attention.decode(
            jnp.ones((3, 1, 2, 96)), x, x[..., :32], jnp.ones(3, int), scale=1.0, scales_P2S=jnp.ones((3, 8))
        )
