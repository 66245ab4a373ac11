"""The cache of encoded data: what it holds is what would be made anew, and no damage to it goes unnoticed."""

import errno
import gzip
import json
import logging
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from counting_records import count_and_encode
from mla_jax.config import JsonlDataConfig, StageConfig
from mla_jax.data import jsonl, record_files, token_cache, workers
from mla_jax.data.jsonl import Documents, load_documents
from mla_jax.data.pipeline import make_pipeline
from mla_jax.data.records import encode_record
from mla_jax.data.tokenizer import Tokenizer, load_tokenizer
from mla_jax.errors import InputError
from processes import printed_by

BYTES = load_tokenizer("bytes")
RECORDS = [{"prompt": f"Is {i} {'very ' * (i % 7)}odd?", "completion": f" {bool(i % 2)}, {i}"} for i in range(300)]


@pytest.fixture
def chats(tmp_path):
    """A file of records."""
    path = tmp_path / "chats.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in RECORDS))
    return path


@pytest.fixture
def cache(tmp_path):
    return tmp_path / "cache"


def _load(path, cache, tokenizer=BYTES, **options) -> Documents:
    return load_documents(str(path), tokenizer, cache_dir=str(cache), **options)


def _content(documents: Documents) -> list[tuple]:
    return [tuple(array.tolist() for array in documents[i]) for i in range(len(documents))]


EXPECTED = [tuple(array.tolist() for array in encode_record(record, BYTES)) for record in RECORDS]


def _entries(cache) -> list[Path]:
    return sorted(entry for entry in cache.iterdir() if entry.is_dir())


def _no_more_encoding(monkeypatch):
    def fail(*_):
        raise AssertionError("encoded again")

    monkeypatch.setattr(jsonl, "_build", fail)


def test_ids_and_masks_are_those_of_the_records_from_the_cache_too(chats, cache, monkeypatch):
    first = _load(chats, cache)
    assert first[0][0].dtype == np.int32 and first[0][1].dtype == bool
    assert _content(first) == EXPECTED
    _no_more_encoding(monkeypatch)
    assert _content(_load(chats, cache)) == EXPECTED
    assert len(_entries(cache)) == 1 and list(cache.iterdir()) == _entries(cache)  # no lock, nothing partial


def test_a_file_of_many_chunks_is_encoded_by_processes_as_by_one(chats, cache, monkeypatch):
    monkeypatch.setattr(record_files, "CHUNK_BYTES", 1000)
    monkeypatch.setattr(workers, "BYTES_A_PROCESS", 1)
    monkeypatch.setattr(workers.os, "sched_getaffinity", lambda _: range(2))
    assert _content(_load(chats, cache)) == EXPECTED
    chats.write_text(chats.read_text() + '{"prompt": 1}\n')
    with pytest.raises(InputError, match=r"chats.jsonl, line 301: expected"):
        _load(chats, cache / "another")
    assert not list((cache / "another").iterdir())


def test_documents_go_to_workers_as_a_path(chats, cache):
    data = JsonlDataConfig(tokenizer="bytes", path=str(chats), cache_dir=str(cache), workers=1)
    stage = StageConfig(seq_len=64, batch_size=4, steps=1, learning_rate=1)
    pipeline = make_pipeline(data, BYTES, [stage], 0, 0)
    try:
        theirs = next(pipeline)
    finally:
        pipeline.close()
    data.workers = 0
    ours = next(make_pipeline(data, BYTES, [stage], 0, 0))
    assert all((ours[key] == theirs[key]).all() for key in ours)


@pytest.mark.parametrize("change", ["tokenizer", "template", "special token", "file", "encoding", "fields"])
def test_whatever_changes_the_ids_makes_another_entry(chats, cache, change):
    _load(chats, cache)
    tokenizer, options = BYTES, {}
    if change == "tokenizer":
        tokenizer = load_tokenizer("needle-bpe")
    elif change == "template":
        tokenizer = Tokenizer(BYTES._backend, BYTES._config | {"chat_template": "{{ 1 }}"}, BYTES.source)
    elif change == "special token":
        tokenizer = Tokenizer(BYTES._backend, BYTES._config | {"eos_token": "<|user|>"}, BYTES.source)
    elif change == "file":  # of the same size
        stat = chats.stat()
        chats.write_text(chats.read_text().replace("odd", "ODD"))
        os.utime(chats, ns=(stat.st_atime_ns, stat.st_mtime_ns + 1))
    elif change == "fields":
        options = {"ignore_fields": ("id",)}
    else:
        options = {"encode": count_and_encode}
    documents = _load(chats, cache, tokenizer, **options)
    assert len(_entries(cache)) == 2
    expected = [encode_record(json.loads(line), tokenizer) for line in chats.read_text().splitlines()]
    assert _content(documents) == [tuple(array.tolist() for array in document) for document in expected]


def _cut(file: Path) -> None:
    os.truncate(file, file.stat().st_size // 2)


def _flip(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


@pytest.mark.parametrize("damage", [_cut, _flip, Path.unlink, lambda file: file.write_bytes(b"")])
@pytest.mark.parametrize("name", ["ids.bin", "loss_mask.bin", "bounds.bin", "entry.json"])
def test_a_damaged_entry_is_made_again(chats, cache, name, damage, capfd):
    _load(chats, cache)
    damage(_entries(cache)[0] / name)
    assert _content(_load(chats, cache)) == EXPECTED
    assert len(_entries(cache)) == 1
    if name != "entry.json" and damage in (_cut, _flip):
        assert f"is damaged ({name}), so it is made again" in capfd.readouterr().err


PROGRAM = """
import sys
from counting_records import count_and_encode
from mla_jax.data.jsonl import load_documents
from mla_jax.data.tokenizer import load_tokenizer

documents = load_documents(sys.argv[1], load_tokenizer("bytes"), cache_dir=sys.argv[2], encode=count_and_encode)
print(len(documents), documents.bounds[-1])
"""


def _start(path, cache, program=PROGRAM, **environ) -> subprocess.Popen:
    tests = str(Path(__file__).parents[1])
    environ = os.environ | {"PYTHONPATH": os.pathsep.join([tests, *sys.path])} | environ
    return subprocess.Popen(
        [sys.executable, "-c", program, str(path), str(cache)], env=environ, text=True, stdout=-1, stderr=-1
    )


def _start_encoding(path, cache, log: Path, until: Path) -> subprocess.Popen:
    """A process that has begun to encode, and goes on when the file `until` exists."""
    process = _start(path, cache, ENCODED_LOG=str(log), ENCODE_WHEN=str(until))
    while not log.exists():
        assert process.poll() is None, process.communicate()
        time.sleep(0.01)
    return process


def test_of_processes_that_start_at_once_one_encodes(chats, cache, tmp_path):
    log = tmp_path / "log"
    processes = [_start(chats, cache, ENCODED_LOG=str(log), SECONDS_A_RECORD="0.005") for _ in range(3)]
    printed = printed_by(processes, timeout=600)
    assert {out.split()[0] for out, _ in printed} == {"300"}, printed
    assert len({out for out, _ in printed}) == 1
    assert len(log.read_text()) == 300


def test_a_process_that_is_killed_while_it_encodes_leaves_the_work_to_the_next(chats, cache, tmp_path):
    first = _start_encoding(chats, cache, tmp_path / "log", until=tmp_path / "never")
    first.kill()
    first.communicate()
    assert _content(_load(chats, cache, encode=count_and_encode)) == EXPECTED
    assert list(cache.iterdir()) == _entries(cache)


def test_a_full_disk_is_one_line_and_leaves_nothing(chats, cache, monkeypatch):
    with monkeypatch.context() as patch:

        def full(_):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        patch.setattr(token_cache.os, "fsync", full)
        with pytest.raises(InputError, match=r"cache of encoded data .*No space left.* by data.cache_dir=FOLDER"):
            _load(chats, cache)
    assert not list(cache.iterdir())
    assert _content(_load(chats, cache)) == EXPECTED


def test_a_cache_that_is_no_folder_is_named(chats, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match=r"cannot be written to .*file/records-.* by data.cache_dir=FOLDER"):
        _load(chats, tmp_path / "file")


def test_the_user_s_cache_is_where_xdg_says(chats, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    load_documents(str(chats), BYTES)
    assert len(_entries(tmp_path / "xdg" / "infinitecontext" / "tokens")) == 1
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    load_documents(str(chats), BYTES)
    assert len(_entries(tmp_path / "home" / ".cache" / "infinitecontext" / "tokens")) == 1


def test_bad_lines_are_counted_from_the_cache_too_by_the_main_process_only(chats, cache, caplog, monkeypatch):
    chats.write_text(chats.read_text() + "{oops\n" + '{"prompt": 3}\n')
    with caplog.at_level(logging.WARNING):
        _load(chats, cache, on_bad_line="skip")
        _no_more_encoding(monkeypatch)
        assert _content(_load(chats, cache, on_bad_line="skip")) == EXPECTED
        monkeypatch.setattr(jsonl, "is_main", lambda: False)
        _load(chats, cache, on_bad_line="skip")
    said = [record.getMessage() for record in caplog.records]
    assert len(said) == 2 and said[0] == said[1]
    assert f"{chats}: skipped 2 of 302 lines that cannot be used; the first is line 301: not JSON" in said[0]
    with pytest.raises(InputError, match=r"chats.jsonl, line 301: not JSON"):
        _load(chats, cache)


MEMORY = """
import sys
from counting_records import encode_as_bytes
from mla_jax.data import workers
from mla_jax.data.jsonl import load_documents
from mla_jax.data.tokenizer import load_tokenizer

workers.MOST_PROCESSES = 1
documents = load_documents(sys.argv[1], load_tokenizer("bytes"), cache_dir=sys.argv[2], encode=encode_as_bytes)
assert sum(len(documents[i][0]) for i in range(0, len(documents), 1000)) > 0
print(open("/proc/self/status").read().split("VmHWM:")[1].split()[0])  # ru_maxrss begins with that of pytest
"""


def test_memory_does_not_grow_with_the_file(tmp_path, cache):
    peaks = []
    for megabytes in (4, 100):
        with (tmp_path / f"{megabytes}.jsonl").open("w") as file:
            line = json.dumps({"prompt": "x" * 5000, "completion": "y" * 5000}) + "\n"
            file.writelines([line] * (megabytes * 100))
        for _ in ("made", "from the cache"):
            process = _start(tmp_path / f"{megabytes}.jsonl", cache, program=MEMORY)
            printed, error = process.communicate(timeout=600)
            assert process.returncode == 0, error
            peaks.append(int(printed) / 1024)  # MiB
    assert max(peaks) - min(peaks) < 60, peaks


def test_a_long_wait_is_explained(chats, cache, tmp_path, monkeypatch, capfd):
    monkeypatch.setattr(token_cache, "PATIENCE_S", 0.05)
    monkeypatch.setattr(token_cache, "ANNOUNCED_MB", 0.01)
    log, told = tmp_path / "log", tmp_path / "told"

    def tell(*text, **options):
        print(*text, **options)
        told.touch()

    monkeypatch.setattr(token_cache, "print", tell, raising=False)
    first = _start_encoding(chats, cache, log, until=told)
    _load(chats, cache, encode=count_and_encode)
    assert f"Waiting for process {first.pid} on " in capfd.readouterr().err
    assert first.wait(60) == 0 and len(log.read_text()) == 300
    _load(chats, cache / "another")
    assert re.search(r"Encoding 0 MB, once, into .*/another/records-", capfd.readouterr().err)


def _write_as(path: Path, records: list[dict]) -> None:
    lines = "".join(json.dumps(record) + "\n" for record in records).encode()
    if path.suffix == ".parquet":
        pyarrow = pytest.importorskip("pyarrow")
        from pyarrow import parquet

        parquet.write_table(pyarrow.Table.from_pylist(records), path, row_group_size=7)
    elif path.suffix == ".zst":
        pyarrow = pytest.importorskip("pyarrow")
        path.write_bytes(pyarrow.compress(lines, codec="zstd", asbytes=True))
    else:
        path.write_bytes(gzip.compress(lines) if path.suffix == ".gz" else lines)


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.jsonl.zst", "a.parquet"])
def test_compressed_files_and_parquet_hold_what_plain_ones_do(tmp_path, cache, name):
    _write_as(tmp_path / name, RECORDS)
    assert _content(_load(tmp_path / name, cache)) == EXPECTED


def test_parquet_of_chats(tmp_path, cache):
    turns = [{"role": "user", "content": "a", "name": None}, {"role": "assistant", "content": "b", "name": None}]
    chat = {"messages": turns, "prompt": None, "completion": None}
    _write_as(tmp_path / "a.parquet", [chat, {"messages": None, "prompt": "c", "completion": "d"}])
    ids, loss_mask = _load(tmp_path / "a.parquet", cache)[0]
    assert ids.tolist() == BYTES.encode("<|bos|><|user|>a<|eos|><|assistant|>b<|eos|>")
    assert ids[loss_mask].tolist() == BYTES.encode("b<|eos|>")


def test_a_folder_is_its_files_by_path(tmp_path, cache):
    folder = tmp_path / "folder"
    (folder / "b").mkdir(parents=True)
    _write_as(folder / "b" / "1.jsonl.gz", RECORDS[100:250])
    _write_as(folder / "a.jsonl", RECORDS[:100])
    _write_as(folder / "c.parquet", RECORDS[250:])
    (folder / "readme.md").write_text("not data")
    assert _content(_load(folder, cache)) == EXPECTED
    (folder / "b" / "2.jsonl").write_text("\n{oops")
    with pytest.raises(InputError, match=r"folder/b/2.jsonl, line 2: not JSON"):
        _load(folder, cache)
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match=r"data.path=.*empty has no file in it whose name ends in .jsonl, .*parquet"):
        _load(tmp_path / "empty", cache)


@pytest.mark.parametrize("name", ["a.jsonl.gz", "a.jsonl.zst", "a.parquet"])
def test_a_file_that_is_cut_short_or_of_another_kind_is_named(tmp_path, cache, name):
    for damage in (_cut, lambda file: file.write_bytes(b"something else, and long enough for a header")):
        _write_as(tmp_path / name, RECORDS)
        damage(tmp_path / name)
        with pytest.raises(InputError, match=f"{name} cannot be read"):
            _load(tmp_path / name, cache)


@pytest.mark.parametrize("name", ["a.jsonl.zst", "a.parquet"])
def test_without_pyarrow_what_takes_it_says_so_and_the_rest_works(tmp_path, cache, name, monkeypatch):
    _write_as(tmp_path / name, RECORDS)
    _write_as(tmp_path / "a.jsonl.gz", RECORDS)
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(InputError, match=f"{name} takes pyarrow, which is not installed; pip install"):
        _load(tmp_path / name, cache)
    assert _content(_load(tmp_path / "a.jsonl.gz", cache)) == EXPECTED
