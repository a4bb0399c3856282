"""What every command line shares: exit codes, the one-sentence error, and no traceback for bad input."""

from __future__ import annotations

import functools
import os
import sys
from collections.abc import Callable

from marginroute.errors import InputError

EXIT_BAD_INPUT = 2
EXIT_INTERRUPTED = 130


def main_guard(main: Callable[[list[str] | None], int]) -> Callable[[list[str] | None], int]:
    """Wraps a `main(argv)`: bad input exits 2 with one sentence, an interruption exits 130, a closed pipe quietly."""

    @functools.wraps(main)
    def guarded(argv: list[str] | None = None) -> int:
        try:
            return main(argv)
        except InputError as error:
            print(f"error: {error}", file=sys.stderr)
            return EXIT_BAD_INPUT
        except KeyboardInterrupt:
            print("interrupted", file=sys.stderr)
            return EXIT_INTERRUPTED
        except BrokenPipeError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return 0

    return guarded
