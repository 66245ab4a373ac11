"""Typed dataclasses for everything that Hydra composes: values live in `conf/`, types and checks live here.

Values that cannot work raise UsageError in `__post_init__`, so a bad configuration ends at composition.
"""

from mla_jax.config.data import DataConfig, JsonlDataConfig, NeedleDataConfig, NeedleMixtureConfig
from mla_jax.config.dpo import DpoConfig
from mla_jax.config.evaluate import (
    EvalConfig,
    EvaluateConfig,
    HallucinationConfig,
    HashHopConfig,
    MultikeyConfig,
    NiahConfig,
    PasskeyConfig,
    PerplexityConfig,
    RulerConfig,
)
from mla_jax.config.judge import EndpointConfig, JudgeConfig
from mla_jax.config.loss import PreferenceLossConfig, SftLossConfig
from mla_jax.config.mesh import MeshConfig
from mla_jax.config.model import NUMERICALLY_NEUTRAL_KEYS, REMAT_NAMES, WEIGHT_KEYS, ModelConfig, YarnConfig
from mla_jax.config.optim import OptimConfig
from mla_jax.config.preference import MinedPairsConfig, NeedlePairsConfig, PreferenceDataConfig, PreferenceJsonlConfig
from mla_jax.config.register import register_schemas
from mla_jax.config.run import RunConfig
from mla_jax.config.schema import flatten, require, require_at_least, require_choice, schema
from mla_jax.config.sft import SftConfig
from mla_jax.config.tracker import TrackerConfig
from mla_jax.config.train import StageConfig, TrainConfig

__all__ = [
    "NUMERICALLY_NEUTRAL_KEYS",
    "REMAT_NAMES",
    "WEIGHT_KEYS",
    "DataConfig",
    "DpoConfig",
    "EndpointConfig",
    "EvalConfig",
    "EvaluateConfig",
    "HallucinationConfig",
    "HashHopConfig",
    "JsonlDataConfig",
    "JudgeConfig",
    "MeshConfig",
    "MinedPairsConfig",
    "ModelConfig",
    "MultikeyConfig",
    "NeedleDataConfig",
    "NeedleMixtureConfig",
    "NeedlePairsConfig",
    "NiahConfig",
    "OptimConfig",
    "PasskeyConfig",
    "PerplexityConfig",
    "PreferenceDataConfig",
    "PreferenceJsonlConfig",
    "PreferenceLossConfig",
    "RulerConfig",
    "RunConfig",
    "SftConfig",
    "SftLossConfig",
    "StageConfig",
    "TrackerConfig",
    "TrainConfig",
    "YarnConfig",
    "flatten",
    "register_schemas",
    "require",
    "require_at_least",
    "require_choice",
    "schema",
]
