"""lm-evaluation-harness with our models: `python -m tools.lm_eval --model mla_jax --model_args run=RUN --tasks TASKS`.

The harness' own command line, whatever else it is given; it has no plugins, so its `lm_eval` does not find our model.
"""

import os

from mla_jax.compilation_cache import keep_compiled
from mla_jax.errors import UsageError, one_line_errors


def main() -> None:
    """The command line; exit code 1 or 2 and one line for what our model cannot take."""
    os.environ.setdefault("DISABLE_MULTIPROC", "1")  # the harness would fork for its bootstrap, but JAX has threads
    with one_line_errors():
        try:
            from lm_eval.__main__ import cli_evaluate

            import mla_jax.bridge.harness  # noqa: F401  registers the model
        except ImportError as e:
            raise UsageError(f"the harness needs an extra ({e}): pip install 'infinitecontext[lm-eval]'") from e
        keep_compiled()
        cli_evaluate()


if __name__ == "__main__":
    main()
