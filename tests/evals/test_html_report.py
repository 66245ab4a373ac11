"""The report on one page: every cell with its numbers, nothing from elsewhere, and, in a real browser, readable."""

import dataclasses
import re
from html.parser import HTMLParser

import pytest

from mla_jax.errors import InputError
from mla_jax.evals.answers import Answer, Failure
from mla_jax.evals.cells import Cell
from mla_jax.evals.html_report import write_report
from mla_jax.evals.results import Results
from mla_jax.evals.stats import wilson_interval

PASSKEY = Results(
    task="passkey",
    title="Passkey retrieval",
    description="the key hidden at several depths",
    model={"name": "tiny", "step": 2700, "parameters": 420_000, "cache_bytes_per_token": 384, "trained_lengths": [256]},
    provenance={
        "date": "2026-11-29T10:33:43+00:00",
        "command": "python -m experiments.evaluate run=tiny",
        "git_revision": None,
        "hardware": "2 CPU cores (x86_64)",
    },
    seconds=23.5,
    config={"lengths": [256, 1024], "samples": 20, "cache_dtype": None},
    cells=tuple(
        Cell.counted({"length": length, "depth": depth}, 20, correct)
        for length, depth, correct in ((256, 0.0, 19), (256, 0.5, 20), (1024, 0.0, 0), (1024, 0.5, 7))
    ),
    failures=(Failure({"length": 256, "depth": 0.0}, 1_000_003, 77, "12345", " 12355 The grass"),),
)


def question(length: int, kind: str) -> Cell:
    """Two haystacks, two questions each, one answered wrongly."""
    other = {"present": "false_refusal", "absent": "hallucination"}[kind]
    scores = {"correct": (1.0, 0.0, 1.0, 1.0), other: (0.0, 1.0, 0.0, 0.0)}
    answers = tuple(
        Answer(f"{kind}: the number of fox {i}?", "not found", ("77", "78"), f"<b>7</b> & <script>alert({i})</script>")
        for i in range(4)
    )
    return Cell({"length": length, "question": kind}, scores, dict.fromkeys(scores, (1, 1, 2, 2)), answers)


HALLUCINATION = dataclasses.replace(
    PASSKEY,
    task="hallucination",
    title="Hallucination",
    description="numbers of keys that are there, `not found` for others",
    cells=tuple(question(length, kind) for length in (256, 512) for kind in ("present", "absent")),
    failures=(Failure({"length": 512, "question": "absent"}, 5, 1 << 40, "not found", "<b>7</b>"),),
)


class Page(HTMLParser):
    """The tables of a page as rows of texts, by caption; and everything that it loads or runs."""

    def __init__(self, html: str):
        super().__init__()
        self.tables: dict[str, list[list[str]]] = {}
        self.texts: list[str] = []
        self.elsewhere: list[str] = []
        self._open: list[str] = []
        self._rows: list[list[str]] = []
        self._caption = ""
        self.feed(html)
        assert self._open == [], "elements that are not closed"

    def handle_starttag(self, tag, attrs):
        if tag not in ("meta", "br"):
            self._open.append(tag)
        if tag in ("script", "img", "link", "iframe"):
            self.elsewhere.append(tag)
        self.elsewhere += [value for name, value in attrs if name in ("src", "href") and not value.startswith("#")]
        if tag == "table":
            self._rows, self._caption = [], ""
        elif tag == "tr":
            self._rows.append([])
        elif tag in ("td", "th"):
            self._rows[-1].append("")
        elif tag == "br" and self._rows and self._rows[-1]:
            self._rows[-1][-1] += " "

    def handle_endtag(self, tag):
        assert self._open.pop() == tag
        if tag == "table":
            self.tables[self._caption or f"table {len(self.tables)}"] = self._rows
        elif tag == "b" and self._rows:
            self._rows[-1][-1] += " "

    def handle_data(self, data):
        self.texts.append(data)
        if self._open[-1:] == ["caption"]:
            self._caption += data
        elif {"td", "th"} & set(self._open):
            self._rows[-1][-1] += data


def page_of(tmp_path, *results) -> Page:
    write_report(results, tmp_path / "report.html")
    return Page((tmp_path / "report.html").read_text(encoding="utf-8"))


def test_every_cell_has_its_rate_n_and_interval(tmp_path):
    page = page_of(tmp_path, PASSKEY, HALLUCINATION)
    head, *rows = page.tables["Passkey retrieval, correct, by depth and tokens of the prompt"]
    assert head == ["depth", "256", "1kbeyond training"]
    assert [row[0] for row in rows] == ["0%", "50%", "all"]
    assert [row[1].split()[:3] for row in rows] == [
        ["95.0", "%", "19/20"],
        ["100", "%", "20/20"],
        ["97.5", "%", "39/40"],
    ]
    low, high = (100 * end for end in wilson_interval(7, 20))
    assert rows[1][2] == f"35.0 % 7/20 {low:.1f} to {high:.1f} %"
    assert rows[0][2].startswith("0 % 0/20 0.0 to")
    head, *rows = page.tables["Hallucination, hallucination, by question and tokens of the prompt"]
    assert head == ["question", "256", "512beyond training"]
    assert [row[0] for row in rows] == ["absent", "present", "all"]
    assert rows[0][1].startswith("25.0 % of 4 ") and rows[2][2].startswith("25.0 % of 4 ")
    assert rows[1][1:] == ["\N{EN DASH}"] * 2, "a score that cells of present keys do not have"


def test_answers_that_are_partly_right_are_not_counted(tmp_path):
    cell = Cell({"length": 64, "task": "cwe"}, {"correct": (0.25, 1.0, 1.0)})
    page = page_of(tmp_path, dataclasses.replace(PASSKEY, cells=(cell,), failures=()))
    assert page.tables["Passkey retrieval, correct, by task and tokens of the prompt"][1][1].startswith("75.0 % of 3 ")


def test_the_first_table_has_every_score_of_every_task(tmp_path):
    page = page_of(tmp_path, PASSKEY, HALLUCINATION)
    _, *rows = page.tables["Means over all prompts of a task, with 95 % intervals."]
    assert [row[:3] for row in rows] == [
        ["Passkey retrieval", "correct", "57.5 %"],
        ["Hallucination", "correct", "75.0 %"],
        ["Hallucination", "false refusal", "25.0 %"],
        ["Hallucination", "hallucination", "25.0 %"],
    ]
    assert rows[0][4:] == ["80", "256, 1k", "2,700", "2026-11-29"]
    assert [row[4] for row in rows] == ["80", "16", "8", "8"]


def test_almost_all_is_not_all(tmp_path):
    cells = (
        Cell.counted({"length": 64, "depth": 0.5}, 5000, 4999),
        Cell.counted({"length": 64, "depth": 1.0}, 5000, 1),
    )
    page = page_of(tmp_path, dataclasses.replace(PASSKEY, cells=cells, failures=()))
    _, *rows = page.tables["Passkey retrieval, correct, by depth and tokens of the prompt"]
    assert rows[0][1].startswith("99.9 % 4999/5000 ") and rows[1][1].startswith("0.1 % 1/5000 ")


def test_wrong_answers_say_what_was_asked_and_how_to_make_it_again(tmp_path):
    page = page_of(tmp_path, PASSKEY, HALLUCINATION)
    text = "".join(page.texts)
    assert "256 tokens, depth 0%: 1 wrong" in text and "1k tokens, depth 50%: 13 wrong" not in text, "none was kept"
    assert "512 tokens, question absent: 1 wrong" in text
    rows = [row for table in page.tables.values() for row in table]
    assert ["", "12345", " 12355 The grass", "", "1000003, 77"] in rows
    wrong = "absent: the number of fox 1?", "not found", "<b>7</b> & <script>alert(1)</script>", "77, 78"
    assert [*wrong, "5, 1099511627776"] in rows and [*wrong, ""] in rows
    assert page_of(tmp_path, dataclasses.replace(PASSKEY, failures=())).texts.count("None.") == 1


def test_only_the_first_wrong_answers_and_beginnings_of_long_ones_are_shown(tmp_path):
    answers = tuple(Answer("Which?\n", "1", (), str(i) * 1001) for i in range(5))
    cell = Cell({"length": 64, "hops": 2}, {"correct": (0.0,) * 5}, {}, answers)
    page = page_of(tmp_path, dataclasses.replace(PASSKEY, cells=(cell,), failures=()))
    assert "64 tokens, hops 2: 5 wrong, the first 3" in page.texts
    shown = [
        row[2]
        for table in page.tables.values()
        for row in table
        if row[0] == "Which?\N{DOWNWARDS ARROW WITH CORNER LEFTWARDS}"
    ]
    assert shown == [str(i) * 1000 + " ..." for i in range(3)]


def test_where_numbers_come_from(tmp_path):
    texts = page_of(tmp_path, PASSKEY).texts
    for expected in ("python -m experiments.evaluate run=tiny", "2 CPU cores (x86_64)", "256, 1024", "none"):
        assert expected in texts
    assert "step 2,700, 0.42 M parameters, 384 bytes of KV cache a token, trained at up to 256 tokens" in texts


def test_results_of_before_versions_are_shown(tmp_path):
    old = dataclasses.replace(PASSKEY, model={"name": "old", "step": 1}, provenance={}, config={})
    assert page_of(tmp_path, old).texts.count("Evaluation of old") == 2  # title and heading


def test_nothing_comes_from_elsewhere(tmp_path):
    assert page_of(tmp_path, PASSKEY, HALLUCINATION).elsewhere == []
    html = (tmp_path / "report.html").read_text()
    assert not re.search(r"https?:|url\(|@import|javascript:", html)


def test_a_file_that_cannot_be_written(tmp_path):
    (tmp_path / "report.html").mkdir()
    with pytest.raises(InputError, match=r"could not write .*report\.html"):
        write_report([PASSKEY], tmp_path / "report.html")


@pytest.mark.integration
@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1280, 360])
def test_in_a_browser(browser, tmp_path, width, scheme):
    axe = pytest.importorskip("axe_playwright_python.sync_playwright")
    write_report([PASSKEY, HALLUCINATION], tmp_path / "report.html")
    page = browser.new_page(viewport={"width": width, "height": 800}, color_scheme=scheme)
    said, loaded = [], []
    page.on("console", lambda message: said.append(message.text))
    page.on("pageerror", lambda error: said.append(str(error)))
    page.on("request", lambda request: loaded.append(request.url))
    page.goto((tmp_path / "report.html").as_uri())
    squares = page.locator(".heat td b")
    assert squares.count() == 6 + 6 + 2 * 4, "two whole grids, and two scores that one kind of question has"
    assert squares.first.inner_text() == "95.0 %" and squares.first.is_visible()
    background = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (sum(map(int, re.findall(r"\d+", background))) > 3 * 127) == (scheme == "light")
    assert page.evaluate("document.documentElement.scrollWidth") <= width, "the page scrolls sideways"
    page.locator("summary", has_text="512 tokens, question absent").click()
    assert page.get_by_text("absent: the number of fox 1?").last.is_visible()
    page.get_by_role("link", name="Hallucination").click()
    assert page.url.endswith("#hallucination")
    assert len(page.screenshot(full_page=True)) > 20_000, "an empty picture"
    assert axe.Axe().run(page).response["violations"] == []
    assert said == [] and loaded == [(tmp_path / "report.html").as_uri()]
