"""Entry points: each composes a config with Hydra and calls the library."""
