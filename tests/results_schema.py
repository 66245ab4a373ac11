"""The published JSON schema of results files."""

import json
from pathlib import Path

from mla_jax.evals import results

SCHEMA = json.loads(Path(results.__file__).with_name("results.schema.json").read_text())
