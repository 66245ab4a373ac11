"""Makes a run of a Hugging Face folder with a dense DeepSeek-V2 or -V3: `python -m tools.import_hf DIR RUN`."""

import argparse
from pathlib import Path

import jax

from mla_jax.bridge.hf_import import load
from mla_jax.checkpoint import save_imported
from mla_jax.errors import InputError, one_line_errors


def main() -> None:
    """The command line; exit code 1 if the checkpoint cannot be imported."""
    parser = argparse.ArgumentParser(
        prog="python -m tools.import_hf",
        description="Makes a run of a dense DeepSeek-V2 or -V3 in Hugging Face format.",
    )
    parser.add_argument("dir", type=Path, help="folder with config.json, safetensors and tokenizer.json")
    parser.add_argument("run", type=Path, help="run folder to create, to evaluate, export or start training from")
    args = parser.parse_args()
    with one_line_errors():
        if args.run.exists():
            raise InputError(f"{args.run} exists; choose another folder")
        config, params, tokenizer = load(args.dir)
        save_imported(args.run, config, params, tokenizer)
        count = sum(leaf.size for leaf in jax.tree.leaves(params))
        print(f"imported {count:,} parameters to {args.run}")


if __name__ == "__main__":
    main()
