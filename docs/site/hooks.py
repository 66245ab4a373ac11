"""Hooks of MkDocs: pages and links that GitHub shows by itself, formulas, and the reference of the API.

On GitHub the pages of docs/ link to files of the repository, and formulas are written between dollars and backticks.
The site has a page for each file that a page links to, notebooks with what they printed and drew, and MathML, which
browsers draw without a script.
"""

import json
import posixpath
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from latex2mathml.converter import convert
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parents[2]
HOME = "README.md"
"""The file of the repository that is the site's first page."""
PACKAGES = {"latent_attention": ROOT / "kernels" / "latent_attention", "mla_jax": ROOT / "mla_jax"}
LANGUAGES = {".py": "python", ".yaml": "yaml", ".yml": "yaml", ".json": "json", ".sh": "bash", ".toml": "toml"}

_FENCE = re.compile(r"^(`{3,})(\w*)[^\n]*\n(.*?)^\1\s*$", re.MULTILINE | re.DOTALL)
_LINK = re.compile(r"(?<=\])\(([^()\s:]+)\)")
_FORMULA = re.compile(r"\$`([^`]+)`\$")
_NOTEBOOK_FORMULA = re.compile(r"\$(?P<block>\$)?\s*(?P<formula>[^$]+?)\s*\$(?(block)\$)")


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Lists the pages of the API after the others."""
    assert config.nav is not None
    config.nav.append({"API": [{uri.removeprefix("api/").removesuffix(".md"): uri} for uri, _ in _api_pages()]})
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Adds the first page, the pages of the API, and of files that pages link to."""
    files.append(File.generated(config, "index.md", content=(ROOT / HOME).read_text()))
    for uri, content in _api_pages():
        files.append(File.generated(config, uri, content=content))
    waiting = [file for file in files.documentation_pages() if not file.src_uri.startswith("api/")]
    while waiting:
        file = waiting.pop()
        for path in _linked(_repository_path(file.src_uri), file.content_string):
            uri = _uri(path)
            if files.get_file_from_path(uri) is None and (ROOT / path).exists():
                page = File.generated(config, uri, content=_content(path))
                files.append(page)
                waiting += [page] if path.endswith((".md", ".ipynb")) else []
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Links lead to pages of the site, and formulas are MathML."""
    here = page.file.src_uri
    if here.startswith("api/") or here.startswith("source/"):
        return markdown

    def link(match: re.Match) -> str:
        target, mark, anchor = match[1].partition("#")
        if not target:
            return match[0]
        path = posixpath.normpath(posixpath.join(posixpath.dirname(_repository_path(here)), target))
        uri = posixpath.relpath(_uri(path), posixpath.dirname(here) or ".")
        return f"({uri}{mark}{anchor})"

    def prose(text: str) -> str:
        text = _FORMULA.sub(lambda match: _mathml(match[1], "inline"), text)
        return _LINK.sub(link, text)

    return _outside_fences(markdown, prose)


def _outside_fences(markdown: str, change: Callable[[str], str]) -> str:
    """A page whose text outside code is changed, and whose blocks of formulas are MathML."""
    parts, last = [], 0
    for fence in _FENCE.finditer(markdown):
        parts.append(change(markdown[last : fence.start()]))
        formula = f'\n<div class="formula">{_mathml(fence[3], "block")}</div>\n' if fence[2] == "math" else fence[0]
        parts.append(formula)
        last = fence.end()
    return "".join([*parts, change(markdown[last:])])


def _mathml(formula: str, display: str) -> str:
    """A formula in LaTeX as MathML, `inline` or as a `block`."""
    formula = formula.strip().replace("{aligned}", "{align*}")  # GitHub's and latex2mathml's names of one environment
    # A bar would end a cell of a table, an underscore or asterisk would be taken for emphasis.
    return convert(formula, display=display).replace("|", "&#124;").replace("_", "&#95;").replace("*", "&#42;")


def _repository_path(uri: str) -> str:
    """The file of the repository that a page shows."""
    if uri == "index.md":
        return HOME
    notebook = uri.removesuffix(".md") + ".ipynb"
    if (ROOT / notebook).exists():
        return notebook
    return f"docs/{uri}" if (ROOT / "docs" / uri).exists() else uri


def _uri(path: str) -> str:
    """The page of a file of the repository; files of docs/ that are no pages stay what they are."""
    if path == HOME:
        return "index.md"
    if path.startswith("docs/"):
        return path.removeprefix("docs/")
    if path.endswith(".ipynb"):
        return path.removesuffix(".ipynb") + ".md"
    return path if path.endswith(".md") and "/" not in path else f"source/{path.lstrip('.')}.md"


def _linked(origin: str, markdown: str) -> Iterator[str]:
    """Files of the repository that a page links to."""
    for match in _LINK.finditer(_FENCE.sub("", markdown)):
        target = match[1].partition("#")[0]
        path = posixpath.normpath(posixpath.join(posixpath.dirname(origin), target))
        if target and not path.startswith(("docs/", "..")):
            yield path


def _content(path: str) -> str:
    """The page of a file or folder of the repository, which the search leaves out unless it is prose."""
    file = ROOT / path
    if path.endswith(".ipynb"):
        return _notebook(json.loads(file.read_text()))
    if path.endswith(".md") and "/" not in path:
        return file.read_text()
    if file.is_dir():
        shown = [each for each in file.iterdir() if not each.name.startswith((".", "__"))]
        names = sorted(each.name + "/" * each.is_dir() for each in shown)
        body = "\n".join(f"- `{name}`" for name in names)
    else:
        text = file.read_text()
        fence = "`" * max(3, 1 + max(map(len, re.findall(r"`+", text)), default=0))
        body = f"{fence}{LANGUAGES.get(file.suffix, 'text')}\n{text.rstrip()}\n{fence}"
    return f"---\nsearch:\n  exclude: true\n---\n\n# {path}\n\n{body}\n"


def _notebook(notebook: dict[str, Any]) -> str:
    """A notebook as Markdown, with formulas as GitHub's pages have them."""

    def formula(match: re.Match) -> str:
        return f"\n```math\n{match['formula']}\n```\n" if match["block"] else f"$`{match['formula']}`$"

    parts = []
    for cell in notebook["cells"]:
        text = "".join(cell["source"])
        if cell["cell_type"] == "markdown":
            parts.append(_NOTEBOOK_FORMULA.sub(formula, text))
            continue
        parts.append(f"```python\n{text}\n```")
        for output in cell["outputs"]:
            data = output.get("data", {})
            if "image/png" in data:
                parts.append(f"![What this cell draws](data:image/png;base64,{''.join(data['image/png']).strip()})")
            else:
                parts.append(f"```text\n{''.join(output.get('text', data.get('text/plain', ''))).rstrip()}\n```")
    return "\n\n".join(parts) + "\n"


def _api_pages() -> Iterator[tuple[str, str]]:
    """A page for `latent_attention`, for the modules of `mla_jax` itself, and for each of its packages."""
    for name, folder in PACKAGES.items():
        packages = [folder, *(each for each in sorted(folder.iterdir()) if (each / "__init__.py").exists())]
        for package in packages:
            module = ".".join([name, *package.relative_to(folder).parts])
            modules = sorted(
                ".".join([module, *each.relative_to(package).with_suffix("").parts])
                for each in (package.glob("*.py") if package == folder else package.rglob("*.py"))
                if not each.name.startswith("_")
            )
            blocks = "\n\n".join(f"::: {each}" for each in modules)
            yield f"api/{module}.md", f"# {module}\n\n{_docstring(package)}\n\n{blocks}\n"


def _docstring(package: Path) -> str:
    """The docstring of a package, read without importing it; empty if it has none."""
    found = re.match(r'r?"""(.*?)"""', (package / "__init__.py").read_text(), re.DOTALL)
    return found[1].strip() if found else ""
