"""Which heads look at a passkey while it is written: `python -m tools.attention_mass RUN --lengths 8192 131072`."""

import argparse
from pathlib import Path

import numpy as np

from mla_jax.bridge.run_or_hf import load_run_or_hf
from mla_jax.config import PasskeyConfig
from mla_jax.errors import one_line_errors
from mla_jax.evals.attention_mass import AttentionMass, attention_mass
from mla_jax.evals.passkey import passkey_task
from mla_jax.files import write_json
from mla_jax.inference.generator import Generator


def main() -> None:
    """The command line; exit code 1 if the run cannot be read or the prompts cannot be written."""
    parser = argparse.ArgumentParser(
        prog="python -m tools.attention_mass",
        description="Attention on the key of passkey prompts while its digits are written, for the heads that look at "
        "it most: what a wrong digit is made of.",
    )
    parser.add_argument("run", type=Path, help="a run, or a folder in Hugging Face format")
    parser.add_argument("--lengths", type=int, nargs="+", required=True, metavar="TOKENS", help="of the prompts")
    parser.add_argument(
        "--depths", type=float, nargs="+", default=[0.1, 0.5, 0.9], help="of the key (default: %(default)s)"
    )
    parser.add_argument("--samples", type=int, default=1, help="prompts at each length and depth (default: 1)")
    parser.add_argument("--heads", type=int, default=4, help="heads to show (default: 4)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the shares of all heads to FILE")
    args = parser.parse_args()
    with one_line_errors():
        run = load_run_or_hf(args.run)
        grid = PasskeyConfig(lengths=args.lengths, depths=args.depths, samples=args.samples)
        task = passkey_task(run.model, run.tokenizer, grid)
        generator = Generator(run.model, run.params)
        content = []
        for length in grid.lengths:
            found = []
            for depth in grid.depths:
                for sample in range(grid.samples):
                    prompt = task.prompt({"length": length, "depth": depth}, sample)
                    answer = run.tokenizer.encode(f" {prompt.answer}")
                    found.append(attention_mass(generator, prompt.ids, answer))
            print(f"{length:,} tokens\n{format_table(found, args.heads)}\n")
            content.append({"length": length, "prompts": [_to_json(mass) for mass in found]})
        if args.json:
            write_json(args.json, content)
            print(f"Written: {args.json}")


def format_table(found: list[AttentionMass], heads: int) -> str:
    """The heads with the largest share on the key, each token's own share, and how many tokens were right."""
    size = min(len(mass.right_T) for mass in found)  # keys may be shorter by a digit
    on_key_LH = np.mean([mass.answer_LHT.mean(-1) for mass in found], axis=0)
    own_LHT = np.mean([mass.token_LHT[..., :size] for mass in found], axis=0)
    right_T = np.mean([mass.right_T[:size] for mass in found], axis=0)
    lines = ["layer head  on the key  on its token 1, 2, ..."]
    for flat in np.argsort(-on_key_LH, axis=None)[:heads]:
        layer, head = np.unravel_index(flat, on_key_LH.shape)
        own = " ".join(f"{100 * share:3.0f}" for share in own_LHT[layer, head])
        lines.append(f"{layer:5} {head:4} {100 * on_key_LH[layer, head]:9.0f} %  {own} %")
    lines.append(f"{'right':>10}              " + " ".join(f"{100 * share:3.0f}" for share in right_T) + " %")
    return "\n".join(lines)


def _to_json(mass: AttentionMass) -> dict:
    return {
        "on_answer": np.round(mass.answer_LHT, 4).tolist(),
        "on_token": np.round(mass.token_LHT, 4).tolist(),
        "right": mass.right_T.tolist(),
    }


if __name__ == "__main__":
    main()
