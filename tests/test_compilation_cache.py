"""Compiled programs outlive their process; a folder that cannot keep them is no reason not to train."""

import os
import time
from collections import Counter

import jax
import pytest
from jax.experimental.compilation_cache.compilation_cache import reset_cache

from mla_jax.compilation_cache import KEEP_DAYS, keep_compiled
from tiny import make_config, train


@pytest.fixture
def own_cache(monkeypatch):
    """JAX's settings are as in a fresh process, and afterwards as before."""
    names = ("jax_compilation_cache_dir", "jax_persistent_cache_min_compile_time_secs")
    before = {name: getattr(jax.config, name) for name in names}
    monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR", raising=False)
    jax.config.update("jax_compilation_cache_dir", None)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    reset_cache()
    yield
    for name, value in before.items():
        jax.config.update(name, value)
    reset_cache()


def test_a_requeued_run_compiles_nothing_that_an_earlier_one_did(own_cache, tmp_path):
    events = Counter()
    jax.monitoring.register_event_listener(lambda event, **_: events.update([event.rsplit("/", 1)[-1]]))
    keep_compiled(str(tmp_path / "compiled"))
    for steps in (1, 2, 3):  # the second restores for the first time
        jax.clear_caches()  # as in a new process
        events.clear()
        train(make_config(tmp_path / "run", [{"seq_len": 96, "steps": steps}]))
    assert events["cache_hits"] > 0 and events["cache_misses"] == 0, events


def test_a_folder_that_cannot_be_written_to_is_a_warning(own_cache, tmp_path, capsys):
    (tmp_path / "file").touch()
    keep_compiled(str(tmp_path / "file" / "compiled"))
    assert jax.config.jax_compilation_cache_dir is None
    assert "warning: no compiled programs are kept, since" in capsys.readouterr().err


def test_which_folder(own_cache, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    keep_compiled()
    (kind,) = (tmp_path / "infinitecontext" / "compiled").iterdir()
    assert jax.config.jax_compilation_cache_dir == str(kind) and kind.name.startswith("cpu-")
    keep_compiled(None)
    assert jax.config.jax_compilation_cache_dir is None
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", "elsewhere")
    keep_compiled()  # JAX has taken that
    assert jax.config.jax_compilation_cache_dir is None


def test_programs_that_nobody_reads_are_deleted(own_cache, tmp_path):
    keep_compiled(str(tmp_path))
    (kind,) = tmp_path.iterdir()
    old, new = kind / "old", kind / "new"
    for file in (old, new):
        file.touch()
    then = time.time() - (KEEP_DAYS + 1) * 86400
    os.utime(old, (then, then))
    keep_compiled(str(tmp_path))
    assert list(kind.iterdir()) == [new]
