"""What the pages say is where they say it is: links lead somewhere, names are defined in the file they link to."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md")])
LINK = re.compile(r"\[(?P<text>[^\]]*)\]\((?P<target>[^)\s]+)\)")


def defined(tree: ast.Module) -> set[str]:
    """Dotted names of the functions, classes, methods and assigned names of a module."""
    names = set()

    def visit(body: list[ast.stmt], prefix: str) -> None:
        for node in body:
            if isinstance(node, ast.FunctionDef | ast.ClassDef):
                names.add(prefix + node.name)
            if isinstance(node, ast.ClassDef):
                visit(node.body, f"{prefix}{node.name}.")
            targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
            names.update(prefix + t.id for t in targets if isinstance(t, ast.Name))

    visit(tree.body, "")
    return names


def links(page: Path) -> list[tuple[str, str]]:
    """(text, target) of the links to files of the repository."""
    found = [(m["text"], m["target"]) for m in LINK.finditer(page.read_text(encoding="utf-8"))]
    return [(text, target) for text, target in found if not target.startswith(("http://", "https://", "#"))]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    missing = [target for _, target in links(page) if not (page.parent / target.split("#")[0]).exists()]
    assert missing == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_linked_names_are_defined_in_the_file(page):
    wrong = []
    for text, target in links(page):
        name = re.fullmatch(r"`([\w.]+)`", text)
        if name and target.endswith(".py") and not target.endswith("__init__.py"):
            tree = ast.parse((page.parent / target).read_text(encoding="utf-8"))
            if name[1] not in defined(tree):
                wrong.append(f"{name[1]} in {target}")
    assert wrong == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_anchors_are_headings(page):
    text = page.read_text(encoding="utf-8")
    headings = [re.sub(r"[^\w\- ]", "", h.lower()).replace(" ", "-") for h in re.findall(r"^#+ (.+)$", text, re.M)]
    anchors = [m["target"][1:] for m in LINK.finditer(text) if m["target"].startswith("#")]
    assert [anchor for anchor in anchors if anchor not in headings] == []


def test_the_map_names_every_tool():
    (row,) = (line for line in (ROOT / "README.md").read_text().splitlines() if line.startswith("| `tools/` |"))
    named = re.findall(r"`(\w+)`", row)
    runnable = [path.stem for path in (ROOT / "tools").rglob("*.py") if "__main__" in path.read_text()]
    assert sorted(named) == sorted(runnable)


def test_every_page_has_its_place_in_the_site():
    listed = set(re.findall(r"[\w-]+\.md", (ROOT / "mkdocs.yml").read_text()))
    assert {page.name for page in (ROOT / "docs").glob("*.md")} <= listed
