"""Benchmarks: one command for each of attention, decode, generate, serving and train, and what they share."""
