"""Processes of this machine as members of a crew (`agents.workers`): one thread each, and deaf to Ctrl-C."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import pickle
import signal
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import TYPE_CHECKING, Any

from marginroute.errors import WorkError

if TYPE_CHECKING:
    from agents.workers import Member

REAPED_S = 1.0  # in which a dead process says how it ended
ONE_THREAD = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "NUMBA_NUM_THREADS")


class Worker:
    """What a member does inside its process."""

    def __init__(self) -> None:
        self._job = -1
        self._do: Callable[[Any], Any] | None = None

    def do(self, job: int, packed: bytes | None, item: Any) -> Any:
        """Does an item; starts the job first where it is told how."""
        if packed is not None:
            self._do, (start, arguments) = None, pickle.loads(packed)
            self._do, self._job = start(*arguments), job
        assert self._do is not None and self._job == job
        return self._do(item)


class Processes:
    """Processes of this machine as a crew's staff.

    Args:
        size: how many.
    """

    def __init__(self, size: int) -> None:
        self.size = size

    def hire(self) -> Member:
        """A new process.

        Raises:
            WorkError: the system refuses one more.
        """
        try:
            return _Process()
        except (OSError, RuntimeError) as error:  # RuntimeError: no thread to look after it
            why = getattr(error, "strerror", None) or error
            raise WorkError(f"a worker process cannot be started ({why}); try fewer --workers") from error

    def pack(self, job: bytes) -> bytes:
        """As it is."""
        return job

    def welcome(self, arrived: Any) -> None:
        """Nothing to look at: the same machine, the same code."""

    def meant(self, error: Exception) -> Exception | None:
        """Only a dead process breaks a pool."""
        return None if isinstance(error, BrokenProcessPool) else error


_worker: Worker | None = None


class _Process:
    """One process, which starts at once and uses one thread."""

    def __init__(self) -> None:
        before = set(multiprocessing.active_children())
        self._pool = ProcessPoolExecutor(1, multiprocessing.get_context("spawn"), _enter)
        self._children: set[Any] = set()
        try:
            with _one_thread_each(), _signals_later(), _sigint_held():
                self.ready: Future[Any] = self._pool.submit(os.getpid)
                self._children = set(multiprocessing.active_children()) - before
        except BaseException:  # a signal that has waited: nobody else knows of the child
            self.stop(at_once=True)
            raise

    def submit(self, job: int, packed: Any, item: Any) -> Future[Any]:
        return self._pool.submit(_work, job, packed, item)

    def fate(self) -> str:
        end = time.monotonic() + REAPED_S
        while time.monotonic() < end:
            codes = [child.exitcode for child in self._children]
            if None not in codes:
                return " and ".join(map(_in_words, codes))
            time.sleep(0.01)
        return ""

    def stop(self, at_once: bool) -> None:
        self._pool.shutdown(wait=not at_once, cancel_futures=True)
        if at_once:
            for child in self._children:
                child.terminate()


def _in_words(code: int) -> str:
    """An exit code as multiprocessing gives it: minus the signal's number where one ended the process."""
    if code >= 0:
        return f"exit code {code}"
    try:
        name = signal.Signals(-code).name
    except ValueError:  # a real-time signal
        name = f"signal {-code}"
    return f"killed by {name}{', out of memory?' if code == -signal.SIGKILL else ''}"


def _enter() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group: the parent decides
    global _worker
    _worker = Worker()


def _work(job: int, packed: bytes | None, item: Any) -> Any:
    assert _worker is not None
    return _worker.do(job, packed, item)


@contextlib.contextmanager
def _signals_later() -> Iterator[None]:
    """Ctrl-C and SIGTERM come after what is inside: a child that is told half of how to start would crash."""
    if threading.current_thread() is not threading.main_thread():  # which is where Python sees signals
        yield
        return
    came: list[int] = []
    caught = [number for number in (signal.SIGINT, signal.SIGTERM) if signal.getsignal(number) is not None]
    before = {number: signal.signal(number, lambda number, _: came.append(number)) for number in caught}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    if came:
        signal.raise_signal(came[0])


@contextlib.contextmanager
def _sigint_held() -> Iterator[None]:
    """Processes started inside are born deaf to Ctrl-C, which would else kill them before `_enter` runs."""
    if not hasattr(signal, "pthread_sigmask"):
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


@contextlib.contextmanager
def _one_thread_each() -> Iterator[None]:
    """Child processes started inside use one thread each: two pools of threads on two cores collapse."""
    saved = {name: os.environ.get(name) for name in ONE_THREAD}
    os.environ.update(dict.fromkeys(ONE_THREAD, "1"))
    try:
        yield
    finally:
        for name, value in saved.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
