"""Preference optimisation on this machine, and what it changes: `make dpo-example`.

The model in weights/lookup tells keys apart and was never taught that one may be missing: it answers every question
with a number. It is trained on for a few steps as it was, then on pairs about absent keys and keys that differ by a
word, and evaluated before and after these. docs/dpo.md has the figures.
"""

import argparse
from pathlib import Path

from example_commands import run

START = Path(__file__).parents[1] / "weights" / "lookup"
STAGE = "{seq_len: 256, batch_size: 8, steps: 40, learning_rate: 0.0003}"


def main() -> None:
    parser = argparse.ArgumentParser(usage="make dpo-example [OUT=FOLDER]")
    parser.add_argument("--out", type=Path, default=Path("runs/dpo-example"))
    args = parser.parse_args()
    if args.out.exists():
        raise SystemExit(f"error: {args.out} is there already: remove it, or make dpo-example OUT=FOLDER")
    start, before, after = (args.out / name for name in ("start", "before", "after"))
    run("tools.import_hf", START, start)
    run(
        "experiments.sft", "experiment=lookup", f"init_from={start}", f"run_dir={before}",
        f"data.tokenizer={start / 'tokenizer'}", "data.workers=0", "model.dtype=float32", f"train.stages=[{STAGE}]",
    )  # fmt: skip
    run("experiments.dpo", "experiment=dpo_needle", f"init_from={before}", f"run_dir={after}")
    for folder in (before, after):
        run(
            "experiments.evaluate", f"run={folder}", "eval=hallucination", "eval.lengths=[256]", "eval.needles=2",
            "eval.questions=2", "eval.samples=200",
        )  # fmt: skip
    run("tools.compare_runs", before, after, "--task", "hallucination", "--json", args.out / "compare.json")


if __name__ == "__main__":
    main()
