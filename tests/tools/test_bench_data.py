"""The tool that times data: it reads records and texts as training does, and says what it measured."""

import json
import re

import pytest

from tools.bench import data


@pytest.mark.parametrize("kind", ["records", "texts"])
def test_data_are_timed_and_named_where_they_cannot_be_used(tmp_path, call, monkeypatch, kind):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    folder = tmp_path / kind
    folder.mkdir()
    line = json.dumps({"prompt": "a", "completion": "b c."}) + "\n"
    (folder / ("a.jsonl" if kind == "records" else "a.txt")).write_text(line * 50)
    options = ["--text"] if kind == "texts" else []
    code, out, _ = call(data, folder, *options, "--tokenizer", "bytes", "--seq-len", 256, "--batches", 2)
    assert code == 0
    assert re.search(r"first batch of 0.0 MB after [\d.]+ s, .*\n2 batches in .* M tokens/s\npeak memory \d+ MiB", out)
    code, _, error = call(data, tmp_path / "nowhere", *options)
    assert code == 1 and error.startswith("error: ") and "nowhere is not a f" in error
