"""Which tags may become a release, and what its notes are."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
CHANGELOG = """# Changelog

## Unreleased

## 1.2.3 (2026-12-24)

- **Kernels**: faster.

## 1.2.2 (2026-11-01)

- Old.
"""


@pytest.fixture
def repository(tmp_path):
    (tmp_path / ".github").mkdir()
    (tmp_path / ".github" / "release.py").write_text((ROOT / ".github" / "release.py").read_text())
    (tmp_path / "pyproject.toml").write_text('[project]\nversion = "1.2.3"\n')
    (tmp_path / "CITATION.cff").write_text("cff-version: 1.2.0\nversion: 1.2.3\n")
    (tmp_path / "CHANGELOG.md").write_text(CHANGELOG)
    return tmp_path


def release(repository: Path, tag: str) -> subprocess.CompletedProcess:
    command = [sys.executable, repository / ".github" / "release.py", tag, repository / "NOTES.md"]
    return subprocess.run(command, capture_output=True, text=True)


def test_the_notes_are_the_section_of_the_version(repository):
    assert release(repository, "v1.2.3").returncode == 0
    assert (repository / "NOTES.md").read_text() == "- **Kernels**: faster.\n"


@pytest.mark.parametrize(
    ("file", "old", "new", "said"),
    [
        ("pyproject.toml", "1.2.3", "1.2.4", "the tag is v1.2.3, pyproject.toml has version 1.2.4: expected v1.2.4"),
        ("CITATION.cff", "version: 1.2.3", "version: 1.2.2", "CITATION.cff has version 1.2.2, expected 1.2.3"),
        ("CITATION.cff", "\nversion: 1.2.3", "", "CITATION.cff has version None, expected 1.2.3"),
        ("CHANGELOG.md", "1.2.3 (2026-12-24)", "1.2.3", "has no section '## 1.2.3 (YYYY-MM-DD)'"),
        ("CHANGELOG.md", "- **Kernels**: faster.\n", "", "CHANGELOG.md says nothing about 1.2.3"),
    ],
)
def test_what_does_not_fit_the_tag_is_named(repository, file, old, new, said):
    text = (repository / file).read_text()
    assert old in text
    (repository / file).write_text(text.replace(old, new))
    done = release(repository, "v1.2.3")
    assert done.returncode == 1 and said in done.stderr and "Traceback" not in done.stderr
    assert not (repository / "NOTES.md").exists()


@pytest.mark.parametrize("tag", ["1.2.3", "v1.2", "v1.2.3-rc1", ""])
def test_other_tags_are_refused(repository, tag):
    assert "expected v1.2.3" in release(repository, tag).stderr


def test_this_version_is_cited():
    cited = [line for line in (ROOT / "CITATION.cff").read_text().splitlines() if line.startswith("version:")]
    version = [line for line in (ROOT / "pyproject.toml").read_text().splitlines() if line.startswith("version")]
    assert cited[0].split()[1] == version[0].split('"')[1]
