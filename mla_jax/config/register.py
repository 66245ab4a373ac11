"""Registration of the schemas in Hydra's ConfigStore."""

import functools
from collections.abc import Iterator
from typing import Any

from hydra.core.config_store import ConfigStore
from omegaconf import OmegaConf, StringNode

from mla_jax.config.data import JsonlDataConfig, NeedleDataConfig
from mla_jax.config.dpo import DpoConfig
from mla_jax.config.evaluate import (
    EvaluateConfig,
    HallucinationConfig,
    HashHopConfig,
    MultikeyConfig,
    NiahConfig,
    PasskeyConfig,
    PerplexityConfig,
    RulerConfig,
)
from mla_jax.config.judge import JudgeConfig
from mla_jax.config.loss import PreferenceLossConfig, SftLossConfig
from mla_jax.config.mesh import MeshConfig
from mla_jax.config.model import ModelConfig, YarnConfig
from mla_jax.config.optim import OptimConfig
from mla_jax.config.preference import MinedPairsConfig, NeedlePairsConfig, PreferenceJsonlConfig
from mla_jax.config.sft import SftConfig
from mla_jax.config.tracker import TrackerConfig
from mla_jax.config.train import TrainConfig


def register_schemas() -> None:
    """Registers every schema under the group and name by which the files in `conf/` extend it (idempotent)."""
    store = ConfigStore.instance()
    store.store(name="sft_schema", node=SftConfig)
    store.store(name="dpo_schema", node=DpoConfig)
    store.store(name="evaluate_schema", node=EvaluateConfig)
    store.store(name="judge_schema", node=JudgeConfig)
    for group, name, node in (
        ("model", "schema", ModelConfig),
        ("model/rope_scaling", "schema", YarnConfig),
        ("data", "needle_schema", NeedleDataConfig),
        ("data", "jsonl_schema", JsonlDataConfig),
        ("data", "needle_pairs_schema", NeedlePairsConfig),
        ("data", "mined_schema", MinedPairsConfig),
        ("data", "preference_jsonl_schema", PreferenceJsonlConfig),
        ("loss", "schema", PreferenceLossConfig),
        ("loss", "sft_schema", SftLossConfig),
        ("optim", "schema", OptimConfig),
        ("mesh", "schema", MeshConfig),
        ("tracker", "schema", TrackerConfig),
        ("train", "schema", TrainConfig),
        ("eval", "passkey_schema", PasskeyConfig),
        ("eval", "hallucination_schema", HallucinationConfig),
        ("eval", "hashhop_schema", HashHopConfig),
        ("eval", "multikey_schema", MultikeyConfig),
        ("eval", "niah_schema", NiahConfig),
        ("eval", "perplexity_schema", PerplexityConfig),
        ("eval", "ruler_schema", RulerConfig),
    ):
        store.store(group=group, name=name, node=node)


@functools.cache
def text_keys() -> frozenset[str]:
    """The keys whose values are text, whatever they look like: `name`, `data.path` and the like."""
    register_schemas()
    return frozenset(_text_keys(ConfigStore.instance().repo, ""))


def _text_keys(group: dict[str, Any], prefix: str) -> Iterator[str]:
    for name, entry in group.items():
        if isinstance(entry, dict):
            yield from _text_keys(entry, f"{prefix}{name}.")
        elif OmegaConf.get_type(entry.node) is not dict:
            yield from (f"{prefix}{key}" for key in entry.node if isinstance(entry.node._get_node(key), StringNode))
