"""Times data as training reads them: until the first batch, and batches. Run twice, the second finds the cache."""

import argparse
import os
import resource
import time
from pathlib import Path

from mla_jax.config import DataConfig, JsonlDataConfig, NeedleDataConfig, StageConfig
from mla_jax.data.pipeline import make_pipeline
from mla_jax.data.tokenizer import load_tokenizer
from mla_jax.errors import one_line_errors


def main() -> None:
    """Prints seconds, processor seconds (of encoding processes too), MB/s of the files and peak memory."""
    parser = argparse.ArgumentParser(prog="python -m tools.bench.data", description=__doc__)
    parser.add_argument("path", help="a JSONL or Parquet file, or a folder of them; with --text a folder of texts")
    parser.add_argument("--text", action="store_true", help="haystacks of the texts in this folder")
    parser.add_argument("--tokenizer", default="needle-bpe")
    parser.add_argument("--seq-len", type=int, default=4096)
    parser.add_argument("--batches", type=int, default=100, help="of 16 sequences")
    args = parser.parse_args()
    with one_line_errors():
        _measure(args)


def _measure(args: argparse.Namespace) -> None:
    data: DataConfig
    if args.text:
        data = NeedleDataConfig(
            tokenizer=args.tokenizer, text_folder=args.path, tasks={"single": 1.0}, haystacks={"text": 1.0}
        )
    else:
        data = JsonlDataConfig(tokenizer=args.tokenizer, path=args.path)
    stage = StageConfig(seq_len=args.seq_len, batch_size=16, steps=1, learning_rate=1)
    tokenizer = load_tokenizer(args.tokenizer)
    start, processor = time.perf_counter(), _processor_seconds()
    pipeline = make_pipeline(data, tokenizer, [stage], 0, seed=0)
    batch = next(pipeline)
    wall, megabytes = time.perf_counter() - start, _bytes(Path(args.path)) / 1e6
    print(
        f"first batch of {megabytes:.1f} MB after {wall:.2f} s, {megabytes / wall:.1f} MB/s "
        f"({_processor_seconds() - processor:.2f} s of processors)"
    )
    start = time.perf_counter()
    for _ in range(args.batches):
        batch = next(pipeline)
    wall = time.perf_counter() - start
    print(f"{args.batches} batches in {wall:.2f} s, {args.batches * batch['tokens'].size / wall / 1e6:.1f} M tokens/s")
    pipeline.close()
    peaks = [resource.getrusage(who).ru_maxrss // 1024 for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    print(f"peak memory {peaks[0]} MiB, of the largest encoding process {peaks[1]} MiB")


def _bytes(path: Path) -> int:
    return path.stat().st_size if path.is_file() else sum(x.stat().st_size for x in path.rglob("*") if x.is_file())


def _processor_seconds() -> float:
    times = os.times()
    return times.user + times.system + times.children_user + times.children_system


if __name__ == "__main__":
    main()
