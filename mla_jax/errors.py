"""The two errors that a user can cause, and their one-line form."""

import contextlib
import re
import sys
from collections.abc import Iterator


class InputError(Exception):
    """Bad input (file, checkpoint, prompt): says what was wrong, what was expected, what to do. Exit code 1."""

    exit_code = 1


class UsageError(InputError):
    """A wrong command line or configuration. Exit code 2."""

    exit_code = 2


@contextlib.contextmanager
def one_line_errors() -> Iterator[None]:
    """Ends the process with `error: <one line>` on stderr when an InputError escapes; other exceptions pass."""
    try:
        yield
    except InputError as e:
        print(f"error: {' '.join(str(e).split())}", file=sys.stderr)
        sys.exit(e.exit_code)


def first_line(e: BaseException) -> str:
    """The first informative line of an exception, at most 600 characters: a long one loses its middle.

    TensorStore writes first what it did, with long paths, then the cause, then where in its source that was.
    """
    lines = [line.strip() for line in str(e).splitlines() if line.strip()]
    line = re.sub(r"\s*\[(source locations|tensorstore_spec)=.*", "", lines[0]) if lines else ""
    line = line or type(e).__name__
    return line if len(line) <= 600 else f"{line[:250]} ... {line[-345:]}"
