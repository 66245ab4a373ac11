"""Settings of the data that may differ between a run and its resumption, which says so."""

import dataclasses

from mla_jax.config import RunConfig, flatten

_SAME_BATCHES = ("data.workers",)
"""Keys of the data that change no batch."""


def data_settings(config: RunConfig, stage: int) -> dict:
    """The settings that decide the batches of a stage, by the config's keys; JSON-able, kept in checkpoints."""
    now = config.train.stages[stage]
    settings = {"data": dataclasses.asdict(config.data), "seed": config.seed, "train": {}}
    settings["train"]["stages"] = {stage: {"seq_len": now.seq_len, "batch_size": now.batch_size}}
    return {key: value for key, value in flatten(settings).items() if key not in _SAME_BATCHES}


def describe_changes(before: dict, now: dict) -> str:
    """One phrase on what differs between two `data_settings`, empty if nothing does."""
    changed = [
        f"{key} was {before.get(key)} and is {now.get(key)}"
        for key in sorted(before.keys() | now.keys())
        if before.get(key) != now.get(key)
    ]
    return f"; {', '.join(changed)}" if changed else ""
