"""The model of a run or of a Hugging Face folder, for what takes either."""

from pathlib import Path

import jax

from mla_jax.bridge.hf import reader
from mla_jax.checkpoint.run_folder import CONFIG, Run, load_run
from mla_jax.errors import InputError


def load_run_or_hf(folder: str | Path, step: str = "latest") -> Run:
    """A run, or a Hugging Face folder as a run of step 0; the parameters are on the host, for a `Generator` to convert.

    Args:
        folder: the folder of either.
        step: see `load_run`; a Hugging Face folder has no steps.

    Raises:
        InputError: it is neither, or cannot be read.
    """
    folder = Path(folder)
    with jax.default_device(jax.local_devices(backend="cpu")[0]):
        if (folder / CONFIG).exists():
            return load_run(folder, step)
        if not (folder / "config.json").exists():
            raise InputError(f"{folder} is neither a run (no {CONFIG}) nor a Hugging Face folder (no config.json)")
        model, params, tokenizer = reader.load(folder)
        return Run(folder, model, params, tokenizer, step=0, trained_lengths=())
