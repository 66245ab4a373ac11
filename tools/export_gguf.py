"""Writes a Hugging Face folder as a GGUF file for llama.cpp: `python -m tools.export_gguf HF_DIR OUT.gguf`."""

import argparse
from pathlib import Path

from mla_jax.bridge.gguf.export import TYPES, export_gguf
from mla_jax.errors import one_line_errors


def main() -> None:
    """The command line; exit code 1 if llama.cpp cannot represent the model or the file cannot be written."""
    parser = argparse.ArgumentParser(
        prog="python -m tools.export_gguf", description="Writes a model in Hugging Face format as a GGUF file."
    )
    parser.add_argument("dir", type=Path, help="folder that tools.export_hf wrote")
    parser.add_argument("out", type=Path, help="file to write")
    parser.add_argument("--type", choices=TYPES, default="f16", help="type of the matrices (default: f16)")
    parser.add_argument("--overwrite", action="store_true", help="replace OUT if it is a GGUF file")
    args = parser.parse_args()
    with one_line_errors():
        out = export_gguf(args.dir, args.out, type=args.type, overwrite=args.overwrite)
        print(f"wrote {out} ({out.stat().st_size / 2**20:,.1f} MiB, {args.type})")


if __name__ == "__main__":
    main()
