"""Judges answers as configured, and writes what the judge says with what its word is worth."""

import importlib.util
from pathlib import Path
from typing import Any

from mla_jax.config import JudgeConfig
from mla_jax.errors import UsageError
from mla_jax.evals.judge.items import RESULTS_SUFFIX, read_items
from mla_jax.evals.results import read_results
from mla_jax.evals.tracking import add_to_run
from mla_jax.files import write_json


def judge(config: JudgeConfig) -> dict[str, Any]:
    """Asks the judge, writes the report to OUT and prints it; `report` says what is in it.

    The trackers of the run whose results are judged get the main figures. What was replied is kept: when this ends
    early, the same config asks the rest.

    Raises:
        InputError: answers that cannot be read, an endpoint that does not answer, a file that cannot be written.
        UsageError: Inspect is not installed, or the variable of a key is not set.
    """
    for package in ("inspect_ai", "openai"):
        if importlib.util.find_spec(package) is None:
            raise UsageError("experiments.judge needs an extra: pip install 'infinitecontext[judge]'")
    # Inspect takes seconds to import, so not for those who make a mistake in the config.
    from mla_jax.evals.judge.measure import measure
    from mla_jax.evals.judge.questions import plan
    from mla_jax.evals.judge.report import metrics_of
    from mla_jax.evals.judge.session import Session
    from mla_jax.evals.judge.text import format_report

    path = Path(config.answers)
    out = Path(config.out) if config.out else path.with_name(f"{path.stem}.judge.json")
    questions = plan(config, read_items(path), read_items(Path(config.against)) if config.against else None)
    session = Session(config, out.with_name(f"{out.stem}_logs"))
    earlier = [*session.log_dir.glob("*.eval")]
    report = measure(session, questions)
    write_json(out, report)
    for log in earlier:
        log.unlink(missing_ok=True)
    print(f"{format_report(report)}\n\nWritten: {out}; inspect view --log-dir {session.log_dir} shows the replies")
    if path.suffix == RESULTS_SUFFIX:
        results = read_results(path)
        prefix = f"eval/{results.task}/judge"
        add_to_run(path.parent.parent, results.model["step"], prefix, metrics_of(report, prefix))
    return report
