"""Summarises a trace of training steps by GPU: `python -m tools.trace_summary RUN/profile [--top 15]`.

Prints for each GPU the share of time in which a kernel ran, the share in which communication (NCCL) ran and the part of
it during which nothing else did, and the kernels that took longest.
"""

import argparse
import gzip
import json
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from mla_jax.errors import InputError, one_line_errors


class Kernel(NamedTuple):
    """One run of a kernel; times in microseconds."""

    name: str
    start: float
    end: float

    @property
    def communicates(self) -> bool:
        """Whether it is a kernel of NCCL."""
        return "nccl" in self.name.lower()


class Summary(NamedTuple):
    """The work of one GPU between the start of its first kernel and the end of its last one."""

    seconds: float
    busy: float
    """Share of the time in which at least one kernel ran; copies do not count."""
    communication: float
    """Share of the time in which communication ran."""
    exposed: float
    """Share of the time in which communication ran and no other kernel."""
    kernels: list[tuple[str, float, int]]
    """(name, seconds, runs), longest first."""


def find_trace(path: Path) -> Path:
    """The newest `.trace.json.gz` under a folder, or `path` itself if it is a file.

    Raises:
        InputError: there is none.
    """
    if path.is_file():
        return path
    found = sorted(path.rglob("*.trace.json.gz"), key=lambda p: p.stat().st_mtime)
    if not found:
        raise InputError(f"{path} holds no .trace.json.gz; train.profile=[10,13] writes one to RUN/profile")
    return found[-1]


def read_kernels(trace: Path) -> dict[str, list[Kernel]]:
    """Kernels by GPU ("/device:GPU:0") of a trace that jax.profiler wrote.

    Raises:
        InputError: the file cannot be read, or holds no kernel of a GPU.
    """
    try:
        with gzip.open(trace, "rt", encoding="utf-8") as file:
            events = json.load(file)["traceEvents"]
    except (OSError, EOFError, ValueError, KeyError, TypeError) as e:
        raise InputError(f"{trace} is not a trace of jax.profiler ({e})") from e
    named = [e for e in events if e.get("ph") == "M"]
    gpus = {e["pid"]: e["args"]["name"] for e in named if e["name"] == "process_name" and "GPU" in e["args"]["name"]}
    # Other rows of a GPU ("XLA Ops", "Steps") show the same time again.
    streams = {
        (e["pid"], e["tid"]) for e in named if e["name"] == "thread_name" and e["args"]["name"].startswith("Stream")
    }
    kernels = defaultdict(list)
    for e in events:
        on_stream = e.get("ph") == "X" and e["pid"] in gpus and (e["pid"], e["tid"]) in streams
        if on_stream and not e["name"].startswith(("Memcpy", "Memset")):
            kernels[gpus[e["pid"]]].append(Kernel(e["name"], e["ts"], e["ts"] + e.get("dur", 0)))
    if not kernels:
        raise InputError(f"{trace} holds no kernels of a GPU")
    return dict(sorted(kernels.items()))


def summarize(kernels: list[Kernel]) -> Summary:
    """Shares and sums of one GPU's kernels, of which there is at least one."""
    span = max(k.end for k in kernels) - min(k.start for k in kernels)
    busy = _covered(kernels)
    runs = defaultdict(list)
    for k in kernels:
        runs[k.name].append(k.end - k.start)
    longest = sorted(((name, sum(t) / 1e6, len(t)) for name, t in runs.items()), key=lambda row: -row[1])
    return Summary(
        seconds=span / 1e6,
        busy=busy / span,
        communication=_covered(k for k in kernels if k.communicates) / span,
        exposed=(busy - _covered(k for k in kernels if not k.communicates)) / span,
        kernels=longest,
    )


def _covered(kernels: Iterable[Kernel]) -> float:
    """Microseconds in which at least one of the kernels ran."""
    total, end = 0.0, float("-inf")
    for k in sorted(kernels, key=lambda k: k.start):
        total += max(k.end - max(k.start, end), 0.0)
        end = max(end, k.end)
    return total


def main() -> None:
    """Reads the command line and prints the summary of every GPU."""
    parser = argparse.ArgumentParser(
        prog="python -m tools.trace_summary", description="Summarises a trace of training steps by GPU."
    )
    parser.add_argument("trace", type=Path, help="a folder, of which the newest trace is read, or a .trace.json.gz")
    parser.add_argument("--top", type=int, default=15, help="how many kernels to list")
    args = parser.parse_args()
    with one_line_errors():
        trace = find_trace(args.trace)
        print(trace)
        for gpu, kernels in read_kernels(trace).items():
            s = summarize(kernels)
            print(
                f"\n{gpu}: {s.seconds:.3f} s, busy {s.busy:.1%}, communication {s.communication:.1%} "
                f"(exposed {s.exposed:.1%})"
            )
            for name, seconds, runs in s.kernels[: args.top]:
                print(f"{seconds * 1e3:10.2f} ms {seconds / s.seconds:6.1%} {runs:7} x {name[:100]}")


if __name__ == "__main__":
    main()
