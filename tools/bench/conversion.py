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
        description="Converts a Llama, Mistral or Qwen in several ways and prints the perplexities, on the last eighth "
        "of the text's sequences; `plain` and whatever does not fit positions keep the checkpoint's RoPE base.",
    )
    parser.add_argument("dir", type=Path, help="Hugging Face folder")
    parser.add_argument("text", type=Path, help="UTF-8 text")
    parser.add_argument("--shapes", nargs="+", default=["192+64"], metavar="LATENT+ROPE", help="default 192+64")
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=METHODS, help="default: all of them")
    parser.add_argument("--tokens", type=int, default=65_536, help="default %(default)s")
    parser.add_argument("--length", type=int, default=1024, help="of a sequence, in tokens; default %(default)s")
    parser.add_argument("--runs", nargs="*", default=[], type=Path, help="measure these runs, and convert nothing")
    args = parser.parse_args()
    with one_line_errors():
        source = LlamaCheckpoint(args.dir)
        if args.runs:
            rows_BT = read_calibration(args.text, source.tokenizer, args.tokens, args.length).tokens_BT
            for path in args.runs:
                run = load_run(path)
                if path == args.runs[0]:
                    print(f"| {args.dir} | {source_perplexity(args.dir, run.model, rows_BT):.2f} |", flush=True)
                print(f"| {path} | {converted_perplexity(run.model, run.params, rows_BT):.2f} |", flush=True)
            return
        print("| latent + rotary | of the source's cache | parts | source | converted | seconds |", flush=True)
        print("|---|---|---|---|---|---|", flush=True)
        for shape in args.shapes:
            latent, rotary = map(int, shape.split("+"))
            for name in args.methods:
                method = METHODS[name]
                theta = None if method.fitted_positions else source.config.rope_theta
                start = time.perf_counter()
                *_, report = convert(
                    args.dir, Ranks(latent, rotary, rope_theta=theta), args.text, tokens=args.tokens,
                    length=args.length, method=method,
                )  # fmt: skip
                share = (latent + rotary) / source.config.cache_width
                found = report.perplexity
                print(
                    f"| {latent} + {rotary} | {share:.1%} | {name} | {found['source']:.2f} | {found['converted']:.2f} "
                    f"| {time.perf_counter() - start:.0f} |",
                    flush=True,
                )


def source_perplexity(hf_dir: Path, model: ModelConfig, rows_BT: np.ndarray) -> float:
    """Perplexity of the checkpoint, computed in the type of the model."""
    teacher = load_teacher(hf_dir, model)
    params = jax.device_put(teacher.params)
    run = jax.jit(lambda params, rows: teacher.hidden_states(params, rows, jnp.arange(rows.shape[1])[None], None))
    h_BTD = in_batches(lambda rows: run(params, rows), rows_BT)
    return perplexity(h_BTD, np.asarray(teacher.head(teacher.params)), rows_BT)


if __name__ == "__main__":
    main()
