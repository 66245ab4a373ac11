"""The site of the documentation: built without a warning, complete on its own, readable and searchable in a browser."""

import functools
import http.server
import os
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGES = " architecture/ results/ api/latent_attention/ api/mla_jax.model/ CONTRIBUTING/ notebooks/mla_in_ten_minutes/"
pytestmark = pytest.mark.integration


def _build(out: Path, root: Path = ROOT) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "mkdocs", "build", "--site-dir", str(out)]
    environment = os.environ | {"NO_MKDOCS_2_WARNING": "1"}
    return subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, timeout=600)


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """The address of the site on this machine."""
    out = tmp_path_factory.mktemp("site")
    built = _build(out)
    assert built.returncode == 0, built.stderr
    assert "WARNING" not in built.stderr
    handler = type("Quiet", (http.server.SimpleHTTPRequestHandler,), {"log_message": lambda *_: None})
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(handler, directory=str(out)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_address[1]}"
    server.shutdown()


@pytest.mark.parametrize("width", [1280, 390])
def test_in_a_browser(browser, site, width):
    page = browser.new_page(viewport={"width": width, "height": 850})
    said, foreign = [], []
    page.on("console", lambda message: said.append(message.text))
    page.on("pageerror", lambda error: said.append(str(error)))
    page.on("request", lambda request: request.url.startswith(site) or foreign.append(request.url))
    for path in PAGES.split(" "):
        response = page.goto(f"{site}/{path}")
        assert response.status == 200, path
        assert page.evaluate("document.documentElement.scrollWidth") <= width, f"{path} scrolls sideways"
    page.goto(f"{site}/architecture/")
    formula = page.locator("math").first
    assert formula.is_visible() and formula.bounding_box()["height"] > 5
    page.get_by_role("link", name="mesh", exact=True).first.click()
    page.wait_for_url("**/source/mla_jax/mesh.py/")
    assert page.get_by_text("weight_sharding").first.is_visible()
    page.goto(f"{site}/?q=absorbed")
    result = page.locator(".md-search-result__link").first
    result.wait_for()
    assert "absorbed" in page.locator(".md-search-result").inner_text().lower()
    assert said == [] and foreign == []


def test_an_op_has_its_docstring_in_the_reference(browser, site):
    page = browser.new_page()
    page.goto(f"{site}/api/latent_attention/#latent_attention.dispatch.attention")
    text = page.locator("article").inner_text()
    assert "Causal multi-head attention over expanded keys and values" in text
    assert "softmax scale, the factor of q k^T before the softmax" in text


def test_a_broken_link_is_an_error(tmp_path):
    for name in ("docs", "kernels", "mla_jax"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("mkdocs.yml", "README.md", "CONTRIBUTING.md", "CHANGELOG.md", "SECURITY.md"):
        shutil.copy(ROOT / name, tmp_path)
    with open(tmp_path / "docs" / "glossary.md", "a") as page:
        page.write("\n[Nothing](../mla_jax/nothing.py), [nowhere](training.md#nowhere)\n")
    built = _build(tmp_path / "site", tmp_path)
    assert built.returncode != 0
    assert "mla_jax/nothing.py" in built.stderr and "#nowhere" in built.stderr
