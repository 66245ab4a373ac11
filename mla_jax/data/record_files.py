"""Files of records: JSONL, plain or compressed by gzip or Zstandard, Parquet, and folders of these.

They are read in chunks of about a megabyte, so that a file may be larger than memory. Parquet and Zstandard take
pyarrow (the extra `arrow`).
"""

import gzip
import io
import json
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from mla_jax.errors import InputError

SUFFIXES = (".jsonl", ".jsonl.gz", ".jsonl.zst", ".parquet")
CHUNK_BYTES, CHUNK_ROWS = 1 << 20, 256


class Chunk(NamedTuple):
    """Consecutive records of a file as they are there: lines as bytes, or a RecordBatch of rows."""

    file: Path
    first: int
    """Number of the first line or row; they count from 1."""
    records: Any

    def parsed(self) -> Iterator[tuple[str, Any]]:
        """The place (`line 3`) and the content of each record, an InputError where it is not JSON; no empty lines."""
        if not isinstance(self.records, list):
            for number, row in enumerate(self.records.to_pylist(), self.first):
                yield f"row {number}", row
            return
        for number, line in enumerate(self.records, self.first):
            try:
                text = line.decode("utf-8-sig" if number == 1 else "utf-8")
                if text.strip():
                    yield f"line {number}", json.loads(text)
            except UnicodeDecodeError as e:
                yield f"line {number}", InputError(f"not UTF-8 text ({e})")
            except (ValueError, RecursionError) as e:
                yield f"line {number}", InputError(f"not JSON ({e})")


def record_files(path: str) -> list[Path]:
    """The file at `path`, or those below that folder whose names end in SUFFIXES, by path.

    Raises:
        InputError: no such file or folder, or none with such a name in it.
    """
    if Path(path).is_file():
        return [Path(path)]
    if not Path(path).is_dir():
        raise InputError(f"data.path={path} is not a file or folder")
    files = sorted(file for file in Path(path).rglob("*") if file.name.endswith(SUFFIXES) and file.is_file())
    if not files:
        raise InputError(f"data.path={path} has no file in it whose name ends in {', '.join(SUFFIXES)}")
    return files


def read_chunks(files: list[Path]) -> Iterator[Chunk]:
    """All records in order.

    Raises:
        InputError: a file that cannot be read or decompressed, or needs pyarrow where that is not installed.
    """
    for file in files:
        try:
            yield from _rows(file) if file.suffix == ".parquet" else _lines(file)
        except (OSError, EOFError, zlib.error, ValueError) as e:  # pyarrow's errors are OSErrors and ValueErrors
            raise InputError(f"{file} cannot be read ({e})") from e


def _lines(file: Path) -> Iterator[Chunk]:
    first = 1
    with _opened(file) as content:
        while lines := content.readlines(CHUNK_BYTES):
            yield Chunk(file, first, lines)
            first += len(lines)


def _opened(file: Path) -> io.BufferedIOBase:
    if file.suffix == ".gz":
        return gzip.open(file)
    if file.suffix == ".zst":
        return io.BufferedReader(_pyarrow(file).input_stream(str(file), compression="zstd"), CHUNK_BYTES)
    return file.open("rb")


def _rows(file: Path) -> Iterator[Chunk]:
    _pyarrow(file)
    from pyarrow import parquet

    first = 1
    with parquet.ParquetFile(file) as content:
        for rows in content.iter_batches(CHUNK_ROWS, use_threads=False):
            yield Chunk(file, first, rows)
            first += len(rows)


def _pyarrow(file: Path) -> Any:
    try:
        import pyarrow
    except ImportError as e:
        raise InputError(f"{file} takes pyarrow, which is not installed; pip install 'infinitecontext[arrow]'") from e
    return pyarrow
