"""Evaluations by real generation, with the number of prompts and an interval beside every accuracy."""
