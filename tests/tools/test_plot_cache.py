"""The figure of cache against context."""

import sys

import pytest

from experiments.entry import compose_config
from mla_jax.errors import UsageError
from tools import plot_cache


def test_bytes_a_token_are_those_of_the_architecture_page():
    sizes = plot_cache.bytes_per_token(compose_config(["model=infinite_1b"]).model)
    assert sizes == {"multi-head": 122_880, "grouped-query": 122_880 // 4, "multi-head latent": 7_680}


def test_heads_that_cannot_be_grouped_are_refused():
    with pytest.raises(UsageError, match="4 heads must divide the width, 128, and be a multiple of 8"):
        plot_cache.bytes_per_token(compose_config([]).model)


def test_the_figure_is_the_same_each_time(tmp_path, monkeypatch):
    files = tmp_path / "one.svg", tmp_path / "two.svg"
    for file in files:
        monkeypatch.setattr(sys, "argv", ["plot_cache", str(file)])
        plot_cache.main()
    one, two = (file.read_bytes() for file in files)
    assert one == two and b"</svg>" in one
