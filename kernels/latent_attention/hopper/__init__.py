"""Building blocks of the Mosaic GPU kernels for Hopper: MLIR helpers, layouts, shared-memory tiles, synchronisation."""
