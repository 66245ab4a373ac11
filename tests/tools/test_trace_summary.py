"""The summary of a trace, on one written by hand."""

import gzip
import json
import subprocess
import sys
from pathlib import Path

import pytest

from mla_jax.errors import InputError
from tools.trace_summary import find_trace, read_kernels, summarize

ROOT = Path(__file__).resolve().parent.parent.parent
GPU, CPU, COMPUTE, NCCL, OPS = 1, 2, 11, 12, 13


def name(kind: str, pid: int, text: str, tid: int = 0) -> dict:
    return {"ph": "M", "name": kind, "pid": pid, "tid": tid, "args": {"name": text}}


def event(pid: int, tid: int, text: str, start: float, duration: float) -> dict:
    return {"ph": "X", "pid": pid, "tid": tid, "name": text, "ts": start, "dur": duration}


EVENTS = [
    name("process_name", GPU, "/device:GPU:0"),
    name("process_name", CPU, "/host:CPU"),
    name("thread_name", GPU, "Stream #20(Compute)", COMPUTE),
    name("thread_name", GPU, "Stream #21(Compute)", NCCL),
    name("thread_name", GPU, "XLA Ops", OPS),
    name("thread_name", CPU, "Stream of thoughts", COMPUTE),
    event(GPU, COMPUTE, "gemm", 1000, 300),
    event(GPU, COMPUTE, "gemm", 1400, 200),
    event(GPU, NCCL, "ncclDevKernel_AllGather_RING_LL", 1500, 300),  # 100 us beside gemm, 200 us alone
    event(GPU, COMPUTE, "fusion", 1900, 100),
    event(GPU, COMPUTE, "MemcpyD2H", 1300, 100),  # a copy is no kernel
    event(GPU, OPS, "dot.1", 0, 5000),  # shown a second time
    event(CPU, COMPUTE, "python", 0, 5000),
]


@pytest.fixture
def trace(tmp_path) -> Path:
    path = tmp_path / "profile" / "plugins" / "profile" / "2026_01_01" / "host.trace.json.gz"
    path.parent.mkdir(parents=True)
    path.write_bytes(gzip.compress(json.dumps({"traceEvents": [*EVENTS, {}]}).encode()))
    return path


def test_shares_and_kernels(trace):
    kernels = read_kernels(trace)
    assert list(kernels) == ["/device:GPU:0"]
    summary = summarize(kernels["/device:GPU:0"])
    assert summary.seconds == pytest.approx(1000e-6)
    assert summary.busy == pytest.approx(0.8)  # 1000 to 1300, 1400 to 1800, 1900 to 2000
    assert summary.communication == pytest.approx(0.3) and summary.exposed == pytest.approx(0.2)
    assert [(n, pytest.approx(s * 1e6), r) for n, s, r in summary.kernels] == [
        ("gemm", 500, 2),
        ("ncclDevKernel_AllGather_RING_LL", 300, 1),
        ("fusion", 100, 1),
    ]


def test_the_command_prints_the_newest_trace_of_a_folder(trace, tmp_path):
    command = [sys.executable, "-m", "tools.trace_summary", str(tmp_path / "profile"), "--top", "1"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert "/device:GPU:0: 0.001 s, busy 80.0%, communication 30.0% (exposed 20.0%)" in done.stdout
    assert "2 x gemm" in done.stdout and "fusion" not in done.stdout


def test_what_is_no_trace_is_named(tmp_path):
    with pytest.raises(InputError, match=r"holds no \.trace\.json\.gz; train\.profile="):
        find_trace(tmp_path)
    broken = tmp_path / "x.trace.json.gz"
    broken.write_bytes(b"not gzip")
    with pytest.raises(InputError, match="is not a trace of jax.profiler"):
        read_kernels(find_trace(tmp_path))
    broken.write_bytes(gzip.compress(b'{"traceEvents": []}'))
    with pytest.raises(InputError, match="holds no kernels of a GPU"):
        read_kernels(broken)
