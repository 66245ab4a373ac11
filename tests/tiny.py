"""A tiny model and training config that several tests share."""

import dataclasses
import os
import signal
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mla_jax.checkpoint.run_folder import load_run
from mla_jax.config import (
    MeshConfig,
    ModelConfig,
    NeedleDataConfig,
    OptimConfig,
    SftConfig,
    StageConfig,
    TrackerConfig,
    TrainConfig,
)
from mla_jax.data import pipeline
from mla_jax.losses.cross_entropy import CrossEntropy
from mla_jax.model.cache import LatentCache, init_layer
from mla_jax.model.transformer import abstract_params
from mla_jax.training import loop

MODEL = ModelConfig(
    vocab_size=512,
    hidden_size=32,
    num_hidden_layers=2,
    num_attention_heads=2,
    qk_nope_head_dim=8,
    qk_rope_head_dim=8,
    v_head_dim=8,
    kv_lora_rank=16,
    intermediate_size=32,
    max_position_embeddings=512,
    dtype="float32",
    remat="none",
)
DATA = NeedleDataConfig(
    tokenizer="needle-bpe",
    tasks={"passkey": 1.0, "single": 1.0, "multi_key": 1.0},
    haystacks={"noise": 1.0, "words": 1.0},
)


def random_params(config: ModelConfig) -> dict:
    """Random parameters; norm weights differ from 1, so that one left out shows."""
    rng = np.random.default_rng(0)

    def draw(path, leaf):
        mean, spread = (1.0, 0.2) if "norm" in path[-1].key else (0.0, config.initializer_range)
        return jnp.asarray(rng.normal(mean, spread, leaf.shape), leaf.dtype)

    return jax.tree.map_with_path(draw, abstract_params(config))


def empty_cache(config: ModelConfig, batch: int, capacity: int, dtype: str | None = None) -> LatentCache:
    """A latent cache of all layers that holds no tokens."""
    layers = tuple(init_layer(config, batch, capacity, dtype) for _ in range(config.num_hidden_layers))
    return LatentCache(layers, jnp.zeros(batch, jnp.int32))


def make_config(run_dir: Path, stages: list[dict] | None = None, *, make: Any = SftConfig, **changes) -> Any:
    """Two short stages, 8 sequences a step, on all fake devices; `make` gets the values by key."""
    stages = stages or [
        {"seq_len": 96, "steps": 5},
        {"seq_len": 128, "steps": 6, "previous_fraction": 0.5, "position_skip_fraction": 0.5, "position_skip_max": 50},
    ]
    train_changes = {k: changes.pop(k) for k in list(changes) if k in {f.name for f in dataclasses.fields(TrainConfig)}}
    common = {"batch_size": 8, "learning_rate": 1e-2}
    return make(
        name=run_dir.name,
        run_dir=str(run_dir),
        model=changes.pop("model", MODEL),
        data=changes.pop("data", DATA),
        optim=changes.pop("optim", OptimConfig(name="adamw", warmup_steps=2)),
        mesh=MeshConfig(),
        tracker=changes.pop("tracker", TrackerConfig(names=[])),
        train=TrainConfig(
            **{"stages": [StageConfig(**(common | s)) for s in stages], "log_every": 3, "checkpoint_every": 4}
            | train_changes
        ),
        **changes,
    )


def train(config: SftConfig) -> loop.TrainResult:
    """Trains as experiments.sft does."""
    return loop.train(config, CrossEntropy(config.train.loss_chunk), pipeline.make_pipeline)


def interrupt_at(monkeypatch, step: int) -> None:
    """Delivers SIGINT while the batch of `step` (from 1) is being made; those of validation do not count."""
    served = 0
    make_pipeline = pipeline.make_pipeline

    class Interrupting:
        def __init__(self, *args, **options):
            self.counted = not options["validation"]
            self.data = make_pipeline(*args, **options)
            self.get_state, self.set_state = self.data.get_state, self.data.set_state
            self.close = self.data.close

        def __iter__(self):
            return self

        def __next__(self):
            nonlocal served
            served += self.counted
            if self.counted and served == step:
                os.kill(os.getpid(), signal.SIGINT)
            return next(self.data)

    monkeypatch.setattr(pipeline, "make_pipeline", Interrupting)


def params_of(run_dir: Path) -> dict:
    return jax.device_get(load_run(run_dir).params)


def assert_equal(a, b) -> None:
    jax.tree.map(np.testing.assert_array_equal, a, b)
