"""Eight fake CPU devices for the mesh tests, which must be set before JAX starts, and how tests run tools."""

import io
import os
import sys

import pytest

os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"


@pytest.fixture
def call(monkeypatch, capsys):
    """Runs the `main` of a tool with arguments and this on stdin; returns exit code, stdout and stderr."""

    def run(tool, *arguments, stdin=""):
        monkeypatch.setattr(sys, "argv", ["tool", *map(str, arguments)])
        monkeypatch.setattr(sys, "stdin", io.StringIO(stdin))
        code = 0
        try:
            tool.main()
        except SystemExit as e:
            code = e.code
        return code, *capsys.readouterr()

    return run
