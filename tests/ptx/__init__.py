"""An interpreter in NumPy of the PTX that Mosaic GPU makes of our kernels for Hopper, for machines without a GPU.

- `pallas`: a `pl.kernel` that runs in it; `compile_module`: compiles it, in a process with the driver of fake_cuda.c
- `parser`: text to instructions; `operands`: their registers, types and addresses
- `arithmetic`, `transfers`, `tensor_cores`: what each instruction does
- `memory`: address spaces, mbarriers, tensor maps
- `machine`: CTAs and their warpgroups, which take turns; control flow; deadlocks

All CTAs of a grid are resident. A warpgroup runs until it waits, then another one does, in an order drawn from a seed.
Threads diverge; instructions of a whole warp or warpgroup wait until its threads are together. Bulk and tensor copies
read when they are issued, and arrive some turns later, as the seed has it.

Not modelled:

- Time, the number of registers, clusters, programmatic dependent launch.
- The memory model: every write is visible to all at once and in order, so a missing fence is not found.
- How long what is asynchronous takes: a missing wait for a copy is found only if in this order it has not arrived by
  then. A wgmma is done as late as it may be, when it is waited for, with what shared memory holds by then.
- Rounding of approximate instructions (ex2, rcp, ...), which are NumPy's in float32, and the order of sums in tensor
  cores, which are in float64.

What is unknown raises `UnsupportedError`. "PTX ISA" in these files is NVIDIA's document of that name, version 9.0.
"""
