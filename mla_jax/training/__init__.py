"""The training loop, its step, and the summary of a finished run."""
