"""Trains a byte-level BPE tokenizer: `python -m tools.train_tokenizer --out DIR [--vocab-size N] [--corpus FOLDER]`."""

import argparse
from pathlib import Path

from mla_jax.data.needle import vocabulary
from mla_jax.data.text_folder import read_texts
from mla_jax.data.tokenizer import TOKENIZER_FILE, train_bpe
from mla_jax.errors import UsageError, one_line_errors


def main() -> None:
    """The command line; exit code 1 for a folder without text or one that cannot be written, 2 for wrong usage."""
    parser = argparse.ArgumentParser(
        prog="python -m tools.train_tokenizer",
        description="Trains a byte-level BPE that splits numbers into digits, and saves it in Hugging Face format.",
    )
    parser.add_argument("--out", type=Path, required=True, help="folder to write; use it as data.tokenizer=OUT")
    parser.add_argument("--vocab-size", type=int, default=512, help="the most tokens (default: 512)")
    parser.add_argument(
        "--corpus",
        type=Path,
        help="folder of .txt and .md files to train on, besides the sentences of the needle tasks",
    )
    args = parser.parse_args()
    with one_line_errors():
        if (args.out / TOKENIZER_FILE).exists():
            raise UsageError(f"{args.out} already holds a tokenizer; choose another folder")
        corpus = read_texts(args.corpus) if args.corpus is not None else []
        tokenizer = train_bpe([*vocabulary.PIECES, *corpus], args.vocab_size, source=str(args.out))
        tokenizer.save(args.out)
        print(f"wrote a tokenizer of {tokenizer.vocab_size} tokens to {args.out}")


if __name__ == "__main__":
    main()
