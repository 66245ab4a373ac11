"""The grid as JSON, table and picture."""

import errno
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from matplotlib.figure import Figure

from mla_jax.errors import InputError
from mla_jax.evals.cells import Cell, totals_by_length
from mla_jax.evals.provenance import provenance
from mla_jax.evals.report import format_rates, format_table, plot_heatmap
from mla_jax.files import write_json
from mla_jax.lengths import format_length


def cell(length, depth, n, correct):
    return Cell.counted({"length": length, "depth": depth}, n, correct)


CELLS = [
    cell(256, 0.0, 20, 19),
    cell(256, 0.5, 20, 20),
    cell(256, 1.0, 20, 20),
    cell(1024, 0.0, 20, 0),
    cell(1024, 0.5, 20, 10),
    cell(1024, 1.0, 20, 20),
]


def test_totals_by_length_count_every_depth():
    assert totals_by_length(CELLS[::-1]) == [cell(256, None, 60, 59), cell(1024, None, 60, 30)]


def test_table():
    table = """\
depth     256 tokens       1k tokens
------------------------------------
   0%  19/20 [76-99]     0/20 [0-16]
  50%  20/20 [84-100]  10/20 [30-70]
 100%  20/20 [84-100]  20/20 [84-100]
------------------------------------
  all  59/60 [91-100]  30/60 [38-62]"""
    assert [line.split() for line in format_table(CELLS).splitlines() if "---" not in line] == [
        line.split() for line in table.splitlines() if "---" not in line
    ]
    assert len({len(line) for line in format_table(CELLS).splitlines()}) == 1


def test_table_of_another_param():
    cells = [Cell.counted({"length": 256, "hops": hops}, 4, 4 - hops) for hops in (2, 1)]
    assert [line.split()[:2] for line in format_table(cells).splitlines() if "---" not in line] == [
        ["hops", "256"],
        ["1", "3/4"],
        ["2", "2/4"],
        ["all", "5/8"],
    ]


@pytest.mark.parametrize(
    ("tokens", "text"),
    [(96, "96"), (1000, "1000"), (1024, "1k"), (131072, "128k"), (1048576, "1M"), (1572864, "1536k")],
)
def test_format_length(tokens, text):
    assert format_length(tokens) == text


def drawn(monkeypatch, cells, path, **arguments) -> tuple[Figure, set[str]]:
    """The figure that is saved and every text in its axes."""
    figures = []
    savefig = Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda self, *a, **k: (figures.append(self), savefig(self, *a, **k)))
    plot_heatmap(cells, path, title="Passkey: x", **arguments)
    axes = figures[0].axes[0]
    return figures[0], {text.get_text() for text in axes.texts}


def test_heatmap_shows_accuracy_n_and_interval(monkeypatch, tmp_path):
    path = tmp_path / "passkey.png"
    figure, texts = drawn(monkeypatch, CELLS, path, subtitle="step 7", trained_lengths=[64, 256])
    axes, bar = figure.axes
    assert {"95 %", "19/20  (76-99)", "0 %", "0/20  (0-16)", "50 %", "10/20  (30-70)"} <= texts
    assert {"98 %", "59/60  (91-100)"} <= texts  # totals; 98.3 % is rounded down
    assert [label.get_text() for label in axes.get_xticklabels()] == ["256", "1k"]
    assert [label.get_text() for label in axes.get_yticklabels()] == ["0 %", "50 %", "100 %", "all"]
    assert axes.get_ylim()[0] > axes.get_ylim()[1], "depth grows downwards"
    assert bar.get_ylim() == (0, 1), "the color scale is fixed"
    assert {"trained lengths", "longer than trained"} <= texts
    (divider,) = axes.lines
    assert list(divider.get_xdata()) == [0.5, 0.5]
    assert path.read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
    assert list(tmp_path.iterdir()) == [path]


def test_heatmap_of_one_cell_without_training(monkeypatch, tmp_path):
    figure, texts = drawn(monkeypatch, [cell(100, 0.25, 3, 0)], tmp_path / "x.png")
    assert texts == {"0 %", "0/3  (0-56)"}
    assert len(figure.axes[0].lines) == 0


@pytest.mark.parametrize("trained", [[2048], [128]])
def test_no_divider_when_all_or_no_lengths_were_trained(monkeypatch, tmp_path, trained):
    figure, texts = drawn(monkeypatch, CELLS, tmp_path / "x.png", trained_lengths=trained)
    assert len(figure.axes[0].lines) == 0
    assert ("trained lengths" in texts) == (trained == [2048])


def test_dark_cells_have_light_text(monkeypatch, tmp_path):
    figure, _ = drawn(monkeypatch, [cell(100, 0.0, 5, 5), cell(100, 1.0, 5, 0)], tmp_path / "x.png")
    inks = {text.get_text(): text.get_color() for text in figure.axes[0].texts}
    assert inks["5/5  (57-100)"] == "white"
    assert inks["0/5  (0-43)"] != "white"


def test_json_round_trip(tmp_path):
    path = tmp_path / "passkey.json"
    write_json(path, {"cells": [each.to_json() for each in CELLS]})
    first = json.loads(path.read_text())["cells"][0]
    assert first == {
        "length": 256,
        "depth": 0.0,
        "n": 20,
        "correct": 19,
        "accuracy": 0.95,
        "interval": [0.763869, 0.991119],
        "scores": {"correct": 19 * [1] + [0]},
    }


def test_full_disk_keeps_older_results(monkeypatch, tmp_path):
    path = tmp_path / "passkey.json"
    write_json(path, {"old": 1})

    def full(self: Path, text: str, **_):
        self.write_bytes(text[:3].encode())
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(
        InputError, match=r"could not write .*passkey\.json \(.*No space left on device\); .* free space"
    ):
        write_json(path, {"new": 2})
    assert json.loads(path.read_text()) == {"old": 1}
    assert list(tmp_path.iterdir()) == [path]


def test_provenance_names_command_and_commit(tmp_path):
    code = "import json; from mla_jax.evals.provenance import provenance; print(json.dumps(provenance()))"
    ran = subprocess.run(
        [sys.executable, "-c", code, "key=a b"], cwd=tmp_path, capture_output=True, text=True, check=True
    )
    found = json.loads(ran.stdout)
    assert found["command"].startswith("python -c ") and found["command"].endswith(" 'key=a b'")
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\+00:00", found["date"])
    assert found["git_revision"] is None or re.fullmatch(r"[0-9a-f]{40}(-dirty)?", found["git_revision"])
    assert "CPU" in found["hardware"] or " x " in found["hardware"]


def test_provenance_without_git(monkeypatch):
    monkeypatch.setenv("PATH", "")
    assert provenance()["git_revision"] is None


def test_rates_of_other_scores():
    cells = [
        Cell({"length": 256, "question": "absent"}, {"correct": (1, 0, 1, 1), "made_up": (0, 1, 0, 0)}),
        Cell({"length": 256, "question": "present"}, {"correct": (1, 1), "refused": (0, 0)}),
        Cell({"length": 1024, "question": "absent"}, {"correct": (0, 0), "made_up": (1, 1)}),
    ]
    lines = [line.split("  ") for line in format_rates(cells).splitlines()]
    table = [[text.strip() for text in line if text.strip()] for line in lines if "---" not in line[0]]
    assert table == [
        ["256 tokens", "1k tokens"],
        ["made up", "25.0% of 4 [5-70]", "100.0% of 2 [34-100]"],
        ["refused", "0.0% of 2 [0-66]", "-"],
    ]
    assert format_rates(CELLS) == ""
