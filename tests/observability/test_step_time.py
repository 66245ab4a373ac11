"""Where the time went: the clock's kinds, the account over restarts, samples of NVML, the traced steps."""

import json
import sys
import time
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import pytest

from mla_jax.observability import gpu_utilization, step_time
from mla_jax.observability.goodput import FILE, Goodput
from mla_jax.observability.gpu_utilization import DeviceBusy
from mla_jax.observability.profiling import StepProfiler
from mla_jax.observability.step_time import KINDS, StepClock


@pytest.fixture
def at(monkeypatch):
    """A clock that tests set: at.now."""
    moment = SimpleNamespace(now=100.0)
    monkeypatch.setattr(step_time.time, "monotonic", lambda: moment.now)
    return moment


class Step:
    """A step's result that is ready or not."""

    def __init__(self, ready: bool):
        self.is_ready = lambda: ready


def test_kinds_add_up_to_the_wall_time(at):
    clock = StepClock()
    at.now += 1
    for kind, seconds in (("checkpoint", 2), ("other", 4), ("compile", 8), ("checkpoint", 16)):
        with clock.spend(kind):
            at.now += seconds
    at.now += 32
    assert clock.seconds() == {"compute": 33, "data": 0, "compile": 8, "checkpoint": 18, "other": 4}


@pytest.mark.parametrize(
    ("given", "waited"),
    [
        ([], 5),  # nothing was dispatched: the device has nothing to do
        ([{"loss": Step(True)}], 5),
        ([{"loss": Step(True)}, {"loss": Step(False)}], 0),  # the newest step still runs
    ],
)
def test_a_wait_for_data_counts_if_the_device_ran_out_of_work(at, given, waited):
    clock = StepClock()
    with clock.wait_for_data(given):
        at.now += 5
    assert clock.seconds()["data"] == waited and sum(clock.seconds().values()) == 5


def spent(**seconds: float) -> dict[str, float]:
    return dict.fromkeys(KINDS, 0.0) | seconds


def test_an_interrupted_run_loses_what_followed_its_checkpoint(tmp_path):
    now = SimpleNamespace(t=1000.0)
    first = Goodput(tmp_path, 0, now=lambda: now.t)
    now.t += 100  # 30 s of start-up
    first.mark(4, spent(compute=40, compile=10))
    shares = first.update(spent(compute=55, compile=10, checkpoint=5))
    assert shares["goodput"] == 0.55 and shares["restart"] == pytest.approx(0.3) and shares["lost"] == 0
    # Killed here; 100 s later the next process starts at step 4.
    now.t += 100
    second = Goodput(tmp_path, 4, now=lambda: now.t)
    now.t += 50
    shares = second.update(spent(compute=45, data=5))
    assert shares["goodput"] == pytest.approx((40 + 45) / 250)
    assert shares["lost"] == pytest.approx(15 / 250) and shares["data"] == pytest.approx(5 / 250)
    assert shares["restart"] == pytest.approx((30 + 100) / 250) and sum(shares.values()) == pytest.approx(1)
    # A third one finds step 4 damaged and starts anew.
    third = Goodput(tmp_path, 0, now=lambda: now.t)
    shares = third.update(spent())
    assert shares["goodput"] == 0 and shares["lost"] == pytest.approx((15 + 40 + 45) / 250)


def test_an_earlier_checkpoint_may_be_restored(tmp_path):
    first = Goodput(tmp_path, 0)
    for step in (4, 8, 12):
        first.mark(step, spent(compute=10.0 * step))
    Goodput(tmp_path, 8)
    saved = json.loads((tmp_path / FILE).read_text())
    assert saved["seconds"]["compute"] == 80 and saved["seconds"]["lost"] == 40
    assert [step for step, _ in saved["marks"]] == [4, 8]


def test_the_account_stays_small_and_survives_damage(tmp_path, capsys):
    account = Goodput(tmp_path, 0)
    for step in range(1, 200):
        account.mark(step, spent(compute=step))
    assert [s for s, _ in json.loads((tmp_path / FILE).read_text())["marks"]] == list(range(150, 200))
    (tmp_path / FILE).write_text("{")
    assert Goodput(tmp_path, 199).update(spent())["lost"] == 0
    assert "goodput is counted from now on" in capsys.readouterr().out


def test_only_one_process_writes(tmp_path):
    Goodput(tmp_path, 0, write=False).mark(1, spent(compute=1))
    assert not (tmp_path / FILE).exists()


class Nvml:
    """As pynvml, of four GPUs; `uses` is what the GPU of a handle says."""

    class NVMLError(Exception):
        """Its base error."""

    def __init__(self, **uses):
        self.uses = uses
        self.nvmlInit = lambda: None
        self.nvmlDeviceGetCount = lambda: 4
        self.nvmlDeviceGetHandleByIndex = lambda i: f"gpu{i}"
        self.nvmlDeviceGetHandleByUUID = lambda uuid: uuid

    def nvmlDeviceGetUtilizationRates(self, handle):
        if handle not in self.uses:
            raise self.NVMLError("gone")
        return SimpleNamespace(gpu=self.uses[handle])


def sampled(nvml, monkeypatch, visible: str | None) -> float | None:
    """What two local GPUs, CUDA's second and first, are measured at."""
    gpus = [SimpleNamespace(platform="gpu", local_hardware_id=i) for i in (1, 0)]
    monkeypatch.setattr(gpu_utilization.jax, "local_devices", lambda: gpus)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    busy = DeviceBusy(nvml, every=0.001)
    while busy._thread is not None and busy._thread.is_alive() and not busy._samples:
        time.sleep(0.001)
    busy.close()
    return busy.mean()


@pytest.mark.parametrize(
    ("visible", "share"), [(None, 0.3), ("2,3", 0.9), ("GPU-a, GPU-b", 0.1)], ids=["all", "numbers", "uuids"]
)
def test_gpus_are_those_that_cuda_shows(visible, share, monkeypatch):
    nvml = Nvml(gpu0=20, gpu1=40, gpu2=80, gpu3=100, **{"GPU-a": 20, "GPU-b": 0})
    assert sampled(nvml, monkeypatch, visible) == pytest.approx(share)


def test_nvml_that_fails_or_is_missing_gives_no_samples(monkeypatch, capsys):
    assert sampled(Nvml(), monkeypatch, None) is None
    assert "no longer measured: NVML says gone" in capsys.readouterr().out
    assert sampled(None, monkeypatch, None) is None
    monkeypatch.setitem(sys.modules, "pynvml", None)
    assert gpu_utilization.find_nvml() is None


def test_a_trace_holds_the_steps_asked_for(monkeypatch, tmp_path):
    calls = []
    monkeypatch.setattr(jax.profiler, "start_trace", lambda folder, **_: calls.append("start"))
    monkeypatch.setattr(jax.profiler, "stop_trace", lambda: calls.append("stop"))
    profiler = StepProfiler([2, 3], tmp_path)
    for number in range(1, 6):
        with profiler.step([{"loss": jnp.float32(0)}]):
            calls.append(number)
    assert calls == [1, "start", 2, 3, "stop", 4, 5]


def test_a_trace_ends_with_training(monkeypatch, tmp_path):
    calls = []
    monkeypatch.setattr(jax.profiler, "start_trace", lambda folder, **_: calls.append("start"))
    monkeypatch.setattr(jax.profiler, "stop_trace", lambda: calls.append("stop"))
    profiler = StepProfiler([1, 9], tmp_path)
    with profiler.step([]):
        pass
    profiler.close()
    profiler.close()
    assert calls == ["start", "stop"]
