"""Results of every kind as one Markdown table."""

import dataclasses
import sys

import pytest

from mla_jax.errors import InputError
from mla_jax.evals.cells import NATS, Cell
from mla_jax.evals.results import Results
from mla_jax.evals.results_table import read_runs, results_table
from mla_jax.files import write_json
from tools import results_table as tool


def evaluation(task: str, title: str, *cells: Cell, date: str = "2026-12-01T10:00:00+00:00", **source) -> Results:
    model = {"name": "tiny", "step": 7}
    provenance = {"hardware": "1 x H200", "jax": "0.11.2", "git_revision": "abc", "date": date} | source
    return Results(task, title, "", model, provenance, 1.0, {}, cells, ())


def passkey(right: int, length: int = 131072) -> Results:
    """110 prompts at 11 depths, of which the first ones are answered right."""
    cells = [
        Cell.counted({"length": length, "depth": depth / 10}, 10, min(max(right - 10 * depth, 0), 10))
        for depth in range(11)
    ]
    return evaluation("passkey", "Passkey retrieval", *cells)


HALLUCINATION = evaluation(
    "hallucination",
    "Hallucination",
    Cell({"length": 8192, "question": "present"}, {"correct": (1.0,) * 40, "false_refusal": (0.0,) * 40}),
    Cell({"length": 8192, "question": "absent"}, {"correct": (1,) * 39 + (0,), "hallucination": (0,) * 39 + (1,)}),
)
HASHHOP = evaluation(
    "hashhop",
    "HashHop",
    *(Cell.counted({"length": length, "hops": hops}, 40, 40 // hops) for length in (8192, 32768) for hops in (1, 2)),
)
RULER = evaluation("ruler", "RULER", Cell({"length": 8192, "task": "vt"}, {"correct": (0.8,) * 10}))
PERPLEXITY = evaluation(
    "perplexity",
    "Perplexity by position",
    *(
        Cell({"length": 32768, "position": part}, {"correct": (0.5, 0.5)}, measures={NATS: (0.0, 0.0)})
        for part in (0.25, 0.75)
    ),
)


def save(run, *results: Results) -> None:
    for each in results:
        write_json(run / "eval" / f"{each.task}.json", each.to_json())


def rows(table: str) -> list[list[str]]:
    """Cells of the rows below the head."""
    lines = [line for line in table.splitlines() if line.startswith("|")]
    assert set(lines[1]) == set("| -") and len({line.count("|") for line in lines}) == 1
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:]]


def test_every_kind_of_result(tmp_path):
    save(tmp_path / "run", passkey(109), passkey(110, 8192), HALLUCINATION, HASHHOP, RULER, PERPLEXITY)
    save(tmp_path / "run", dataclasses.replace(passkey(109), cells=passkey(110, 8192).cells + passkey(109).cells))
    table = results_table(read_runs([tmp_path / "run"]))
    assert table.splitlines()[0] == "| correct/n [95 % interval in %] | 8k | 32k | 128k |"
    assert rows(table) == [
        ["Hallucination, question absent", "39/40 [87-100]", "", ""],
        ["Hallucination, question present", "40/40 [91-100]", "", ""],
        ["Hallucination: false refusal", "0.0% of 40 [0-9]", "", ""],
        ["Hallucination: hallucination", "2.5% of 40 [0-13]", "", ""],
        ["HashHop, hops 1", "40/40 [91-100]", "40/40 [91-100]", ""],
        ["HashHop, hops 2", "20/40 [35-65]", "20/40 [35-65]", ""],
        ["Passkey retrieval", "110/110 [97-100]", "", "109/110 [95-100]"],
        ["Perplexity by position", "", "1 [1-1]", ""],
        ["RULER, task vt", "8/10 [49-94]", "", ""],
    ]
    assert table.endswith("\n5 evaluations: 1 x H200, JAX 0.11.2, commit abc, 2026-12-01\n")


def test_runs_and_folders_in_them_have_a_row_each(tmp_path):
    for name, right in (("seed-0", 110), ("seed-0/int8", 108), ("seed-1", 109)):
        save(tmp_path / "proof" / name, passkey(right))
    expected = [
        ["Passkey retrieval", "seed-0", "110/110 [97-100]"],
        ["Passkey retrieval", "seed-0/int8", "108/110 [94-99]"],
        ["Passkey retrieval", "seed-1", "109/110 [95-100]"],
    ]
    assert rows(results_table(read_runs([tmp_path / "proof"]))) == expected
    seeds = [tmp_path / "proof" / name for name in ("seed-0", "seed-1", "seed-0")]
    assert rows(results_table(read_runs(seeds))) == expected
    alone = rows(results_table(read_runs([tmp_path / "proof" / "seed-0"])))
    assert [row[1] for row in alone] == ["seed-0", "int8"]


def test_each_source_is_named_with_its_days(tmp_path):
    later = dataclasses.replace(HASHHOP, provenance=HASHHOP.provenance | {"date": "2026-12-03T00:00:00+00:00"})
    other = dataclasses.replace(RULER, provenance=RULER.provenance | {"git_revision": "def"})
    table = results_table({"run": [passkey(110), later, other]})
    assert table.splitlines()[-3:] == [
        "2 evaluations: 1 x H200, JAX 0.11.2, commit abc, 2026-12-01 to 2026-12-03",
        "",
        "1 evaluation: 1 x H200, JAX 0.11.2, commit def, 2026-12-01",
    ]


def run_tool(monkeypatch, *arguments) -> None:
    monkeypatch.setattr(sys, "argv", ["results_table", *map(str, arguments)])
    tool.main()


def test_the_tool_names_what_has_no_results_or_damaged_ones(tmp_path, monkeypatch, capsys):
    save(tmp_path / "good", passkey(110))
    run_tool(monkeypatch, tmp_path / "good")
    assert rows(capsys.readouterr().out) == [["Passkey retrieval", "110/110 [97-100]"]]
    for name, content, expected in (
        ("nothing", None, "has no results"),
        ("bad", '{"cells', "bad/eval/passkey.json cannot"),
    ):
        (tmp_path / name / "eval").mkdir(parents=True)
        if content:
            (tmp_path / name / "eval" / "passkey.json").write_text(content)
        with pytest.raises(SystemExit) as ended:
            run_tool(monkeypatch, tmp_path / "good", tmp_path / name)
        out, err = capsys.readouterr()
        assert ended.value.code == 1 and out == "" and err.count("\n") == 1 and expected in err
    with pytest.raises(InputError, match="bad"):
        read_runs([tmp_path])
