"""Work shared out over processes: each starts once, takes one item after the other, and uses one thread."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from typing import Any, TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")

ONE_THREAD = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "NUMBA_NUM_THREADS")


def usable_cores() -> int:
    """Cores this process may use: its affinity, cut to the quota of its control group."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    with contextlib.suppress(OSError, ValueError), open("/sys/fs/cgroup/cpu.max", encoding="ascii") as file:
        quota, period = file.read().split()
        cores = min(cores, max(1, round(int(quota) / int(period))))
    return cores


def in_processes(
    start: Callable[..., Callable[[Item], Result]], arguments: tuple[Any, ...], items: Sequence[Item], workers: int
) -> Generator[Result, None, None]:
    """Yields the results of the items as they are ready.

    Args:
        start: a function of a module, called once in every process; what it returns does the items.
        arguments: of `start`, picklable.
        items: picklable.
        workers: processes.

    Raises:
        RuntimeError: a process died.
    """
    before = set(multiprocessing.active_children())
    with _one_thread_each():
        pool = ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), _start_worker, (start, arguments))
        finished = False
        try:
            with _sigint_held():
                futures = [pool.submit(_work, item) for item in items]
            for future in as_completed(futures):
                yield future.result()
            finished = True
        except BrokenProcessPool as error:
            raise RuntimeError("an evaluation process died (out of memory?): try fewer --workers") from error
        finally:
            pool.shutdown(wait=finished, cancel_futures=True)
            if not finished:
                for child in set(multiprocessing.active_children()) - before:
                    child.terminate()


_do: Callable[[Any], Any] | None = None


def _start_worker(start: Callable[..., Callable[[Any], Any]], arguments: tuple[Any, ...]) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group: the parent decides
    global _do
    _do = start(*arguments)


def _work(item: Any) -> Any:
    assert _do is not None
    return _do(item)


@contextlib.contextmanager
def _sigint_held() -> Iterator[None]:
    """Processes started inside are born deaf to Ctrl-C, which would else kill them before `_start_worker` runs."""
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
