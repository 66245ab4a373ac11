"""The share of time in which GPUs run a kernel, sampled through NVML."""

import os
import threading
from typing import Any

import jax


class DeviceBusy:
    """Samples `utilization.gpu` of this process's GPUs in a thread; without GPUs or NVML there are no samples.

    NVML's figure is the share of its own sample period (1/6 s to 1 s, by the product) in which at least one kernel ran.

    Args:
        nvml: the module `pynvml`, or None.
        every: seconds between samples.
    """

    def __init__(self, nvml: Any = None, every: float = 0.5):
        self._nvml, self._every = nvml, every
        self._samples: list[float] = []
        self._end = threading.Event()
        self._thread = None
        gpus = [d.local_hardware_id for d in jax.local_devices() if d.platform == "gpu"] if nvml else []
        try:
            self._handles = _handles(nvml, gpus) if gpus else []
        except nvml.NVMLError as e:
            print(f"device-busy share is not measured: NVML says {e}")
            self._handles = []
        if self._handles:
            self._thread = threading.Thread(target=self._sample, daemon=True, name="device-busy")
            self._thread.start()

    def _sample(self) -> None:
        while not self._end.wait(self._every):
            try:
                rates = [self._nvml.nvmlDeviceGetUtilizationRates(handle).gpu for handle in self._handles]
            except self._nvml.NVMLError as e:
                print(f"device-busy share is no longer measured: NVML says {e}")
                return
            self._samples.append(sum(rates) / len(rates) / 100)

    def mean(self) -> float | None:
        """Mean over the samples since the last call, from 0 to 1; None without samples."""
        samples, self._samples = self._samples, []
        return sum(samples) / len(samples) if samples else None

    def close(self) -> None:
        """Ends the thread."""
        self._end.set()
        if self._thread is not None:
            self._thread.join()


def find_nvml() -> Any:
    """The module `pynvml` of nvidia-ml-py if it is installed, else None."""
    try:
        import pynvml
    except ImportError:
        return None
    return pynvml


def _handles(nvml: Any, gpus: list[int]) -> list[Any]:
    """NVML's handles of devices that CUDA numbers among those visible to it.

    NVML sees all devices, in the order of the bus (CUDA_DEVICE_ORDER=PCI_BUS_ID), and CUDA_VISIBLE_DEVICES holds
    numbers or UUIDs.
    """
    nvml.nvmlInit()
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    names = visible.split(",") if visible else [str(i) for i in range(nvml.nvmlDeviceGetCount())]
    handles = []
    for gpu in gpus:
        name = names[gpu].strip()
        by_index = name.isdigit()
        handles.append(nvml.nvmlDeviceGetHandleByIndex(int(name)) if by_index else nvml.nvmlDeviceGetHandleByUUID(name))
    return handles
