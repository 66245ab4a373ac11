"""What `make dpo-example` is there to show."""

import json
import os
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent


@pytest.mark.integration
def test_inventing_falls_by_half_and_nothing_is_lost(tmp_path):
    out = tmp_path / "example"
    # One device, fully optimised, as a user has it.
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("XLA_", "JAX_", "NPROC"))}
    command = ["make", "dpo-example", f"OUT={out}"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=environment)
    print(result.stdout)
    assert result.returncode == 0, result.stdout + result.stderr
    table = json.loads((out / "compare.json").read_text())
    before, after = table["before"], table["after"]
    scores = ("hallucination", "retrieval", "false_refusal")
    assert all(side[score]["n"] >= 200 for side in (before, after) for score in scores)
    assert before["hallucination"]["rate"] >= 0.5, "the model before must have something to unlearn"
    assert after["hallucination"]["rate"] <= before["hallucination"]["rate"] / 2
    (retrieval,) = (each for each in table["differences"] if each["score"] == "retrieval")
    assert table["paired"] and retrieval["interval"][1] >= 0, "retrieval is not lower"
    assert after["false_refusal"]["rate"] <= 0.05
    assert after["correct"]["rate"] >= 0.9, "absent keys are answered by `not found`, not by anything else"
