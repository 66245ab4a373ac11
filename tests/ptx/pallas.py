"""`pl.kernel` on the interpreter: compiles a Mosaic GPU kernel for Hopper, and runs its PTX."""

import functools
import hashlib
import json
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src.lib.mlir import ir

from ptx.machine import Machine
from ptx.memory import GLOBAL
from ptx.parser import UnsupportedError

HERE = Path(__file__).parent
WHEELS = HERE.parents[1] / ".venv-ptx"
"""The wheels with Mosaic's compiler and ptxas; `make test-ptx` installs them."""
_ALIGNMENT = 1024


def why_not() -> str | None:
    """Why kernels cannot be compiled here, or None if they can."""
    if shutil.which("cc") is None:
        return "no C compiler, which makes the driver that Mosaic's compiler asks about the GPU"
    if not (WHEELS / ".installed").exists():
        return f"no {WHEELS.name}; `make test-ptx` installs it"
    return None


def interpreted(make_kernel, num_sms: int, seed: int = 0):
    """A replacement of `pl.kernel` or `plgpu.kernel` for a GPU of this many SMs; of a seed, see `Machine.run`.

    What it makes takes arrays and refs that are not traced, and returns arrays. Outputs start as bytes 0xFF: as NaN.
    """
    device = jax.sharding.AbstractDevice(device_kind="NVIDIA H200", platform="gpu", num_cores=num_sms)
    mesh = jax.sharding.AbstractMesh((), (), abstract_device=device)

    def kernel(body, **options):
        def launch(*args):
            refs = [isinstance(arg, jax.Ref) for arg in args]
            arrays = [np.asarray(arg[...] if is_ref else arg) for arg, is_ref in zip(args, refs, strict=True)]

            def traced(*values):
                inputs = [jax.new_ref(x) if is_ref else x for x, is_ref in zip(values, refs, strict=True)]
                out = make_kernel(body, **options)(*inputs)
                return out, [jax.freeze(x) for x, is_ref in zip(inputs, refs, strict=True) if is_ref]

            with jax.sharding.use_abstract_mesh(mesh):
                lowered = jax.jit(traced).trace(*arrays).lower(lowering_platforms=("cuda",))
            outputs = jax.tree.leaves(lowered.out_info[0])
            filled = [
                np.full(x.size * x.dtype.itemsize, 0xFF, np.uint8).view(x.dtype).reshape(x.shape) for x in outputs
            ]
            results = _run(_module(lowered), [*arrays, *filled], seed)
            for ref, is_ref, result in zip(args, refs, results, strict=False):
                if is_ref:
                    ref[...] = jnp.asarray(result)
            out = [jnp.asarray(x) for x in results[len(arrays) :]]
            return jax.tree.unflatten(jax.tree.structure(lowered.out_info[0]), out)

        return launch

    return kernel


def _module(lowered) -> bytes:
    """The serialised Mosaic module of the only kernel."""
    found = []

    def search(operation):
        if operation.name == "stablehlo.custom_call" and "mosaic_gpu" in str(operation.attributes["call_target_name"]):
            name = "mhlo.backend_config" if "mhlo.backend_config" in operation.attributes else "backend_config"
            found.append(ir.StringAttr(operation.attributes[name]["module"]).value_bytes)
        for region in operation.regions:
            for block in region.blocks:
                for each in block.operations:
                    search(each.operation)

    search(lowered.compiler_ir("stablehlo").operation)
    (module,) = found
    return module


def _run(module: bytes, buffers: list[np.ndarray], seed: int) -> list[np.ndarray]:
    """The buffers after a launch."""
    starts = np.cumsum([0, *(-(-x.nbytes // _ALIGNMENT) * _ALIGNMENT for x in buffers)]).tolist()
    data = np.zeros(starts[-1], np.uint8)
    for start, x in zip(starts, buffers, strict=False):
        data[start : start + x.nbytes] = np.ascontiguousarray(x).reshape(-1).view(np.uint8)
    ptx, launch = compile_module(module, tuple(GLOBAL + start for start in starts[:-1]))
    if launch.block[1:] != [1, 1]:
        raise UnsupportedError(f"CTAs of {launch.block} threads")
    Machine(ptx, tuple(launch.grid), launch.block[0], launch.shared_bytes, bytes.fromhex(launch.params), data).run(seed)
    return [
        data[start : start + x.nbytes].view(x.dtype).reshape(x.shape) for start, x in zip(starts, buffers, strict=False)
    ]


@functools.cache
def compile_module(module: bytes, addresses: tuple[int, ...]) -> tuple[str, SimpleNamespace]:
    """The PTX and the launch of a Mosaic module, see compile_module.py; skips the test where it cannot be compiled.

    Raises:
        RuntimeError: the compiler failed; with what it said.
    """
    if reason := why_not():
        pytest.skip(reason)
    with tempfile.TemporaryDirectory(prefix="ptx-") as folder:
        path = Path(folder) / hashlib.sha256(module).hexdigest()
        path.write_bytes(module)
        command = [sys.executable, HERE / "compile_module.py", WHEELS, _driver(), path, folder, *addresses]
        done = subprocess.run(list(map(str, command)), capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"exit code {done.returncode}: {done.stderr[-2000:]}")
        launch = SimpleNamespace(**json.loads(done.stdout.splitlines()[-1]))
        return (Path(folder) / "kernel.ptx").read_text(), launch


def ptxas(ptx: str) -> str:
    """What ptxas says of PTX for Hopper: registers that it spills, wgmma that it serialises."""
    with tempfile.NamedTemporaryFile("w", suffix=".ptx") as file:
        file.write(ptx)
        file.flush()
        command = [WHEELS / "nvidia" / "cu13" / "bin" / "ptxas", "-v", "-arch=sm_90a", "-o", "/dev/null", file.name]
        return subprocess.run(command, capture_output=True, text=True, check=True).stderr


@functools.cache
def _driver() -> Path:
    """fake_cuda.c as the library that others know as libcuda.so.1."""
    path = Path(tempfile.mkdtemp(prefix="ptx-driver-")) / "libcuda.so.1"
    options = ["-shared", "-fPIC", "-O1", "-Wl,-soname,libcuda.so.1"]
    subprocess.run(["cc", *options, "-o", path, HERE / "fake_cuda.c"], check=True)
    return path
