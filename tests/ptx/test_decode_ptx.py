"""Split-KV decode for Hopper, the PTX of both its kernels interpreted, against float64."""

import dataclasses
import types

import numpy as np
import pytest
from jax.experimental.pallas import mosaic_gpu as plgpu

from kernels_oracle import DecodeCase, contiguous
from latent_attention.decode import mosaic
from latent_attention.gpu import make_gpu
from ptx import pallas
from ptx.pallas import interpreted

pytestmark = pytest.mark.ptx

NUM_SMS = 4
# Norm of the error over the norm, of each row [C] of the output; probabilities are rounded to these types.
TOLERANCE = {"bfloat16": 2e-2, "float16": 3e-3}
LENGTHS = DecodeCase((0, 1, 63, 64, 65, 300), heads=8, c_width=128, rope_width=64, page_size=64, pages_per_row=5)
AROUND_PAIRS = (0, 1, 63, 64, 65, 127, 128, 129, 200)
MANY_HEADS = DecodeCase(AROUND_PAIRS, heads=128, c_width=512, rope_width=64, page_size=64, dtype="bfloat16")


@pytest.fixture(autouse=True)
def on_the_interpreter(monkeypatch):
    monkeypatch.setattr(mosaic, "local_gpu", lambda: make_gpu((9, 0), NUM_SMS))
    monkeypatch.setattr(plgpu, "kernel", interpreted(plgpu.kernel, NUM_SMS))


def check(case: DecodeCase, config: mosaic.Config | None = None):
    arrays, keywords = case.draw()
    out, lse = mosaic.decode(*arrays, **{"scales_P2S": None} | keywords, config=config)
    expected, expected_lse = case.expected()
    errors = np.linalg.norm(np.asarray(out, np.float64) - expected, axis=-1)
    assert (errors <= TOLERANCE[case.dtype] * np.linalg.norm(expected, axis=-1)).all()
    np.testing.assert_allclose(lse, expected_lse, atol=0.02)


def rows_on_m(case: DecodeCase) -> mosaic.Config:
    blocks = -(-case.queries * case.heads // mosaic.ROWS_ON_M)
    return mosaic.Config(2, NUM_SMS // blocks, consumers=2, q_stages=1, rows_on_m=True)


@pytest.mark.parametrize("int8", [False, True])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_lengths_around_tiles(dtype, int8):
    check(dataclasses.replace(LENGTHS, dtype=dtype, int8=int8))


@pytest.mark.parametrize(
    "case",
    [
        MANY_HEADS,
        DecodeCase((600,), heads=40, c_width=256, rope_width=64, page_size=16, pages_per_row=40, dtype="float16"),
        contiguous((300, 64, 1, 0), 304, queries=2, heads=64, c_width=128, dtype="bfloat16"),
    ],
    ids=["128 heads", "pages of 16", "2 queries, contiguous"],
)
def test_rows_on_m(case):
    check(case, rows_on_m(case))


def test_rows_on_m_spill_no_registers_and_serialise_no_wgmma(monkeypatch):
    texts = []
    monkeypatch.setattr(
        pallas, "Machine", lambda ptx, *_: texts.append(ptx) or types.SimpleNamespace(run=lambda seed: None)
    )
    arrays, keywords = MANY_HEADS.draw()
    mosaic.decode(*arrays, **keywords, scales_P2S=None, config=rows_on_m(MANY_HEADS))
    said = pallas.ptxas(texts[0])
    assert "0 bytes spill stores, 0 bytes spill loads" in said
    assert "serialized" not in said
