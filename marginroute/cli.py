"""What every command line shares: help with examples, exit codes, the one-sentence error, and no traceback.

Exit codes: 0 done; 1 the output cannot be written, or memory or processes are lacking; 2 bad input; 130 interrupted
(Ctrl-C); 143 terminated (SIGTERM).
"""

from __future__ import annotations

import argparse
import contextlib
import errno
import functools
import os
import signal
import sys
import textwrap
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NoReturn

from marginroute.errors import InputError, WorkError, nearest, suggestion

EXIT_FAILED = 1
EXIT_BAD_INPUT = 2
EXIT_INTERRUPTED = 130
EXIT_TERMINATED = 143

QUIET, NORMAL, VERBOSE = 0, 1, 2
_verbosity = NORMAL


class Terminated(KeyboardInterrupt):
    """SIGTERM: the work ends as it would by Ctrl-C."""


class _Help(argparse.RawDescriptionHelpFormatter):
    """Wraps one paragraph to the width; examples stay as they are."""

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        if "\n" in text.strip():
            return super()._fill_text(text, width, indent)
        return textwrap.fill(text, width, initial_indent=indent, subsequent_indent=indent)


class Parser(argparse.ArgumentParser):
    """A command line that refuses in one sentence with the nearest legal word, and that a shell can complete.

    Args:
        examples: lines shown at the end of the help, "Try:" before them.
        **more: as `argparse.ArgumentParser`; subcommands are parsers of this class, too.
    """

    def __init__(self, *, examples: str = "", **more: Any) -> None:
        if examples:
            more["epilog"] = "Try:\n" + textwrap.indent(textwrap.dedent(examples).strip(), "  ")
        more.setdefault("formatter_class", _Help)
        more.setdefault("allow_abbrev", False)
        super().__init__(**more)

    @classmethod
    def from_doc(cls, prog: str, doc: str | None) -> Parser:
        """Description and examples from a module's docstring: its first line, and what follows `Try:`."""
        description, _, more = (doc or "").partition("\n")
        return cls(prog=prog, description=description, examples=more.partition("Try:\n")[2])

    def add_verbosity(self) -> None:
        """Adds -v and -q, which `parse_args` carries out."""
        how_much = self.add_mutually_exclusive_group()
        how_much.add_argument(
            "-v", "--verbose", action="store_true", help="on stderr: time and memory of stages and of the whole"
        )
        how_much.add_argument("-q", "--quiet", action="store_true", help="no progress and no notes, errors alone")

    def parse_args(self, args: Sequence[str] | None = None, namespace: Any = None) -> Any:  # type: ignore[override]
        """Parses; a word that nothing knows is refused with the nearest option."""
        if "_ARGCOMPLETE" in os.environ:
            _complete(self)
        found, unknown = self.parse_known_args(args, namespace)
        if unknown:
            word = unknown[0].partition("=")[0]
            if word.startswith("-"):
                hint = nearest(word, self._options(sys.argv[1:] if args is None else args))
                self.error(f"unknown option {word}" + (f";{hint}" if hint else ""))
            self.error(f"{word!r} is one word too many")
        level = QUIET if getattr(found, "quiet", False) else VERBOSE if getattr(found, "verbose", False) else NORMAL
        set_verbosity(level)
        return found

    def error(self, message: str) -> NoReturn:
        """One sentence, exit code 2."""
        sys.stderr.write(f"error: {message}; see {self.prog} --help\n")
        raise SystemExit(EXIT_BAD_INPUT)

    def _print_message(self, message: str, file: Any = None) -> None:
        """Unlike argparse's, lets a full disk be noticed."""
        target = file or sys.stderr
        if message and target is not None:
            target.write(message)

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        if action.choices is not None and value not in action.choices:
            legal = suggestion(str(value), [str(choice) for choice in action.choices])
            raise argparse.ArgumentError(action, f"{value!r} is not legal{legal}")

    def _options(self, words: Sequence[str]) -> list[str]:
        """Options of this parser and of the subcommands that the words name."""
        found = [option for action in self._actions for option in action.option_strings]
        for action in self._actions:
            if isinstance(action, argparse._SubParsersAction):
                for word in words:
                    below = action.choices.get(word)
                    found += below._options(words) if isinstance(below, Parser) else []
        return found


def _complete(parser: argparse.ArgumentParser) -> None:
    """Answers the shell and ends the process, where argcomplete is installed (docs/shell.md)."""
    with contextlib.suppress(ImportError):
        import argcomplete

        argcomplete.autocomplete(parser)


def set_verbosity(level: int) -> None:
    """How much `note` and progress show: QUIET, NORMAL or VERBOSE."""
    global _verbosity
    _verbosity = level


def verbosity() -> int:
    """What `set_verbosity` was told last."""
    return _verbosity


def note(text: str) -> None:
    """A remark on stderr that is no result and no error; -q silences it."""
    if _verbosity > QUIET:
        print(text, file=sys.stderr, flush=True)


@contextlib.contextmanager
def timed(title: str) -> Iterator[None]:
    """With -v, says at the end how much time, CPU time of this process and its ended children, and memory it took."""
    started_s, cpu_s = time.monotonic(), sum(os.times()[:4])
    yield
    if _verbosity == VERBOSE:
        taken_s, busy_s = time.monotonic() - started_s, sum(os.times()[:4]) - cpu_s
        note(f"{title}: {taken_s:.1f} s, {busy_s:.1f} s of CPU, at most {_peak_mib():.0f} MiB so far")


def _peak_mib() -> float:
    """Largest resident memory of this process."""
    try:
        import resource
    except ImportError:  # Windows
        return float("nan")
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)


def main_guard(main: Callable[[list[str] | None], int]) -> Callable[[list[str] | None], int]:
    """Wraps a `main(argv)`: bad input exits 2 with one sentence, an interruption 130 or 143, a closed pipe quietly.

    What was printed is flushed here, so that a pipe closed by its reader or a full disk does not end in a traceback.
    """

    @functools.wraps(main)
    def guarded(argv: list[str] | None = None) -> int:
        set_verbosity(NORMAL)
        try:
            with _terminable(), _flushed(), timed("in all"):
                return main(argv)
        except InputError as error:
            print(f"error: {error}", file=sys.stderr)
            return EXIT_BAD_INPUT
        except WorkError as error:
            print(f"error: {error}", file=sys.stderr)
            return EXIT_FAILED
        except MemoryError as error:
            print(f"error: out of memory{f' ({error})' if str(error) else ''}", file=sys.stderr)
            return EXIT_FAILED
        except Terminated:
            print("terminated", file=sys.stderr)
            return EXIT_TERMINATED
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
            return EXIT_FAILED

    return guarded


@contextlib.contextmanager
def _flushed() -> Iterator[None]:
    """Writes out what was printed; also before --help and --version end the process."""
    try:
        yield
    except SystemExit as end:
        if isinstance(end.__context__, BrokenPipeError):  # how rich ends where nobody reads its tables
            raise end.__context__ from None
        if sys.stdout is not None:
            sys.stdout.flush()
        raise
    if sys.stdout is not None:
        sys.stdout.flush()


@contextlib.contextmanager
def _terminable() -> Iterator[None]:
    """SIGTERM raises `Terminated` inside, unless the process has its own way with it."""

    def end(*_: object) -> NoReturn:
        raise Terminated

    ours = threading.current_thread() is threading.main_thread() and signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    if ours:
        signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        if ours:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)


def _discard_output() -> None:
    """What is still buffered would fail again when Python ends."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
