"""Utilisation on a real GPU: its peak is known, NVML sees it work, a trace of it can be read."""

import time

import jax
import jax.numpy as jnp

from mla_jax.hardware import nominal_peak
from mla_jax.observability.flops import measured_peak
from mla_jax.observability.gpu_utilization import DeviceBusy, find_nvml
from mla_jax.observability.profiling import StepProfiler
from tools.trace_summary import find_trace, read_kernels, summarize


def test_the_measured_peak_is_below_the_nominal():
    nominal = nominal_peak(jax.devices()[0].device_kind)
    assert nominal is not None, "add this device to NOMINAL_PEAK"
    assert 0 < measured_peak() < 1.05 * nominal


def work(seconds: float) -> None:
    """Keeps the GPU busy."""
    x = jnp.ones((4096, 4096), jnp.bfloat16)
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        for _ in range(20):
            x = x @ x
        jax.block_until_ready(x)


def test_nvml_sees_the_gpu_work():
    work(0.1)
    busy = DeviceBusy(find_nvml())
    work(4)
    busy.close()
    share = busy.mean()
    assert share is not None and 0.2 < share <= 1


def test_a_trace_is_summarised(tmp_path):
    work(0.1)
    profiler = StepProfiler([1, 2], tmp_path)
    for _ in range(3):
        with profiler.step([]):
            work(0.05)
    for kernels in read_kernels(find_trace(tmp_path)).values():
        summary = summarize(kernels)
        assert 0 < summary.busy <= 1 and summary.communication == 0 and summary.kernels[0][2] >= 20
