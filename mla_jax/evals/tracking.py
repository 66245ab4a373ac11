"""Rates of an evaluation as metrics of the run that it is about, in the trackers that the run was trained with."""

import re
from pathlib import Path

from omegaconf import OmegaConf

from mla_jax.checkpoint.run_folder import CONFIG
from mla_jax.config import TrackerConfig
from mla_jax.errors import InputError, first_line
from mla_jax.evals.cells import Cell
from mla_jax.evals.results import Results
from mla_jax.observability.trackers import add_metrics


def track(run_dir: Path, results: Results) -> None:
    """Adds the metrics of `metrics_of` to the trackers of a run, if it has any, and prints which have them.

    Args:
        run_dir: a run folder; an imported model and a Hugging Face folder have no trackers.
        results: of one of its checkpoints.

    Raises:
        InputError: the run's config cannot be read.
    """
    add_to_run(run_dir, results.model["step"], f"eval/{results.task}", metrics_of(results))


def add_to_run(run_dir: Path, step: int, prefix: str, metrics: dict[str, float]) -> None:
    """Adds metrics, whose names begin with `prefix`, at a step to the trackers of a run; as `track`."""
    trackers = _trackers(run_dir)
    if trackers is not None and trackers.names:
        added = add_metrics(trackers, run_dir, step, metrics)
        if added:
            print(f"Added to {', '.join(added)}: {prefix}/... at step {step:,}")


def metrics_of(results: Results) -> dict[str, float]:
    """The mean of each score and measure by name, over all prompts, those of a length, and those of a cell.

    eval/TASK/SCORE, eval/TASK/LENGTH/SCORE and eval/TASK/LENGTH/PARAM_VALUE/SCORE, for instance
    eval/passkey/256/depth_0.5/correct.
    """
    found = _rates(f"eval/{results.task}", results.total)
    for cell in results.by_length:
        found |= _rates(f"eval/{results.task}/{cell.length}", cell)
    for cell in results.cells:
        params = [f"{name}_{value}" for name, value in cell.params.items() if name != "length"]
        found |= _rates("/".join((f"eval/{results.task}/{cell.length}", *map(_plain, params))), cell)
    return found


def _rates(prefix: str, cell: Cell) -> dict[str, float]:
    means = {name: mean.mean for name, mean in cell.means.items()}
    rates = {name: rate.rate for name, rate in cell.all_rates.items()}
    return {f"{prefix}/{name}": value for name, value in (means | rates).items()}


def _plain(text: str) -> str:
    """The text in characters that names of metrics may have in all trackers."""
    return re.sub(r"[^\w.-]+", "_", text, flags=re.ASCII)


def _trackers(run_dir: Path) -> TrackerConfig | None:
    """The trackers that a run was trained with; None for a folder of something else."""
    path = run_dir / CONFIG
    if not path.is_file():
        return None
    try:
        config = OmegaConf.load(path)
        if "tracker" not in config:
            return None
        found = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(TrackerConfig), config.tracker))
    except Exception as e:
        raise InputError(f"{path} cannot be read ({first_line(e)})") from e
    assert isinstance(found, TrackerConfig)
    return found
