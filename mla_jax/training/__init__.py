"""The training loop, its step, and reports of sweeps."""
