"""Writes a run as a Hugging Face folder: `python -m tools.export_hf RUN OUT [--verify]`."""

import argparse
import dataclasses
import math
import re
from pathlib import Path

from mla_jax.bridge.hf import verify
from mla_jax.bridge.hf.config import DTYPES
from mla_jax.bridge.hf.export import export
from mla_jax.checkpoint.run_folder import Run, load_run
from mla_jax.errors import InputError, one_line_errors
from mla_jax.evals.results import Results, results_of_run
from mla_jax.model.mla import scale_queries

_UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "ki": 2**10, "mi": 2**20, "gi": 2**30}


def parse_size(text: str) -> int:
    """Bytes of a size such as "4GB", "500MiB" or "20000". Raises ArgumentTypeError for anything else."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([kmg]i?|)b?", text.strip().lower())
    size = int(float(match[1]) * _UNITS[match[2]]) if match else 0
    if size < 1:
        raise argparse.ArgumentTypeError(
            f"{text!r} is no size; expected a number with a unit, 4GB or 500MiB for instance"
        )
    return size


def parse_factor(text: str) -> float:
    """A positive number. Raises ArgumentTypeError for anything else."""
    try:
        factor = float(text)
    except ValueError:
        factor = 0.0
    if not 0 < factor < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r} is no positive number")
    return factor


def _results(run: Run) -> list[Results]:
    """The results of evaluations of the step that is exported."""
    of_step = []
    for results in results_of_run(run.path):
        step = results.model["step"]
        if step == run.step:
            of_step.append(results)
        else:
            print(f"the {results.task} results are of step {step}, not {run.step}: the model card leaves them out")
    return of_step


def main() -> None:
    """The command line; exit code 1 if anything cannot be written or does not agree with transformers."""
    parser = argparse.ArgumentParser(
        prog="python -m tools.export_hf", description="Writes a run in Hugging Face format."
    )
    parser.add_argument("run", type=Path, help="folder of a run")
    parser.add_argument("out", type=Path, help="folder to write")
    parser.add_argument("--step", default="latest", help="latest, best or a number (default: latest)")
    parser.add_argument("--dtype", choices=DTYPES, default="float32", help="type of the weights (default: float32)")
    parser.add_argument(
        "--max-shard-size", type=parse_size, default="4GB", help="the most weights in a file (default: 4GB)"
    )
    parser.add_argument(
        "--query-scale", type=parse_factor, default=1.0, metavar="FACTOR",
        help="multiply the queries, which makes the softmax sharper: for contexts longer than those trained on",
    )  # fmt: skip
    parser.add_argument("--overwrite", action="store_true", help="replace OUT if it is an export")
    parser.add_argument("--verify", action="store_true", help="compare with transformers (needs the hf extra)")
    args = parser.parse_args()
    with one_line_errors():
        if args.verify:
            verify.import_transformers()  # its absence is better known before than after
        run = load_run(args.run, args.step, on_disk=True)
        results = _results(run)
        if args.query_scale != 1:
            run = load_run(args.run, str(run.step))
            run = dataclasses.replace(run, params=scale_queries(run.params, args.query_scale))
            results = []  # they are of the run as it is
        out = export(
            run.model,
            run.params,
            run.tokenizer,
            args.out,
            results=results,
            dtype=args.dtype,
            max_shard_bytes=args.max_shard_size,
            overwrite=args.overwrite,
        )
        print(f"wrote step {run.step} of {args.run} to {out}")
        if args.verify:
            params = run.params if args.query_scale != 1 else load_run(args.run, str(run.step)).params
            verification = verify.verify(out, run.model, params, run.tokenizer, dtype=args.dtype)
            print(verification)
            if not verification.passed:
                raise InputError(f"{out} does not agree with transformers; do not use it")


if __name__ == "__main__":
    main()
