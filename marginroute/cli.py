"""What every command line shares: exit codes, the one-sentence error, and no traceback for bad input."""

from __future__ import annotations

import errno
import functools
import os
import sys
from collections.abc import Callable

from marginroute.errors import InputError

EXIT_BAD_OUTPUT = 1
EXIT_BAD_INPUT = 2
EXIT_INTERRUPTED = 130


def main_guard(main: Callable[[list[str] | None], int]) -> Callable[[list[str] | None], int]:
    """Wraps a `main(argv)`: bad input exits 2 with one sentence, an interruption exits 130, a closed pipe quietly.

    What was printed is flushed here, so that a pipe closed by its reader or a full disk does not end in a traceback.
    """

    @functools.wraps(main)
    def guarded(argv: list[str] | None = None) -> int:
        try:
            code = main(argv)
            if sys.stdout is not None:
                sys.stdout.flush()
            return code
        except InputError as error:
            print(f"error: {error}", file=sys.stderr)
            return EXIT_BAD_INPUT
        except KeyboardInterrupt:
            print("interrupted", file=sys.stderr)
            return EXIT_INTERRUPTED
        except BrokenPipeError:
            _discard_output()
            return 0
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
                raise
            _discard_output()
            print(f"error: output cannot be written ({error.strerror})", file=sys.stderr)
            return EXIT_BAD_OUTPUT

    return guarded


def _discard_output() -> None:
    """What is still buffered would fail again when Python ends."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
