"""What is made ready while a stage trains: the same run, with nothing left to compile or to start at the next one."""

import dataclasses
import multiprocessing

import pytest

from mla_jax.training import ahead as module
from mla_jax.training import loop
from mla_jax.training.ahead import Ahead
from tiny import DATA, assert_equal, make_config, params_of, train

STAGES = [{"seq_len": 96, "steps": 3}, {"seq_len": 128, "steps": 3, "previous_fraction": 0.5}]


@pytest.fixture(scope="module")
def usual(tmp_path_factory) -> dict:
    """Parameters after a run that makes nothing ahead, as on all CPUs."""
    run_dir = tmp_path_factory.mktemp("runs") / "usual"
    train(make_config(run_dir, STAGES))
    return params_of(run_dir)


@pytest.fixture
def ahead(monkeypatch) -> list[Ahead]:
    """Lets the training loop work ahead here too; the objects that it does so with."""
    made = []

    def make(step):
        made.append(Ahead(step, enabled=True))
        return made[-1]

    monkeypatch.setattr(loop, "Ahead", make)
    return made


@pytest.mark.parametrize("workers", [0, 1])
def test_a_run_that_works_ahead_is_the_same_and_compiles_nothing_at_a_stage(
    workers, ahead, usual, tmp_path, monkeypatch
):
    started_with = []
    monkeypatch.setattr(loop._Trainer, "_next_stage", _noting(loop._Trainer._next_stage, started_with))
    config = make_config(tmp_path / "run", STAGES, data=dataclasses.replace(DATA, workers=workers))
    assert train(config).finished
    assert_equal(params_of(tmp_path / "run"), usual)
    (steps,) = ahead
    assert steps._step._cache_size() == 1  # the first stage's; the second's was compiled ahead
    assert started_with == [workers > 0]
    assert not multiprocessing.active_children()


def _noting(next_stage, started_with):
    def noting(trainer):
        next_stage(trainer)
        started_with.append(trainer.data._batches is not None)

    return noting


def test_a_run_that_ends_before_the_stage_leaves_no_workers(ahead, usual, tmp_path, monkeypatch):
    config = make_config(tmp_path / "run", STAGES, data=dataclasses.replace(DATA, workers=1))
    with monkeypatch.context() as patch:
        patch.setattr(loop._Trainer, "_next_stage", _interrupted)
        with pytest.raises(KeyboardInterrupt):
            train(config)
    assert not multiprocessing.active_children()
    assert train(config).finished
    assert_equal(params_of(tmp_path / "run"), usual)


def _interrupted(trainer):
    raise KeyboardInterrupt


def test_a_program_that_cannot_be_compiled_ahead_is_compiled_at_its_stage(ahead, usual, tmp_path, monkeypatch):
    def out_of_memory(*_):
        raise RuntimeError("RESOURCE_EXHAUSTED")

    monkeypatch.setattr(Ahead, "_compile", out_of_memory)
    assert train(make_config(tmp_path / "run", STAGES)).finished
    assert_equal(params_of(tmp_path / "run"), usual)


def test_where_memory_is_short_nothing_is_compiled_beside_training(ahead, usual, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "_memory_used", lambda state: 0.9)
    assert train(make_config(tmp_path / "run", STAGES)).finished
    assert_equal(params_of(tmp_path / "run"), usual)
    assert ahead[0]._step._cache_size() == 2
