"""Run folders and checkpoints: written whole, checked when read, streamed when large."""
