"""Imports a Hugging Face folder as a run, converting Llama-style models: `python -m tools.import_hf DIR RUN`."""

import argparse
from pathlib import Path

from mla_jax.bridge.hf.layout import count_parameters
from mla_jax.bridge.hf.reader import open_checkpoint
from mla_jax.bridge.llama.config import Ranks
from mla_jax.bridge.llama.convert import convert
from mla_jax.bridge.llama.source import is_llama_style
from mla_jax.checkpoint.run_folder import save_imported
from mla_jax.errors import InputError, UsageError, one_line_errors


def main() -> None:
    """The command line; exit code 1 if the checkpoint cannot be imported."""
    parser = argparse.ArgumentParser(
        prog="python -m tools.import_hf",
        description="Makes a run of a dense DeepSeek-V2 or -V3 in Hugging Face format, or converts a Llama, Mistral or "
        "Qwen to one.",
    )
    parser.add_argument("dir", type=Path, help="folder with config.json, safetensors and tokenizer.json")
    parser.add_argument("run", type=Path, help="run folder to create, to evaluate, export or start training from")
    conversion = parser.add_argument_group("converting a Llama, Mistral or Qwen (docs/importing.md)")
    conversion.add_argument("--kv-lora-rank", type=int, help="width of the latent of keys and values; needed")
    conversion.add_argument("--rope-dim", type=int, help="width of the RoPE key; default: that of a head, 64 at most")
    conversion.add_argument("--rope-theta", type=float, help="RoPE's base; default: the checkpoint's or its root")
    conversion.add_argument("--q-lora-rank", type=int, help="also factor queries; default: no")
    conversion.add_argument("--calibration", type=Path, metavar="TEXT_FILE", help="UTF-8 text for fit and test; needed")
    conversion.add_argument("--calibration-tokens", type=int, default=65_536, help="tokens to use; default %(default)s")
    conversion.add_argument("--calibration-length", type=int, default=1024, help="tokens of a sequence; default 1024")
    args = parser.parse_args()
    with one_line_errors():
        if args.run.exists():
            raise InputError(f"{args.run} exists; choose another folder")
        report = None
        if is_llama_style(args.dir):
            if args.kv_lora_rank is None or args.calibration is None:
                raise UsageError(
                    f"{args.dir} is no DeepSeek; converting it needs --kv-lora-rank WIDTH and --calibration TEXT_FILE"
                )
            config, params, tokenizer, report = convert(
                args.dir,
                Ranks(args.kv_lora_rank, args.rope_dim, args.q_lora_rank, args.rope_theta),
                args.calibration,
                tokens=args.calibration_tokens,
                length=args.calibration_length,
            )
        else:
            checkpoint = open_checkpoint(args.dir)
            config, params, tokenizer = checkpoint.config, checkpoint.params(), checkpoint.tokenizer
        save_imported(args.run, config, params, tokenizer)
        if report is not None:
            report.write(args.run)
            print(report)
        print(f"imported {count_parameters(config):,} parameters to {args.run}")


if __name__ == "__main__":
    main()
