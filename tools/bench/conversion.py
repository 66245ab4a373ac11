"""What each part of a conversion brings: `python -m tools.bench.conversion HF_FOLDER TEXT_FILE`."""

import argparse
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from mla_jax.bridge.llama.calibration import in_batches, perplexity, read_calibration
from mla_jax.bridge.llama.config import WHOLE_METHOD, Method, Ranks
from mla_jax.bridge.llama.convert import convert, converted_perplexity
from mla_jax.bridge.llama.source import LlamaCheckpoint
from mla_jax.bridge.llama.teacher import load_teacher
from mla_jax.checkpoint.run_folder import load_run
from mla_jax.config import ModelConfig
from mla_jax.errors import one_line_errors

METHODS = {
    "plain": Method(constant_latent=False, fitted_positions=False, refit=False),
    "constant latent": Method(fitted_positions=False, refit=False),
    "fitted positions": Method(constant_latent=False, refit=False),
    "refit": Method(constant_latent=False, fitted_positions=False),
    "all": WHOLE_METHOD,
}


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m tools.bench.conversion",
        description="Perplexity of a Llama, Mistral or Qwen on texts, a column each, and of what it becomes: of runs, "
        "or of conversions in several ways; `plain` and whatever does not fit positions keep its RoPE base.",
    )
    parser.add_argument("dir", type=Path, help="Hugging Face folder")
    parser.add_argument("texts", nargs="+", type=Path, help="UTF-8 texts to measure on")
    parser.add_argument("--tokens", type=int, default=32_768, help="of each, at most; default %(default)s")
    parser.add_argument("--length", type=int, default=1024, help="of a sequence, in tokens; default %(default)s")
    ways = parser.add_mutually_exclusive_group(required=True)
    ways.add_argument("--runs", nargs="+", type=Path, help="measure these, and convert nothing")
    ways.add_argument("--calibration", type=Path, metavar="TEXT_FILE", help="convert, with this text")
    parser.add_argument("--calibration-tokens", type=int, default=65_536, help="tokens of it; default %(default)s")
    parser.add_argument("--shapes", nargs="+", default=["192+64"], metavar="LATENT+ROPE", help="default 192+64")
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=METHODS, help="default: all of them")
    args = parser.parse_args()
    with one_line_errors():
        source = LlamaCheckpoint(args.dir)
        texts = [read_calibration(path, source.tokenizer, args.tokens, args.length).tokens_BT for path in args.texts]
        if args.runs:
            _print_header("model", *args.texts)
            for i, path in enumerate(args.runs):
                run = load_run(path)
                if i == 0:
                    _print_row(args.dir, *source_perplexities(args.dir, run.model, texts))
                _print_row(path, *(f"{converted_perplexity(run.model, run.params, text):.2f}" for text in texts))
            return
        _print_header("latent + rotary", "of the source's cache", "parts", *args.texts, "seconds")
        for shape in args.shapes:
            latent, rotary = map(int, shape.split("+"))
            for name in args.methods:
                method = METHODS[name]
                theta = None if method.fitted_positions else source.config.rope_theta
                start = time.perf_counter()
                config, params, *_ = convert(
                    args.dir, Ranks(latent, rotary, rope_theta=theta), args.calibration,
                    tokens=args.calibration_tokens, length=args.length, method=method,
                )  # fmt: skip
                seconds = time.perf_counter() - start
                if (shape, name) == (args.shapes[0], args.methods[0]):
                    _print_row("source", "", "", *source_perplexities(args.dir, config, texts), "")
                perplexities = (f"{converted_perplexity(config, params, text):.2f}" for text in texts)
                share = (latent + rotary) / source.config.cache_width
                _print_row(f"{latent} + {rotary}", f"{share:.1%}", name, *perplexities, f"{seconds:.0f}")


def _print_header(*cells: object) -> None:
    _print_row(*cells)
    _print_row(*("---" for _ in cells))


def _print_row(*cells: object) -> None:
    print(f"| {' | '.join(map(str, cells))} |", flush=True)


def source_perplexities(hf_dir: Path, model: ModelConfig, texts: list[np.ndarray]) -> list[str]:
    """Perplexities of the checkpoint on texts [B, T], computed in the type of the model."""
    teacher = load_teacher(hf_dir, model)
    params = jax.device_put(teacher.params)
    run = jax.jit(lambda params, rows: teacher.hidden_states(params, rows, jnp.arange(rows.shape[1])[None], None))

    def of(rows_BT: np.ndarray) -> float:
        h_BTD = in_batches(lambda rows: run(params, rows), rows_BT)
        return perplexity(h_BTD, np.asarray(teacher.head(teacher.params)), rows_BT)

    return [f"{of(rows_BT):.2f}" for rows_BT in texts]


if __name__ == "__main__":
    main()
