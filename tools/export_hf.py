"""Writes a run as a Hugging Face folder: `python -m tools.export_hf RUN OUT [--verify]`."""

import argparse
import json
import re
from pathlib import Path
from typing import Any

from mla_jax.bridge.hf import verify
from mla_jax.bridge.hf.config import DTYPES
from mla_jax.bridge.hf.export import export
from mla_jax.checkpoint.run_folder import Run, load_run
from mla_jax.errors import InputError, one_line_errors

_UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "ki": 2**10, "mi": 2**20, "gi": 2**30}


def parse_size(text: str) -> int:
    """Bytes that "4GB", "500MiB" or "20000" says; ArgumentTypeError if it says nothing."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([kmg]i?|)b?", text.strip().lower())
    size = int(float(match[1]) * _UNITS[match[2]]) if match else 0
    if size < 1:
        raise argparse.ArgumentTypeError(
            f"{text!r} is no size; expected a number with a unit, 4GB or 500MiB for instance"
        )
    return size


def _results(run: Run) -> dict[str, Any] | None:
    """What was measured of the step that is exported; None if nothing was."""
    path = run.path / "eval" / "passkey.json"
    if not path.exists():
        return None
    try:
        results = json.loads(path.read_bytes())
        step = results["model"]["step"]
    except (OSError, ValueError, KeyError, TypeError) as e:
        raise InputError(f"{path} cannot be read ({e!r}); evaluate the run again or remove the file") from e
    if step != run.step:
        print(f"{path} is of step {step}, not {run.step}: the model card will say that it was not evaluated")
        return None
    return results


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
    parser.add_argument("--overwrite", action="store_true", help="replace OUT if it is an export")
    parser.add_argument("--verify", action="store_true", help="compare with transformers (needs the hf extra)")
    args = parser.parse_args()
    with one_line_errors():
        if args.verify:
            verify.import_transformers()  # its absence is better known before than after
        run = load_run(args.run, args.step, on_disk=True)
        out = export(
            run.model,
            run.params,
            run.tokenizer,
            args.out,
            results=_results(run),
            dtype=args.dtype,
            max_shard_bytes=args.max_shard_size,
            overwrite=args.overwrite,
        )
        print(f"wrote step {run.step} of {args.run} to {out}")
        if args.verify:
            params = load_run(args.run, str(run.step)).params
            verification = verify.verify(out, run.model, params, run.tokenizer, dtype=args.dtype)
            print(verification)
            if not verification.passed:
                raise InputError(f"{out} does not agree with transformers; do not use it")


if __name__ == "__main__":
    main()
