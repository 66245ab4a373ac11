"""Simulates autoscaling of pods that serve long contexts.

`python -m tools.bench.autoscaling [--plot FILE] [--json FILE]`. Requests of 1k to 1M tokens reach pods, each of which
reads one prompt at a time, first come, first served. An autoscaler sees what Prometheus scraped and decides as the
controller does (tools/bench/hpa.py). Compared are the metrics that it may go by.
"""

import argparse
import bisect
import dataclasses
import json
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import yaml

from experiments.entry import compose_config
from mla_jax.errors import one_line_errors
from mla_jax.hardware import NOMINAL_PEAK
from mla_jax.inference.serving_plan import PREFILL_SHARE
from mla_jax.observability.flops import forward_flops
from tools.bench.hpa import DEFAULT_DOWN, DEFAULT_UP, SYNC, Controller, Direction, external, of_pods

HPA = Path("deploy/kubernetes/components/hpa/horizontalpodautoscaler.yaml")
STARTS = 150.0
"""Seconds from a pod's creation until it takes requests: scheduling, checksums, loading, compilation."""
ANSWER = 1.0
"""Seconds to write an answer: 500 tokens at 2 ms."""
SCRAPE = 15.0
"""Seconds that metrics are old at most."""
WAITING = 5.0
"""Requests waiting a pod, the target of scaling on those."""
PLOTTED = ("requests waiting, default behaviour", "requests in flight", "ours: queued tokens, in flight")
MINUTE, HOUR = 60.0, 3600.0
LONG = 0.05
"""Share of requests of 32k to 1M tokens; the others have 1k to 32k. Both are spread evenly over the logarithm."""


@dataclasses.dataclass
class Pod:
    """Of each request that it got: when reading began, when its answer began and ended, and its tokens."""

    ready: float
    free: float = 0.0
    begin: list[float] = dataclasses.field(default_factory=list)
    first: list[float] = dataclasses.field(default_factory=list)
    end: list[float] = dataclasses.field(default_factory=list)
    tokens: list[int] = dataclasses.field(default_factory=list)

    def take(self, now: float, tokens: int, reading: float) -> float:
        """Queues a request, and gives the seconds until its reading begins."""
        begin = max(now, self.free)
        self.free = begin + reading
        self.begin.append(begin)
        self.first.append(self.free)
        self.end.append(self.free + ANSWER)
        self.tokens.append(tokens)
        return begin - now

    def waiting(self, now: float) -> int:
        """Requests whose reading has not begun."""
        return len(self.begin) - bisect.bisect_right(self.begin, now)

    def in_flight(self, now: float) -> int:
        """Requests that are not answered."""
        return len(self.end) - bisect.bisect_right(self.end, now)

    def queued_tokens(self, now: float) -> int:
        """Prompt tokens of requests whose answer has not begun."""
        return sum(self.tokens[bisect.bisect_right(self.first, now) :])


@dataclasses.dataclass(frozen=True)
class Scaler:
    """An autoscaler: what replicas a metric wants, and its controller."""

    name: str
    wants: Callable[[float, list[Pod], int, float], int]
    """Of (time of the scrape, ready pods, pods that start, mean tokens of finished requests) the replicas wanted."""
    up: Direction
    down: Direction


def scalers(manifest: dict) -> list[Scaler]:
    """Those compared; ours as in the manifest."""
    spec = manifest["spec"]
    up, down = (Direction.of(spec["behavior"][side]) for side in ("scaleUp", "scaleDown"))
    targets = {m["pods"]["metric"]["name"]: m["pods"]["target"]["averageValue"] for m in spec["metrics"]}
    tokens = float(targets["vllm_queued_prompt_tokens"].replace("k", "e3"))
    flight = float(targets["vllm_requests_in_flight"])

    def by(value: Callable[[Pod, float], float], target: float):
        return lambda at, pods, starting, _: of_pods(
            [value(pod, at) for pod in pods], starting, target, len(pods) + starting
        )

    def both(at, pods, starting, _):
        n = len(pods) + starting
        return max(
            of_pods([pod.queued_tokens(at) for pod in pods], starting, tokens, n),
            of_pods([pod.in_flight(at) for pod in pods], starting, flight, n),
        )

    def estimated(at, pods, starting, mean):
        n = len(pods) + starting
        return max(
            of_pods([pod.waiting(at) * mean for pod in pods], starting, tokens, n),
            of_pods([pod.in_flight(at) for pod in pods], starting, flight, n),
        )

    def keda(at, pods, starting, _):
        n = len(pods) + starting
        return max(
            external(sum(pod.queued_tokens(at) for pod in pods), tokens, n),
            external(sum(pod.in_flight(at) for pod in pods), flight, n),
        )

    waiting = by(Pod.waiting, WAITING)
    return [
        Scaler("nothing: always the most", lambda *_: spec["maxReplicas"], DEFAULT_UP, DEFAULT_DOWN),
        Scaler("requests waiting, default behaviour", waiting, DEFAULT_UP, DEFAULT_DOWN),
        Scaler("requests waiting", waiting, up, down),
        Scaler("requests in flight", by(Pod.in_flight, flight), up, down),
        Scaler("ours: queued tokens, in flight", both, up, down),
        Scaler("ours, tokens estimated", estimated, up, down),
        Scaler("KEDA: queued tokens, in flight", keda, up, down),
    ]


LOADS: dict[str, tuple[float, Callable[[float], float]]] = {
    "step": (3 * HOUR, lambda t: 3.0 if HOUR <= t < 2 * HOUR else 0.7),
    "burst": (3 * HOUR, lambda t: 4.0 if t % HOUR < 5 * MINUTE and t >= HOUR else 0.7),
    "diurnal": (24 * HOUR, lambda t: 1.6 - 1.3 * math.cos(2 * math.pi * t / (24 * HOUR))),
}
"""Seconds, and requests a second at a time."""


def arrivals(load: str, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Times and prompt lengths of a load: a Poisson process of its rate."""
    seconds, rate = LOADS[load]
    rng = np.random.default_rng(seed)
    most = max(rate(t) for t in np.arange(0, seconds, MINUTE))
    times = np.sort(rng.uniform(0, seconds, rng.poisson(most * seconds)))
    times = times[rng.uniform(0, most, len(times)) < [rate(t) for t in times]]
    long = rng.random(len(times)) < LONG
    exponent = np.where(long, rng.uniform(15, 20, len(times)), rng.uniform(10, 15, len(times)))
    return times, (2**exponent).astype(int)


def reading_seconds(lengths: np.ndarray) -> np.ndarray:
    """Seconds to read prompts of these lengths in tokens, by `infinite_1b` on an H200."""
    model = compose_config(["model=infinite_1b"]).model
    rate = PREFILL_SHARE * NOMINAL_PEAK["NVIDIA H200"]
    one, two = (forward_flops(model, 1, n, logits=1) / rate for n in (1024, 2048))
    quadratic = (two - 2 * one) / (2 * 1024**2)  # FLOPs are linear and quadratic in the tokens
    return (one / 1024 - quadratic * 1024) * lengths + quadratic * lengths.astype(float) ** 2


@dataclasses.dataclass
class Result:
    """The outcome of one simulation: seconds of waiting by request, and (time, pods) at each change of their number."""

    load: str
    scaler: str
    seed: int
    waits: np.ndarray
    replicas: list[tuple[float, int]]
    gpu_hours: float

    @property
    def changes(self) -> int:
        """How often the number of replicas changed."""
        return len(self.replicas) - 1

    @property
    def reversals(self) -> int:
        """How often it rose after it had fallen."""
        signs = np.sign(np.diff([n for _, n in self.replicas]))
        return int((np.diff(signs) > 0).sum())

    def row(self) -> dict:
        """The figures of the table."""
        p50, p95, p99 = np.percentile(self.waits, [50, 95, 99])
        return {
            "load": self.load, "scaler": self.scaler, "p50": p50, "p95": p95, "p99": p99, "changes": self.changes,
            "reversals": self.reversals, "most": max(n for _, n in self.replicas), "gpu_hours": self.gpu_hours,
            "requests": len(self.waits),
        }  # fmt: skip


def simulate(scaler: Scaler, load: str, seed: int, minimum: int, maximum: int) -> Result:
    """Runs a load to its end; requests go to the pod with fewer in flight of two drawn at random."""
    times, lengths = arrivals(load, seed)
    reading = reading_seconds(lengths)
    rng = np.random.default_rng(seed + 1)
    controller = Controller(minimum, maximum, scaler.up, scaler.down)
    pods = [Pod(ready=0.0) for _ in range(minimum)]
    history, waits, gpu_seconds = [(0.0, minimum)], [], 0.0
    next_sync = SYNC
    for done, (time, tokens, seconds) in enumerate(zip(times, lengths, reading, strict=True)):
        while next_sync <= time:
            at = next_sync - SCRAPE
            ready = [pod for pod in pods if pod.ready <= at]
            mean = float(lengths[max(0, done - 2000) : done].mean()) if done else 0.0
            wanted = scaler.wants(at, ready, len(pods) - len(ready), mean)
            replicas = controller.decide(next_sync, len(pods), wanted)
            gpu_seconds += SYNC * len(pods)
            if replicas != len(pods):
                history.append((next_sync, replicas))
            while len(pods) < replicas:
                pods.append(Pod(ready=next_sync + STARTS))
            while len(pods) > replicas:  # those that start go first, then the newest; a pod that goes ends what it has
                gone = pods.pop()
                gpu_seconds += max(0.0, gone.free - next_sync)
            next_sync += SYNC
        serving = [pod for pod in pods if pod.ready <= time]
        first, second = rng.integers(0, len(serving), 2)
        pod = min(serving[first], serving[second], key=lambda pod: pod.in_flight(time))
        waits.append(pod.take(time, int(tokens), float(seconds)))
    return Result(load, scaler.name, seed, np.array(waits), history, gpu_seconds / HOUR)


def means(results: list[Result]) -> list[dict]:
    """A row for each load and scaler: the means over seeds."""
    rows = [result.row() for result in results]
    pairs = dict.fromkeys((row["load"], row["scaler"]) for row in rows)
    return [
        {"load": load, "scaler": scaler}
        | {
            key: float(np.mean([row[key] for row in rows if (row["load"], row["scaler"]) == (load, scaler)]))
            for key in rows[0]
            if key not in ("load", "scaler")
        }
        for load, scaler in pairs
    ]


def table(rows: list[dict]) -> str:
    """The means as Markdown."""
    lines = [
        "| load | scales on | p95 wait | p99 wait | changes | rises after a fall | most pods | GPU hours |",
        "|---|---|---:|---:|---:|---:|---:|---:|",
    ]
    lines += [
        f"| {r['load']} | {r['scaler']} | {r['p95']:.0f} s | {r['p99']:.0f} s | {r['changes']:.0f} "
        f"| {r['reversals']:.0f} | {r['most']:.0f} | {r['gpu_hours']:.0f} |"
        for r in rows
    ]
    return "\n".join(lines)


def plot(results: list[Result], path: Path) -> None:
    """Replicas over time, and the pods that the load keeps busy, a panel for each load."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(len(LOADS), 1, figsize=(9, 3 * len(LOADS)), layout="constrained")
    for axis, (load, (seconds, rate)) in zip(axes, LOADS.items(), strict=True):
        mean = reading_seconds(arrivals(load, 0)[1]).mean()
        grid = np.arange(0, seconds, MINUTE)
        axis.fill_between(grid / HOUR, [rate(t) * mean for t in grid], color="0.85", label="pods that reading takes")
        for result in (r for r in results if r.load == load and r.scaler in PLOTTED):
            at = [t / HOUR for t, _ in result.replicas] + [seconds / HOUR]
            n = [n for _, n in result.replicas] + [result.replicas[-1][1]]
            axis.step(at, n, where="post", label=result.scaler, alpha=0.9, linewidth=1.2)
        axis.set(title=load, ylabel="pods", xlim=(0, seconds / HOUR), ylim=(0, None))
    axes[-1].set_xlabel("hours")
    figure.legend(*axes[0].get_legend_handles_labels(), fontsize=8, loc="outside lower center", ncols=4)
    figure.savefig(path, dpi=110)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m tools.bench.autoscaling", description="Simulates autoscaling of pods that serve long contexts."
    )
    parser.add_argument("--loads", nargs="+", choices=LOADS, default=list(LOADS), help="default: all")
    parser.add_argument("--seeds", type=int, default=5, help="of arrivals and lengths: 0, 1 ... (default: 5 of them)")
    parser.add_argument("--plot", type=Path, help="a picture of the replicas over time")
    parser.add_argument("--json", type=Path, help="the table's figures")
    args = parser.parse_args()
    with one_line_errors():
        manifest = yaml.safe_load(HPA.read_text())
        limits = manifest["spec"]["minReplicas"], manifest["spec"]["maxReplicas"]
        runs = [(load, scaler) for load in args.loads for scaler in scalers(manifest)]
        results = [simulate(scaler, load, seed, *limits) for load, scaler in runs for seed in range(args.seeds)]
        rows = means(results)
        print(table(rows))
        if args.json:
            args.json.write_text(json.dumps(rows, indent=1) + "\n")
        if args.plot:
            plot([result for result in results if result.seed == 0], args.plot)


if __name__ == "__main__":
    main()
