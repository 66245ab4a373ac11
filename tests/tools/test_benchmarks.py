"""The benchmarks on a CPU: what they count, what they compare with, what they print."""

import json
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels_oracle import DecodeCase, attention_oracle
from latent_attention import UnavailableError, attention
from mla_jax.errors import UsageError
from tools.bench import attention as bench_attention
from tools.bench import decode as bench_decode
from tools.bench import float64, peers, report, timing
from tools.bench.timing import Timing

MILLION = 2**20


@pytest.fixture
def quick(monkeypatch):
    monkeypatch.setattr(timing, "SAMPLE_SECONDS", 1e-4)
    monkeypatch.setattr(timing, "SAMPLES", 3)
    monkeypatch.setattr(timing, "CALLS", 2)


def test_decode_shapes_count_the_cache_once():
    shape = bench_decode.Shape.parse("256+64x32:1x1M")
    assert shape == (256, 64, 32, 1, MILLION)
    assert str(shape) == "256+64, 32 heads, 1 x 1M"
    assert shape.cache_bytes("bfloat16") == 640 * MILLION
    assert shape.cache_bytes("int8") == (320 + 8) * MILLION
    assert shape.flops() == 2 * 32 * MILLION * (320 + 256)  # a score and an output for each head and token
    assert bench_decode.Shape.parse("512+64x16:128x8k").cache_bytes("bfloat16") == 2 * 576 * 128 * 8192
    for text in bench_decode.DEFAULT_SHAPES:
        bench_decode.Shape.parse(text)


def test_attention_shapes_count_half_of_the_pairs():
    shape = bench_attention.Shape.parse("128/128x32:1x4k")
    assert str(shape) == "qk 128, v 128, 32 heads, 1 x 4k"
    assert shape.flops(backward=False) == 4 * 4096**2 / 2 * 32 * 128
    assert shape.flops(backward=True) == 3.5 * shape.flops(backward=False)
    # Matrix products by hand: forward q k^T and p v; backward q k^T, d_out v^T, d_s k, d_s^T q, p^T d_out.
    products = {"forward": 192 + 128, "backward": 192 + 128 + 192 + 192 + 128}
    shape = bench_attention.Shape.parse("192/128x16:2x300")
    assert shape.flops(backward=False) == 2 * 2 * 16 * 300**2 / 2 * products["forward"]
    assert shape.flops(backward=True) == 2 * 2 * 16 * 300**2 / 2 * sum(products.values())
    for text in bench_attention.DEFAULT_SHAPES:
        bench_attention.Shape.parse(text)


@pytest.mark.parametrize("text", ["", "256+64", "256+64x32:8k", "256+64x32:1x8K", "256+64x32:1x8k:2"])
def test_other_shapes_are_refused(text):
    with pytest.raises(UsageError, match="is not WIDTH"):
        bench_decode.Shape.parse(text)
    with pytest.raises(UsageError, match="is not K/V"):
        bench_attention.Shape.parse(text)


@pytest.mark.parametrize("int8", [False, True], ids=["float32", "int8"])
def test_decode_in_float64_equals_the_oracle(int8):
    case = DecodeCase((80, 80), heads=3, page_size=16, pages_per_row=5, int8=int8)
    (q, c, k_rope, _), keywords = case.draw()
    out = float64.decode(q, c, k_rope, keywords.pop("block_table_BN"), **keywords)
    np.testing.assert_allclose(out, case.expected()[0], rtol=1e-12, atol=1e-15)


def test_attention_in_float64_equals_the_oracle_and_the_reference():
    rng = np.random.default_rng(0)
    q, k, v, d_out = (rng.normal(size=(1, 512, 1, width)).astype(np.float32) for width in (12, 12, 20, 20))
    out, *gradients = float64.attention(*(x[0, :, 0] for x in (q, k, v, d_out)), scale=0.3)
    np.testing.assert_allclose(out, attention_oracle(q, k, v, scale=0.3)[0][0, :, 0], rtol=1e-10, atol=1e-12)
    _, vjp = jax.vjp(lambda *x: attention(*x, scale=0.3, implementation="reference"), *map(jnp.asarray, (q, k, v)))
    for ours, theirs in zip(gradients, vjp(jnp.asarray(d_out)), strict=True):
        np.testing.assert_allclose(ours, theirs[0, :, 0], atol=1e-4)


def test_the_relative_error_is_of_the_whole():
    torch = pytest.importorskip("torch")
    expected = np.array([[3.0, 4.0]])
    assert float64.relative_error(jnp.array([3.0, 4.0]), expected) == 0
    assert float64.relative_error(torch.tensor([[3.0, 5.0]], dtype=torch.bfloat16), expected) == pytest.approx(0.2)


def test_a_sequence_has_enough_calls_and_whole_rounds_of_turns():
    assert timing.sequence("ab", 5) == list("ababab")
    assert timing.sequence("abc", 1) == list("abc")


@pytest.mark.parametrize("turns", [1, 3])
def test_timing_returns_the_result_of_the_first_turn(turns, quick):
    calls = []

    def step(x, turn):
        calls.append(turn)
        return x + turn, {"twice": 2 * turn}

    result, took = timing.time_jax(step, (jnp.float32(1),), [(jnp.float32(i),) for i in range(turns)])
    assert (float(result[0]), float(result[1]["twice"])) == (1, 0)
    assert len(calls) == 1  # traced once, whatever the number of calls
    assert took.seconds > 0 and took.spread >= 0


def test_xla_does_not_make_one_of_all_calls():
    x = jnp.ones((256, 256))

    def flops(shared, turns):
        compiled = timing.program(jnp.matmul).lower([x] * 8, shared, turns).compile()
        return compiled.cost_analysis()["flops"]

    once = 2 * 256**3
    assert flops((), [(x, x)] * 8) >= 8 * once
    assert flops((x, x), [()] * 8) < 2 * once  # what must be avoided


def row(name, seconds, peer=False, **more):
    return {"implementation": name, "peer": peer, "seconds": seconds, "reason": None, **more}


def test_the_table():
    rows = report.with_ratios(
        [row("ours", 2e-6), row("theirs", 5e-6, peer=True), row("none", None) | {"reason": "no GPU"}]
    )
    assert rows[0]["ratios"] == {"theirs": pytest.approx(2.5)} and rows[2]["ratios"] == {}
    text = report.table("a shape", {"us": lambda row: f"{row['seconds'] * 1e6:.1f}"}, rows)
    assert text.splitlines() == [
        "**a shape**",
        "",
        "|        |  us | theirs / this |",
        "| ------ | --: | ------------: |",
        "| ours   | 2.0 |          2.50 |",
        "| theirs | 5.0 |          1.00 |",
        "",
        "- none: no GPU",
    ]


def test_what_cannot_run_or_is_wrong_gets_no_time():
    def raising(error):
        def measure():
            raise error

        return report.measured("x", False, measure)

    assert raising(UnavailableError("needs a GPU"))["reason"] == "needs a GPU"
    assert raising(peers.PeerMissing("no file"))["reason"] == "no file"
    assert raising(RuntimeError("bad\nlaunch"))["reason"] == "failed: RuntimeError: bad launch"
    for error in (0.5, float("nan")):
        measured = report.measured("x", False, lambda error=error: (Timing(1.0, 0.1), error, {}))
        assert measured["seconds"] is None and measured["reason"].startswith("wrong: relative error")
    good = report.measured("x", False, lambda: (Timing(1.0, 0.1), 0.001, {"splits": 4}))
    assert (good["seconds"], good["reason"], good["splits"]) == (1.0, None, 4)


def run(monkeypatch, tool, *arguments):
    monkeypatch.setattr(sys, "argv", [tool.__name__, *map(str, arguments)])
    tool.main()


def test_bench_decode_runs_on_a_cpu(tmp_path, monkeypatch, capsys, quick):
    path = tmp_path / "new" / "decode.json"
    run(monkeypatch, bench_decode, "--shapes", "64+32x4:2x256", "--json", path, "--peers", tmp_path)
    results = json.loads(path.read_text())
    assert results["read_ceiling"] > 0 and results["provenance"]["packages"]["jax"] == jax.__version__
    timed = {r["implementation"]: r for r in results["rows"] if r["seconds"]}
    assert list(timed) == ["xla", "xla int8", "XLA einsums"]
    for r in timed.values():
        assert r["error"] < 5e-3 and r["error_to_16_bits"] < (0.02 if "int8" in r["implementation"] else 5e-3)
        assert r["bytes_a_second"] * r["seconds"] == pytest.approx(2 * 256 * (104 if r["cache"] == "int8" else 192))
        assert r["ratios"] == {"XLA einsums": timed["XLA einsums"]["seconds"] / r["seconds"]}
    printed = capsys.readouterr().out
    assert "**64+32, 4 heads, 2 x 256**" in printed and "XLA einsums / this" in printed
    assert "- mosaic: implementation='mosaic' cannot run decode" in printed


def test_bench_attention_runs_on_a_cpu(tmp_path, monkeypatch, capsys, quick):
    path = tmp_path / "attention.json"
    run(monkeypatch, bench_attention, "--shapes", "24/16x3:2x256", "--only", "xla", "--json", path)
    results = json.loads(path.read_text())
    assert [(r["implementation"], r["backward"]) for r in results["rows"]] == [("xla", False), ("xla", True)]
    for r in results["rows"]:
        assert 0 < r["error"] < 0.01 and r["of_ceiling"] * results["matmul_ceiling"] == pytest.approx(
            r["flop_a_second"]
        )
    assert "**qk 24, v 16, 3 heads, 2 x 256, forward and backward**" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [(["--shapes", "big"], "is not WIDTH"), (["--shapes", "64+32x4:1x100"], "100 tokens are no whole pages of 64")],
)
def test_what_the_user_gets_wrong_is_one_line(arguments, message, monkeypatch, capsys, quick):
    with pytest.raises(SystemExit) as exit_:
        run(monkeypatch, bench_decode, *arguments)
    assert exit_.value.code == 2
    assert message in capsys.readouterr().err
