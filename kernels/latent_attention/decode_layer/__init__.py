"""A decoder layer for one token of one sequence in one kernel (Hopper), or two around `decode` (Triton)."""
