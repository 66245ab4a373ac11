"""Sources of batches that worker processes can import."""

import multiprocessing
import multiprocessing.reduction
import os
import signal
import struct
from multiprocessing.connection import Connection

import numpy as np


class Numbers:
    """Batch i holds i, the process that made it, and a MB."""

    def __len__(self) -> int:
        return 1000

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        return {"index": np.array(index), "pid": np.array(os.getpid()), "more": np.full(2**20, index % 256, np.uint8)}


class Failing(Numbers):
    """Batch 3 cannot be made."""

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        if index == 3:
            raise ValueError(f"batch {index} is bad")
        return super().__getitem__(index)


class KilledWhileSending(Numbers):
    """The process that makes a batch is killed when a part of it is sent."""

    def __getstate__(self) -> str:
        return "what __setstate__ is called with"

    def __setstate__(self, state: str) -> None:
        Connection.send = _send_a_part


class KilledBeforeItIsSent(Numbers):
    """The processes that are to read this source are killed while it is made ready to be sent."""

    def __getstate__(self) -> bytes:
        for worker in multiprocessing.active_children():
            worker.kill()
        return bytes(2**20)  # more than the connection takes before it is read

    def __setstate__(self, state: bytes) -> None:
        raise AssertionError("nobody reads it")


class SentOnce(Numbers):
    """The second process that is to read this source cannot be sent it."""

    sent = 0

    def __getstate__(self) -> dict:
        self.sent += 1
        if self.sent == 2:
            raise ValueError("enough")
        return {"sent": self.sent}


def _send_a_part(self: Connection, obj: object) -> None:
    message = bytes(multiprocessing.reduction.ForkingPickler.dumps(obj))
    os.write(self.fileno(), struct.pack("!i", len(message)) + message[:10_000])
    os.kill(os.getpid(), signal.SIGKILL)
