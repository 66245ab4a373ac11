"""Ways to encode records that child processes can import."""

import os
import time
from typing import Any

import numpy as np

from mla_jax.data.records import encode_record
from mla_jax.data.tokenizer import Tokenizer


def count_and_encode(record: Any, tokenizer: Tokenizer, ignore_fields: tuple) -> list[tuple[np.ndarray, np.ndarray]]:
    """As usual, with a byte in the file $ENCODED_LOG and $SECONDS_A_RECORD for each, once $ENCODE_WHEN exists."""
    if log := os.environ.get("ENCODED_LOG"):
        with open(log, "ab") as file:
            file.write(b".")
    while not os.path.exists(os.environ.get("ENCODE_WHEN", "/")):
        time.sleep(0.01)
    time.sleep(float(os.environ.get("SECONDS_A_RECORD", "0")))
    return [encode_record(record, tokenizer)]


def encode_as_bytes(record: Any, tokenizer: Tokenizer, ignore_fields: tuple) -> list[tuple[np.ndarray, np.ndarray]]:
    """A completion as its bytes, quicker than a tokenizer makes them."""
    ids = np.frombuffer((record["prompt"] + record["completion"]).encode(), np.uint8).astype(np.int32)
    return [(ids, np.ones(len(ids), bool))]
