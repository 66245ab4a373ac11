"""Runs the tests of what changed since the branch left BASE: `python tests/changed.py BASE [PYTEST'S OPTIONS]`.

A module's tests are the files that import it, else its room's. After a minute they are stopped.
"""

import re
import signal
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
RULES = {
    r".*\.(md|ipynb)|mkdocs\.yml": "tests/test_docs.py",
    r"(conf|mla_jax/config)/.*": "tests/test_config.py",
    r"experiments/.*": "tests/test_entry.py",
    r"\.github/.*": "tests/test_workflows.py",
    r"pyproject\.toml|setup\.py": "tests/test_packaging.py",
}
"""Tests beside a module's own, by a regular expression of the path."""
MOST = 6
"""Of a module that more test files import than these, its room's count."""
SECONDS = 60
"""The time after which tests are stopped."""


def select(changed: list[str], test_files: dict[str, str]) -> list[str]:
    """The test files, or folders of them, of these files.

    Args:
        changed: paths in the repository.
        test_files: texts of all test files by path.
    """
    found = {test for path in changed for pattern, test in RULES.items() if re.fullmatch(pattern, path)}
    for path in changed:
        if path in test_files:
            found.add(path)
        elif path.endswith(".py"):
            naming, room = _naming(path, test_files), _room(path, test_files)
            if len(naming) > MOST:
                naming = {test for test in naming if room and test.startswith(room)}
            found |= {"tests/test_imports.py", *(naming or {room} - {None})}
    return sorted(found)


def _naming(path: str, test_files: dict[str, str]) -> set[str]:
    """The test files that import the module of a path."""
    module = re.sub(r"^(kernels|tests)/|(/__init__)?\.py$", "", path).replace("/", ".")
    package, _, name = module.rpartition(".")
    whole = rf"from {re.escape(module)} import|import {re.escape(module)}\b"
    part = rf"|from {re.escape(package)} import [^\n]*\b{name}\b" if package else ""
    pattern = re.compile(rf"^\s*({whole}{part})", re.MULTILINE)
    return {test for test, text in test_files.items() if pattern.search(text)}


def _room(path: str, test_files: dict[str, str]) -> str | None:
    """The deepest folder of tests that mirrors the folder of a path; None if none does."""
    folder = Path(path.replace("latent_attention/", "").removeprefix("mla_jax/")).parent
    mirrors = (f"tests/{each}/" for each in (folder, *folder.parents) if each != Path())
    return next((mirror for mirror in mirrors if any(test.startswith(mirror) for test in test_files)), None)


def _git(*arguments: str) -> list[str]:
    return subprocess.run(["git", *arguments], cwd=ROOT, check=True, capture_output=True, text=True).stdout.splitlines()


def main(base: str, *options: str) -> int:
    """Runs pytest; its exit code, which is 2 where the time was over before all tests had run."""
    (since,) = _git("merge-base", base, "HEAD")
    changed = [*_git("diff", "--name-only", since), *_git("ls-files", "--others", "--exclude-standard")]
    test_files = {str(each.relative_to(ROOT)): each.read_text() for each in ROOT.glob("tests/**/test_*.py")}
    tests = select(changed, {test: text for test, text in test_files.items() if not test.startswith("tests/gpu/")})
    print("the tests of what changed:", *tests or ["none"], flush=True)
    if not tests:
        return 0
    pytest = subprocess.Popen([sys.executable, "-m", "pytest", *options, *tests], cwd=ROOT)
    try:
        return pytest.wait(SECONDS)
    except subprocess.TimeoutExpired:
        pytest.send_signal(signal.SIGINT)
        pytest.wait()
        print(f"stopped after {SECONDS} s: not all of them have run; `make test` runs everything")
        return 2


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
