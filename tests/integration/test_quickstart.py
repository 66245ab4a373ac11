"""What a newcomer types first, from start to end."""

import json
import os
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent


@pytest.mark.integration
def test_quickstart_learns_to_find_passkeys_and_exports_what_transformers_runs(tmp_path):
    run, export = tmp_path / "nano-needle", tmp_path / "export"
    command = ["make", "quickstart", "verify", f"RUN={run}", f"EXPORT={export}"]
    # One device, fully optimised and on the threads that XLA takes, as a newcomer has it: sums depend on all of it.
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("XLA_", "JAX_", "NPROC"))}
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=environment)
    print(result.stdout)
    assert result.returncode == 0, result.stdout + result.stderr
    report = json.loads((run / "eval" / "passkey.json").read_text())
    assert [row["length"] for row in report["by_length"]] == [128, 192, 256]
    for row in report["by_length"]:
        assert row["n"] >= 100 and row["accuracy"] >= 0.95, row
    assert (run / "eval" / "passkey.png").read_bytes().startswith(b"\x89PNG")
    assert (export / "model.safetensors").exists()
    assert "19248." in result.stdout  # what the export answers to examples/haystack.txt
    assert "prompts with the same 16 greedy tokens                 3/3" in result.stdout
