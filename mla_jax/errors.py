"""The two errors that a user can cause, and how a process ends: by one line and an exit code."""

import contextlib
import errno
import os
import re
import select
import sys
from collections.abc import Iterator
from typing import NoReturn


class InputError(Exception):
    """Bad input (file, checkpoint, prompt): says what was wrong, what was expected, what to do. Exit code 1."""

    exit_code = 1


class UsageError(InputError):
    """A wrong command line or configuration. Exit code 2."""

    exit_code = 2


def check_text(*arguments: str) -> None:
    """Raises UsageError for an argument that came as bytes that are not UTF-8."""
    for argument in arguments:
        if argument.encode(errors="ignore").decode() != argument:
            shown = argument.encode(errors="replace").decode()
            raise UsageError(f"argument {shown!r} is not UTF-8 text")


INTERRUPTED = 130
"""The exit code of what Ctrl-C ended, as shells report it."""

CLOSED_PIPE = 141
"""The exit code of what wrote to a pipe that nobody reads any more, as shells report it."""

_NO_ROOM = (errno.ENOSPC, errno.EDQUOT)


@contextlib.contextmanager
def one_line_errors() -> Iterator[None]:
    """Ends the process as a shell expects it, with at most one line on stderr; other exceptions pass.

    An InputError gives `error: <one line>` and its exit code, a full disk the same and 1, Ctrl-C INTERRUPTED, and a
    reader of stdout or stderr that went away (`| head`) CLOSED_PIPE. Stdout is flushed here, since the interpreter has
    an exit code of its own for what it cannot write at its end.
    """
    try:
        try:
            yield
        except SystemExit:
            sys.stdout.flush()
            raise
        sys.stdout.flush()
    except InputError as e:
        _end(e.exit_code, f"error: {' '.join(str(e).split())}")
    except KeyboardInterrupt:
        _end(INTERRUPTED, "interrupted")
    except BrokenPipeError:
        if not _reader_gone(1) and not _reader_gone(2):
            raise  # another pipe or socket
        _end(CLOSED_PIPE)
    except OSError as e:
        if e.errno not in _NO_ROOM:
            raise
        _end(1, f"error: could not write {e.filename or 'the output'} ({e.strerror}); free space or name another place")


def _end(code: int, line: str = "") -> NoReturn:
    """Exits after printing a line on stderr; what can no longer be written goes nowhere."""
    for descriptor, stream, text in ((2, sys.stderr, line), (1, sys.stdout, "")):
        try:
            print(text, file=stream, end="\n" if text else "", flush=True)
        except OSError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), descriptor)
    sys.exit(code)


def _reader_gone(descriptor: int) -> bool:
    """True for the end of a pipe or a socket whose other end is closed."""
    poll = select.poll()
    poll.register(descriptor, 0)
    return any(event & (select.POLLERR | select.POLLHUP) for _, event in poll.poll(0))


def first_line(e: BaseException) -> str:
    """The first informative line of an exception, at most 600 characters: a long one loses its middle.

    TensorStore writes first what it did, with long paths, then the cause, then where in its source that was.
    """
    lines = [line.strip() for line in str(e).splitlines() if line.strip()]
    line = re.sub(r"\s*\[(source locations|tensorstore_spec)=.*", "", lines[0]) if lines else ""
    line = line or type(e).__name__
    return line if len(line) <= 600 else f"{line[:250]} ... {line[-345:]}"
