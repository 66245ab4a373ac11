"""What must be set before JAX starts: eight fake CPU devices, quick compilation. And how tests run tools."""

import gc
import io
import os
import shutil
import signal
import sys
import tempfile

import pytest

os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
# A device that waits for the others in a collective holds one of XLA's threads, by default one a device: where two
# collectives are ready at a time, devices that start with different ones would wait for each other.
os.environ.setdefault("NPROC", "64")
if shutil.which("nvidia-smi") is None:  # what runs on a GPU is tested as it runs there
    # Compiling takes longer than running: programs are optimised less, and compiled once for all tests, xdist's workers
    # and the processes that tests start, which inherit this. XLA passes the same to LLVM, which does less with it.
    os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
    os.environ["XLA_FLAGS"] += " --xla_cpu_use_fusion_emitters=false"  # those compile twice as long
    os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
    if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
        _compiled = tempfile.TemporaryDirectory(prefix="compiled-")
        os.environ["JAX_COMPILATION_CACHE_DIR"] = _compiled.name
_cache = tempfile.TemporaryDirectory(prefix="cache-")  # the user's own is not for tests, nor for processes they start
os.environ["XDG_CACHE_HOME"] = _cache.name
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:  # in a script's background; processes that tests start inherit it
    signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_collection_finish():
    """Tracing makes many objects that stay: cycles are looked for less often, and not in what was imported."""
    gc.freeze()
    gc.set_threshold(50_000, 20, 100)


@pytest.fixture
def call(monkeypatch, capsys):
    """Runs the `main` of a tool with arguments and this on stdin; returns exit code, stdout and stderr."""

    def run(tool, *arguments, stdin=""):
        monkeypatch.setattr(sys, "argv", ["tool", *map(str, arguments)])
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(stdin.encode(errors="surrogateescape"))))
        code = 0
        try:
            tool.main()
        except SystemExit as e:
            code = e.code
        return code, *capsys.readouterr()

    return run


@pytest.fixture(scope="module")
def browser():
    """A real Chromium, as the distribution has it."""
    playwright = pytest.importorskip("playwright.sync_api")
    path = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if path is None:
        pytest.skip("no Chromium on this machine; `make chromium` installs Debian's")
    with playwright.sync_playwright() as p:
        browser = p.chromium.launch(executable_path=path, args=["--no-sandbox"])  # which root needs
        yield browser
        browser.close()
