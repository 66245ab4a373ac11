"""The outcome of a finished run, in a file for those who compare runs."""

from mla_jax.files import write_json
from mla_jax.training.loop import TrainResult

SUMMARY = "summary.json"


def write_summary(result: TrainResult) -> None:
    """Writes RUN/summary.json: the last step and the metrics of the last window of `train.log_every` steps.

    A metric that is nan is null there.

    `accuracy_metric` names the one that compares runs beside the loss; files without it were written when it was always
    `answer_accuracy`.

    Raises:
        InputError: the file cannot be written.
    """
    if result.metrics is not None:  # a run that had finished before keeps what it wrote then
        summary = {"step": result.step, "accuracy_metric": result.accuracy_metric, **result.metrics}
        write_json(result.run_dir / SUMMARY, summary, parents=False)
