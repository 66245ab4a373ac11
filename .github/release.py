"""Checks that a tag may become a release, and writes its notes: `python .github/release.py v1.2.3 NOTES.md`.

The tag must be the version in pyproject.toml and in CITATION.cff, and CHANGELOG.md must have a dated section on it.
"""

import re
import sys
import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def notes(tag: str, root: Path = ROOT) -> str:
    """The changelog's section on a tag. Raises ValueError if something does not fit the tag."""
    version = tomllib.loads((root / "pyproject.toml").read_text(encoding="utf-8"))["project"]["version"]
    if tag != f"v{version}":
        raise ValueError(f"the tag is {tag}, pyproject.toml has version {version}: expected v{version}")
    cited = re.search(r"^version: (\S+)$", (root / "CITATION.cff").read_text(encoding="utf-8"), re.M)
    if cited is None or cited[1] != version:
        raise ValueError(f"CITATION.cff has version {cited and cited[1]}, expected {version}")
    sections = re.split(r"^## ", (root / "CHANGELOG.md").read_text(encoding="utf-8"), flags=re.M)[1:]
    for section in sections:
        heading, _, body = section.partition("\n")
        if re.fullmatch(rf"{re.escape(version)} \(\d{{4}}-\d\d-\d\d\)", heading.strip()):
            if not body.strip():
                raise ValueError(f"CHANGELOG.md says nothing about {version}")
            return body.strip() + "\n"
    raise ValueError(f"CHANGELOG.md has no section '## {version} (YYYY-MM-DD)'")


if __name__ == "__main__":
    try:
        Path(sys.argv[2]).write_text(notes(sys.argv[1]), encoding="utf-8")
    except ValueError as e:
        sys.exit(f"error: {e}")
