"""Reads what W&B wrote offline: records of protobuf in LevelDB's log format."""

import json
import struct
from pathlib import Path

from wandb.proto import wandb_internal_pb2


def records(path: Path) -> list[wandb_internal_pb2.Record]:
    """All records of a run-ID.wandb file: blocks of 32 KiB, chunks (crc 4, length 2, type 1, data), 7 bytes first."""
    data, at, whole, found = path.read_bytes(), 7, b"", []
    while at + 7 <= len(data):
        left = -at % 32768
        if 0 < left < 7:  # a block ends in padding where no header fits
            at += left
            continue
        _, length, kind = struct.unpack("<IHB", data[at : at + 7])
        if kind == 0 or at + 7 + length > len(data):  # no more, or still being written
            break
        whole += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # full, last
            found.append(wandb_internal_pb2.Record.FromString(whole))
            whole = b""
    return found


def history(path: Path) -> list[dict]:
    """The rows that were logged."""
    rows = [r.history for r in records(path) if r.WhichOneof("record_type") == "history"]
    return [{item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in row.item} for row in rows]


def run(path: Path) -> wandb_internal_pb2.RunRecord:
    """Its id, project, name and config."""
    return next(r.run for r in records(path) if r.WhichOneof("record_type") == "run")
