"""Synthetic needles in haystacks: tasks, fillers, words, and the generator that puts them together."""
