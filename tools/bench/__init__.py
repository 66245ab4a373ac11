"""What the benchmarks of `tools` share: timing, ceilings, float64 references, other projects' kernels, tables."""
