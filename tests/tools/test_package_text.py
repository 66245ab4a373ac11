"""The text of installed packages: real docstrings, cut to length; what is held out is nowhere else."""

import gzip
import inspect
import json

from tools import package_text


def test_docstrings_are_cut_and_some_are_held_out(call, tmp_path, monkeypatch):
    packages = tmp_path / "packages"
    packages.mkdir()
    sentence = "A sentence of several words that says what this returns. " * 4
    for i in range(60):
        docstrings = (
            f'"""Module {i}. {sentence}"""',
            f'def f():\n    """Of f in {i}.\n\n    {sentence}\n    {sentence}\n    """',
        )
        (packages / f"m{i}.py").write_text("\n\n".join((*docstrings, 'class C:\n    """short"""\n')))
    (packages / "broken.py").write_text("def (")
    (packages / "again.py").write_text((packages / "m0.py").read_text())
    monkeypatch.setattr(package_text.sysconfig, "get_path", lambda name: str(packages))
    code, _, err = call(package_text, tmp_path / "texts", "--characters", 400)
    assert code == 0, err
    held_out, calibration = ((tmp_path / "texts" / f"{name}.txt").read_text() for name in ("held_out", "calibration"))
    pieces = [json.loads(line)["completion"] for line in (tmp_path / "texts" / "texts.jsonl").read_text().splitlines()]
    assert (held_out.count("Module "), calibration.count("Module ")) == (2, 58)
    assert max(map(len, pieces)) <= 400 and "".join(pieces).count("Of f in ") == 58
    assert not any(f"Module {i}." in calibration for i in range(60) if f"Module {i}." in held_out)
    assert "short" not in calibration and inspect.cleandoc(sentence) in calibration
    code, _, err = call(package_text, tmp_path / "texts")
    assert code == 1 and "exists; choose another folder" in err


def test_documents_are_read_as_text(call, tmp_path):
    folder = tmp_path / "documents"
    (folder / "_sources").mkdir(parents=True)
    said = " ".join(["What the page says, in words that go on for a while."] * 5)
    head = "<html><head><title>no</title><body><script>no()</script>"
    body = f"<h1>Title &amp; more</h1><p>{said}\nand\n <b>on</b></p><pre>two\n  lines</pre></body></html>"
    (folder / "a.html").write_text(head + body)
    (folder / "b.rst.gz").write_bytes(gzip.compress(f"Plain. {said}".encode()))
    (folder / "again.txt").write_text(f"Plain. {said}")
    (folder / "_sources" / "a.rst.txt").write_text(f"The source. {said}")
    (folder / "latin.txt").write_bytes(f"caf\xe9 {said}".encode("latin-1"))
    (folder / "broken.txt.gz").write_bytes(b"no gzip")
    (folder / "picture.png").write_bytes(b"no text")
    code, _, err = call(package_text, tmp_path / "texts", "--documents", folder)
    assert code == 0, err
    held_out, calibration = ((tmp_path / "texts" / f"{name}.txt").read_text() for name in ("held_out", "calibration"))
    page = f"Title & more\n\n{said} and on\n\ntwo\n  lines"
    assert {held_out, calibration} == {f"Plain. {said}", page}
    code, _, err = call(package_text, tmp_path / "none", "--documents", tmp_path / "texts" / "no")
    assert code == 1 and "no .txt" in err and not (tmp_path / "none").exists()
    (tmp_path / "one").mkdir()
    (tmp_path / "one" / "a.txt").write_text(said)
    code, _, err = call(package_text, tmp_path / "none", "--documents", tmp_path / "one")
    assert code == 1 and "at least 2 are needed" in err and not (tmp_path / "none").exists()
