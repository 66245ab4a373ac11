"""The GPU that a call is for: its compute capability, SMs and shared memory."""

from types import ModuleType
from typing import Any, NamedTuple

_KIB = 1 << 10
_SHARED_MEMORY = {
    (7, 5): 64 * _KIB,
    (8, 0): 163 * _KIB,
    (8, 6): 99 * _KIB,
    (8, 7): 163 * _KIB,
    (8, 9): 99 * _KIB,
    (9, 0): 227 * _KIB,
    (12, 0): 99 * _KIB,
}
"""Most bytes of shared memory of a CTA by compute capability (CUDA C++ Programming Guide, technical specifications)."""
_DATA_CENTRE_BLACKWELL = range(10, 12)
_WITHOUT_OPT_IN = 48 * _KIB
"""Shared memory that a CTA may use on every GPU."""

_KINDS = {"T4": (7, 5), "A100": (8, 0), "A10": (8, 6), "L4": (8, 9), "H100": (9, 0), "H200": (9, 0), "B200": (10, 0)}
"""Compute capability by name: all that the abstract device of a mesh says, when lowering where there is no such GPU."""


class Gpu(NamedTuple):
    """A CUDA device."""

    capability: tuple[int, int]
    num_sms: int
    shared_memory: int
    """Bytes that one CTA may use."""

    @property
    def name(self) -> str:
        """The architecture as NVIDIA writes it: sm_90."""
        return f"sm_{self.capability[0]}{self.capability[1]}"


def make_gpu(capability: tuple[int, int], num_sms: int) -> Gpu:
    """The GPU of this compute capability and number of SMs."""
    default = 227 * _KIB if capability[0] in _DATA_CENTRE_BLACKWELL else _WITHOUT_OPT_IN
    return Gpu(capability, num_sms, _SHARED_MEMORY.get(capability, default))


def local_gpu() -> Gpu | None:
    """The GPU that the computation being traced is for, None if it is for something else.

    That is the device of the current mesh, which may be abstract (`jax.sharding.AbstractDevice`, to lower for a GPU
    that is not here), else JAX's default device.
    """
    import jax  # not above: `decode.triton_torch` runs where there is no JAX

    abstract = jax.sharding.get_abstract_mesh().abstract_device
    if abstract is None:
        return _gpu_of(_default_device(jax))
    if abstract.platform != "gpu":
        return None
    for device in jax.local_devices():
        if device.platform == "gpu" and device.device_kind == abstract.device_kind:
            return _gpu_of(device)
    words = abstract.device_kind.replace("-", " ").split()
    return next((make_gpu(_KINDS[word], abstract.num_cores) for word in words if word in _KINDS), None)


def _default_device(jax: ModuleType) -> Any:
    """The device that JAX uses by default: `jax.default_device` may be a device, the name of a platform, or unset."""
    chosen = jax.config.jax_default_device
    if isinstance(chosen, str):
        return jax.local_devices(backend=chosen)[0]
    return jax.local_devices()[0] if chosen is None else chosen


def _gpu_of(device: Any) -> Gpu | None:
    capability = str(getattr(device, "compute_capability", ""))  # '9.0' on CUDA; ROCm says 'gfx...'
    major, point, minor = capability.partition(".")
    if device.platform != "gpu" or not (major.isdigit() and minor.isdigit() and point):
        return None
    return make_gpu((int(major), int(minor)), device.core_count)
