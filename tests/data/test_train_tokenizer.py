"""`python -m tools.train_tokenizer`, run in this process."""

import sys

import pytest

from mla_jax.data.tokenizer import load_tokenizer
from tools import train_tokenizer


def _run(monkeypatch, *args: str) -> None:
    monkeypatch.setattr(sys, "argv", ["train_tokenizer", *args])
    train_tokenizer.main()


def test_without_a_corpus_it_is_the_built_in_one(tmp_path, monkeypatch, capsys):
    _run(monkeypatch, "--out", str(tmp_path / "t"))
    assert load_tokenizer(str(tmp_path / "t")).fingerprint == load_tokenizer("needle-bpe").fingerprint
    assert "507 tokens" in capsys.readouterr().out


def test_a_corpus_is_learned(tmp_path, monkeypatch):
    (tmp_path / "corpus" / "sub").mkdir(parents=True)
    (tmp_path / "corpus" / "sub" / "a.md").write_text("The zyzzyva is a weevil. " * 50)
    _run(monkeypatch, "--out", str(tmp_path / "t"), "--corpus", str(tmp_path / "corpus"), "--vocab-size", "600")
    tokenizer = load_tokenizer(str(tmp_path / "t"))
    assert len(tokenizer.encode(" zyzzyva")) == 1 and len(tokenizer.encode("2024")) == 4
    assert 507 < tokenizer.vocab_size <= 600


@pytest.mark.parametrize(
    ("args", "code", "named"),
    [
        (["--corpus", "empty"], 1, "no .txt or .md file"),
        (["--corpus", "nowhere"], 1, "is not a folder"),
        (["--vocab-size", "10"], 2, "at least 262"),
        (["--out", "used"], 2, "already holds a tokenizer"),
    ],
)
def test_bad_input_is_one_line(tmp_path, monkeypatch, capsys, args, code, named):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    load_tokenizer("bytes").save(tmp_path / "used")
    with pytest.raises(SystemExit) as stopped:
        _run(monkeypatch, "--out", "new", *args)
    assert stopped.value.code == code
    error = capsys.readouterr().err
    assert named in error and error.count("\n") == 1
    assert not (tmp_path / "new").exists()
