"""Compiles a Mosaic module to PTX and launches it on the driver of fake_cuda.c, in a process of its own.

`python compile_module.py WHEELS DRIVER MODULE OUT ADDRESS...`: WHEELS is the folder of CUDA wheels, DRIVER the compiled
fake_cuda.c, MODULE the serialised module; addresses are of the buffers that XLA would pass. Writes OUT/kernel.ptx, and
to stdout the launch as JSON: `grid`, `block`, `shared_bytes`, `params` (hex).
"""

import ctypes
import json
import os
import re
import sys
from pathlib import Path


def param_sizes(ptx: str) -> list[int]:
    """Bytes of each parameter of the only kernel."""
    (params,) = re.findall(r"\.entry [^(]*\(([^)]*)\)", ptx)
    arrays = [re.search(r"\.b8 \w+\[(\d+)\]", param) for param in params.split(",")]
    return [int(found[1]) if found else 8 for found in arrays]


def main(wheels: Path, driver: Path, module: Path, out: Path, *addresses: int) -> None:
    toolkit = wheels / "nvidia" / "cu13"
    os.environ["MOSAIC_GPU_CUDA_ROOT"] = str(toolkit)
    os.environ["MOSAIC_GPU_RUNTIME_LIB_PATH"] = str(wheels / "jax_cuda13_plugin" / "libmosaic_gpu_runtime.so")
    os.environ["MOSAIC_GPU_DUMP_TO"], os.environ["MOSAIC_GPU_DUMP_PTX"] = str(out), "1"
    os.environ["PATH"] = f"{toolkit / 'bin'}:{os.environ['PATH']}"
    fake = ctypes.CDLL(str(driver), mode=ctypes.RTLD_GLOBAL)  # of this name, it is what others load as libcuda.so.1
    mosaic = ctypes.CDLL(str(wheels / "jax_plugins" / "xla_cuda13" / "xla_cuda_plugin.so"))
    mosaic.MosaicGpuCompile.restype = ctypes.POINTER(ctypes.c_void_p)
    code = module.read_bytes()
    compiled = mosaic.MosaicGpuCompile(code, ctypes.c_int(len(code)))
    if not compiled:
        sys.exit("Mosaic did not compile the module")
    (path,) = out.glob("*.ptx")
    path = path.rename(out / "kernel.ptx")
    sizes = param_sizes(path.read_text())
    ctypes.c_uint32.in_dll(fake, "num_params").value = len(sizes)
    (ctypes.c_uint32 * 128).in_dll(fake, "param_bytes")[: len(sizes)] = sizes
    buffers = (ctypes.c_void_p * len(addresses))(*addresses)
    start = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_void_p, ctypes.POINTER(ctypes.c_void_p))(compiled[1])
    start(compiled[0], None, buffers)

    def words(name: str, count: int = 1) -> list[int]:
        return list((ctypes.c_uint32 * count).in_dll(fake, name))

    if words("num_launches") != [1]:
        sys.exit("the module did not launch one kernel")
    params = bytes((ctypes.c_uint8 * sum(sizes)).in_dll(fake, "launch_params"))
    launch = {
        "grid": words("launch_grid", 3),
        "block": words("launch_block", 3),
        "shared_bytes": words("launch_shared_bytes")[0],
        "params": params.hex(),
    }
    print(json.dumps(launch))


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:5]), *map(int, sys.argv[5:]))
