"""The two errors that a user can cause, and their one-line form."""

import contextlib
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
    """The first informative line of an exception, at most 200 characters."""
    lines = [line.strip() for line in str(e).splitlines() if line.strip()]
    return (lines[0] if lines else type(e).__name__)[:200]
