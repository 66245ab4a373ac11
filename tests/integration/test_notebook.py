"""The notebook runs from start to end in a kernel, and what is stored in it is what comes out."""

import json
import shutil
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
NAME = "mla_in_ten_minutes.ipynb"
LARGEST = 200_000
"""Bytes of an output that may be stored."""


def printed(notebook) -> list[str]:
    """What each cell printed, but for the scores, which rounding may change on another CPU."""
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    texts = ["".join(each.text for each in cell.outputs if each.get("name") == "stdout") for cell in cells]
    return [text for text in texts if "95 % interval" not in text]


@pytest.mark.integration
def test_the_notebook_runs_and_says_what_is_stored(tmp_path):
    import nbformat
    from nbclient import NotebookClient

    for folder in ("notebooks", "weights", "examples"):
        shutil.copytree(ROOT / folder, tmp_path / folder)
    path = tmp_path / "notebooks" / NAME
    stored, executed = (nbformat.read(path, as_version=4) for _ in range(2))
    NotebookClient(
        executed, timeout=1200, kernel_name="python3", resources={"metadata": {"path": str(path.parent)}}
    ).execute()
    assert printed(executed) == printed(stored)
    everything = "".join(printed(executed))
    assert "The model writes: 19248." in everything and "False" not in everything
    images = [
        each for cell in executed.cells for each in cell.get("outputs", ()) if "image/png" in each.get("data", {})
    ]
    assert len(images) == 2
    outputs = [each for cell in stored.cells for each in cell.get("outputs", ())]
    assert outputs and max(len(json.dumps(each)) for each in outputs) <= LARGEST
