"""The timeline of the fused decoder layer: what is made of its timestamps, and the figure."""

import json

import jax
import numpy as np
import pytest

from latent_attention.call_shapes import LayerShape
from latent_attention.decode_layer.timeline import CLOCKS, PHASES
from tools.bench import layer_timeline

SMALL = LayerShape(D=1536, Q=512, C=256, R=64, N=32, V=128, H=16, F=1536)


def made_stamps(steps=3, layers=4, ctas=5):
    """Timestamps of phases of 1, 2, 3, .. us at 2 GHz; a layer starts every 200 us, CTA i of it i us later.

    Consumer 1 ends each phase 0.1 us after consumer 0. Both clocks wrap around on the way.
    """
    step, layer, cta, wg, phase = np.ogrid[:steps, :layers, :ctas, :2, : len(PHASES)]
    us = phase * (phase + 1) / 2 + 0.1 * wg * (phase > layer_timeline.START)
    cycles = 2000 * us + 2.0**32 - 5000 + 1_000_000 * cta
    ns = 1000 * (us + cta) + 200_000 * layer + 5e6 * step + 2.0**32 - 300_000
    clocks = np.broadcast_arrays(cycles, ns)
    assert len(CLOCKS) == len(clocks)
    return np.stack(clocks, axis=-1).round().astype(np.int64).astype(np.uint32)


def test_timestamps_become_microseconds_since_the_previous_layer():
    found = layer_timeline.summarise(made_stamps())
    np.testing.assert_allclose(found["layer_us"], 200)
    np.testing.assert_allclose(found["us_per_cycle"], 1 / 2000, rtol=1e-6)
    start = layer_timeline.START * (layer_timeline.START + 1) / 2
    for i, name in enumerate(PHASES):
        expected = i * (i + 1) / 2 - start + 0.1 * (i > layer_timeline.START)
        np.testing.assert_allclose(found["end_us"][name], [expected] * 3, rtol=1e-5)


def test_percentiles_are_over_ctas():
    stamps = made_stamps(ctas=11)
    stamps[:, :, :, :, -1, 0] += 2000 * np.arange(11, dtype=np.uint32)[:, None]  # the last phase: i us longer
    found = layer_timeline.summarise(stamps)
    low, median, high = found["end_us"]["down"]
    scale = found["us_per_cycle"] * 2000  # a little under 1, as %globaltimer did not see the longer phase
    np.testing.assert_allclose([median - low, high - median], [4 * scale] * 2)


def test_results_are_drawn_without_a_gpu(tmp_path, call):
    found = layer_timeline.summarise(made_stamps())
    path = tmp_path / "made.json"
    path.write_text(json.dumps({"provenance": {}, "contexts": {"1k": found, "128k": found}}))
    code, out, err = call(layer_timeline, "--out", tmp_path / "figures", "--from", path)
    assert (code, err) == (0, "")
    assert "128k tokens: 200.0 us a layer" in out
    assert (tmp_path / "figures" / "decode_layer_timeline.png").read_bytes().startswith(b"\x89PNG")


def test_results_that_cannot_be_read_are_named(tmp_path, call):
    (tmp_path / "broken.json").write_text("{")
    for name in ("missing.json", "broken.json"):
        code, _, err = call(layer_timeline, "--out", tmp_path / "figures", "--from", tmp_path / name)
        assert code == 1 and name in err and len(err.splitlines()) == 1
    assert not (tmp_path / "figures").exists()


def test_every_phase_has_a_bar():
    found = layer_timeline.summarise(made_stamps())
    (axes,) = layer_timeline.draw({"contexts": {"1k": found}}).axes
    assert [label.get_text() for label in axes.get_yticklabels()] == list(PHASES[layer_timeline.START + 1 :])
    np.testing.assert_allclose(
        [bar.get_width() for bar in axes.patches], [i + 0.1 * (i == 2) for i in range(2, len(PHASES))], rtol=1e-5
    )


@pytest.mark.parametrize("int8", [False, True])
def test_the_layers_lower_for_an_h200(int8):
    inputs = jax.eval_shape(lambda: layer_timeline.make_inputs(SMALL, 1024, int8))
    h200 = jax.sharding.AbstractDevice(device_kind="NVIDIA H200", platform="gpu", num_cores=132)
    with jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh((), (), abstract_device=h200)):
        traced = jax.jit(layer_timeline.step, static_argnums=0).trace(SMALL, *inputs)
        text = traced.lower(lowering_platforms=("cuda",)).as_text()
    assert text.count("call @layer") == layer_timeline.LAYERS and "mosaic_gpu" in text
    caches, workspace, timelines = traced.out_info
    assert jax.tree.map(lambda x: (x.shape, x.dtype), (caches, workspace)) == jax.tree.map(
        lambda x: (x.shape, x.dtype), inputs[:2]
    )
    assert [x.shape for x in timelines] == [(132, 2, len(PHASES), len(CLOCKS))] * layer_timeline.LAYERS


def test_without_a_hopper_gpu_it_says_so(tmp_path, call):
    code, _, err = call(layer_timeline, "--out", tmp_path)
    assert code == 1 and "it is for Hopper GPUs" in err and len(err.splitlines()) == 1
    assert list(tmp_path.iterdir()) == []
