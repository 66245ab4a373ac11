"""What the Mosaic GPU kernels for Hopper share: MLIR helpers, register layouts, shared memory, grid-wide barriers."""
