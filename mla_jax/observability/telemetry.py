"""Telemetry of a training run: metrics, timing, utilisation, goodput; docs/training.md has definitions."""

import contextlib
import sys
from collections.abc import Iterator
from pathlib import Path

import jax

import latent_attention
from mla_jax.config import RunConfig
from mla_jax.distributed.join import is_main
from mla_jax.hardware import GIB, nominal_peak, peak_memory
from mla_jax.observability.flops import measured_peak, train_flops
from mla_jax.observability.goodput import Goodput
from mla_jax.observability.gpu_utilization import DeviceBusy, find_nvml
from mla_jax.observability.profiling import StepProfiler
from mla_jax.observability.step_time import KINDS, StepClock
from mla_jax.observability.trackers import Trackers

Results = list[dict[str, jax.Array]]


class Telemetry:
    """Measures the training loop of this process and hands all metrics to the trackers.

    Nothing here waits for the device, but for the two ends of a trace.

    Args:
        config: the run's configuration.
        run_dir: the run folder, which must exist.
        step: finished steps that this process starts from.
        logits: tokens of a row that get logits, for the count of FLOPs; None for all.

    Raises:
        InputError: a tracker cannot start.
    """

    def __init__(self, config: RunConfig, run_dir: Path, step: int, logits: int | None = None):
        self._config, self._logits = config, logits
        first = is_main()
        device = jax.devices()[0]
        peaks = {"mfu": nominal_peak(device.device_kind)}
        if first and config.train.measure_peak and device.platform == "gpu":
            peaks["mfu_of_measured_peak"] = measured_peak()
        self._peaks = {name: peak * jax.device_count() for name, peak in peaks.items() if peak is not None}
        self._trackers = Trackers(config, run_dir, step)
        self._profiler = StepProfiler(config.train.profile if first else [], run_dir / "profile")
        self._goodput = Goodput(run_dir, step, write=first)
        self._busy = DeviceBusy(find_nvml() if first else None)
        self.clock = StepClock()
        self._window_start = self.clock.seconds()
        self._saved = 0.0  # seconds of the clock at the last checkpoint
        self._shapes: set[tuple[int, ...]] = set()
        self._attention: set[str] = set()
        self._tokens, self._flops, self._steps = 0, 0.0, 0
        self.tokens_per_second = 0.0
        """Speed in the last window that was reported."""

    @contextlib.contextmanager
    def dispatch(self, shape: tuple[int, ...], pending: Results) -> Iterator[None]:
        """Around the call of a training step.

        Args:
            shape: [A, B / A, T] of the batch, over all processes.
            pending: results of steps dispatched and not yet read; the step's own are added inside.
        """
        accumulation, rows, seq_len = shape
        self._tokens += accumulation * rows * seq_len
        self._flops += train_flops(self._config.model, accumulation * rows, seq_len, self._logits)
        self._steps += 1
        compiles = self.clock.spend("compile") if shape not in self._shapes else contextlib.nullcontext()
        self._shapes.add(shape)
        with self._profiler.step(pending), compiles:
            yield
        self._report_attention()

    def _report_attention(self) -> None:
        """Prints once which implementation of attention was chosen; warns if that leaves a GPU without its kernels."""
        for name, refused in latent_attention.choices("attention").items():
            if name in self._attention or not is_main():
                continue
            self._attention.add(name)
            print(f"Attention runs on {name} (model.attention=auto)", flush=True)
            if name in ("xla", "reference") and jax.default_backend() == "gpu":
                reasons = "; ".join(f"{other}: {reason}" for other, reason in refused.items())
                print(f"warning: attention falls back to {name}, which is slow on a GPU ({reasons})", file=sys.stderr)

    @contextlib.contextmanager
    def saving(self, step: int) -> Iterator[None]:
        """Around the saving of the checkpoint of `step`, from when its steps were read from the device."""
        self._goodput.mark(step, self.clock.seconds())
        with self.clock.spend("checkpoint"):
            yield
        self._saved = sum(self.clock.seconds().values())

    def report(self, step: int, metrics: dict[str, float], validation: dict[str, float]) -> str:
        """Logs `metrics` (by name, under `train/`) with those of the window that ends here, and starts a new one.

        `validation` holds those on held-out data, if they were measured at this step, by their whole names.

        Call it when the results of all steps so far were read from the device.

        Returns:
            Speed for the progress line.
        """
        total = self.clock.seconds()
        spent = {kind: total[kind] - self._window_start[kind] for kind in KINDS}
        wall = sum(spent.values())
        self.tokens_per_second = self._tokens / wall
        memory = peak_memory()
        mfu = {name: self._flops / wall / peak for name, peak in self._peaks.items()}
        goodput = self._goodput.update(total)
        measured = (
            {
                "train/tokens_per_second": self.tokens_per_second,
                "time/step_seconds": wall / self._steps,
                "time/run_seconds": self._goodput.wall,
                "time/since_checkpoint_seconds": sum(total.values()) - self._saved,
                "utilisation/tflops_per_device": self._flops / wall / jax.device_count() / 1e12,
                "utilisation/device_busy": self._busy.mean(),
                "memory/peak_gib": memory and memory / GIB,
            }
            | {f"time/{kind}": seconds / wall for kind, seconds in spent.items()}
            | {f"utilisation/{name}": share for name, share in mfu.items()}
            | {f"goodput/{name}": share for name, share in goodput.items()}
        )
        self._window_start = total
        self._tokens, self._flops, self._steps = 0, 0.0, 0
        with self.clock.spend("other"):
            self._trackers.log(
                step,
                {f"train/{name}": value for name, value in metrics.items()}
                | validation
                | {name: value for name, value in measured.items() if value is not None},
            )
        return f"{self.tokens_per_second:,.0f} tokens/s" + (f"  MFU {mfu['mfu']:.1%}" if "mfu" in mfu else "")

    def close(self, finished: bool) -> None:
        """Ends what runs beside training; `finished` is False if training stops before its end."""
        self._goodput.update(self.clock.seconds())
        self._profiler.close()
        self._busy.close()
        self._trackers.close(finished)
