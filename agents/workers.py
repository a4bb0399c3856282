"""Work shared out: processes of this machine (`agents.processes`), or members of a Ray cluster (`agents.cluster`).

A *job* is a function that is started once by every member of a crew (imports, kernels, constants) and then takes one
item after the other, on one thread. What comes of an item depends on the job and the item alone, neither on who does
it nor on what that one did before. So the number of members changes no number, and a member that is lost costs time
only: its item is done again by another.
"""

from __future__ import annotations

import contextlib
import os
import pickle
from collections import Counter, deque
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from itertools import count
from typing import Any, Generic, Protocol, TypeVar

from agents.processes import Processes
from marginroute.cli import note
from marginroute.errors import WorkError

Item = TypeVar("Item")
Result = TypeVar("Result")

MOST_LOSSES = 3  # members that one item may cost, or that may die one after the other before they have come
PATIENCE_S = 30.0  # without any member at work, after which the user is told
TRY = "try fewer --workers (1: this process alone)"


def usable_cores() -> int:
    """Cores this process may use: its affinity, cut to the quota of its control group."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    with contextlib.suppress(OSError, ValueError), open("/sys/fs/cgroup/cpu.max", encoding="ascii") as file:
        quota, period = file.read().split()
        cores = min(cores, max(1, round(int(quota) / int(period))))
    return cores


class Member(Protocol):
    """Somebody who does one item after the other."""

    ready: Future[Any]  # done as soon as it can work

    def submit(self, job: int, packed: Any, item: Any) -> Future[Any]:
        """Has an item of a job done; `packed`: how the job is started, None where the member knows."""

    def fate(self) -> str:
        """How a lost one ended, in words; empty if nobody knows."""

    def stop(self, at_once: bool) -> None:
        """Ends it, in the middle of an item if `at_once`."""


class Staff(Protocol):
    """Where members come from."""

    size: int

    def hire(self) -> Member:
        """A new member, which may take its time to come.

        Raises:
            WorkError: there is no room for one more.
        """

    def pack(self, job: bytes) -> Any:
        """A pickled job as members are sent it."""

    def welcome(self, arrived: Any) -> None:
        """Looks at what a member says when it is ready."""

    def meant(self, error: Exception) -> Exception | None:
        """The error of the work itself; None: the member is lost."""


class Crew:
    """Members that stay for several jobs.

    Args:
        staff: where members come from.
    """

    def __init__(self, staff: Staff) -> None:
        self.size, self._staff = staff.size, staff
        self._members: dict[int, Member] = {}  # by slot
        self._coming: dict[Future[Any], int] = {}
        self._knows: dict[int, int] = {}  # the job that a slot's member was told last
        self._numbers, self._stillborn = count(), 0

    def __enter__(self) -> Crew:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        for slot in list(self._members):
            self._dismiss(slot, at_once=kind is not None)

    def job(self, start: Callable[..., Callable[[Item], Result]], arguments: tuple[Any, ...]) -> Job[Item, Result]:
        """A job, whose items members do.

        Args:
            start: a function of a module, called once by every member; what it returns does the items.
            arguments: of `start`, picklable.
        """
        return Job(self, next(self._numbers), self._staff.pack(pickle.dumps((start, arguments))))

    def do(self, number: int, packed: Any, items: Sequence[Any]) -> Generator[Any, None, None]:
        """Yields the results of a job's items as they are ready; see `Job.each`."""
        waiting, losses = deque(range(len(items))), Counter[int]()
        working: dict[Future[Any], tuple[int, int]] = {}  # slot and item
        try:
            while waiting or working:
                self._hire(min(self.size, len(items)))
                busy = {slot for slot, _ in working.values()} | set(self._coming.values())
                for slot in sorted(self._members.keys() - busy):
                    if waiting:
                        i = next((i for i in waiting if i % self.size == slot), waiting[0])  # what it may know already
                        waiting.remove(i)
                        working[self._submit(slot, number, packed, items[i])] = slot, i
                for future in self._some([*working, *self._coming]):
                    slot, i = working.pop(future, (None, None))
                    if slot is None or i is None:
                        self._arrived(future)
                        continue
                    try:
                        result = future.result()
                    except Exception as error:
                        fate = self._lost(slot, error)
                        losses[i] += 1
                        if losses[i] == MOST_LOSSES:
                            raise WorkError(f"{MOST_LOSSES} workers died of the same work{fate}; {TRY}") from error
                        note(f"a worker was lost{fate}; its work is done again by another")
                        waiting.appendleft(i)
                        continue
                    yield result
        finally:
            for slot, _ in working.values():  # nobody waits for these
                self._dismiss(slot, at_once=True)

    def _hire(self, wanted: int) -> None:
        for slot in range(wanted):
            if slot not in self._members:
                member = self._members[slot] = self._staff.hire()
                self._coming[member.ready] = slot

    def _submit(self, slot: int, number: int, packed: Any, item: Any) -> Future[Any]:
        known, self._knows[slot] = self._knows.get(slot), number
        try:
            return self._members[slot].submit(number, None if known == number else packed, item)
        except Exception as error:  # it died while it had nothing to do
            failed: Future[Any] = Future()
            failed.set_exception(error)
            return failed

    def _some(self, futures: list[Future[Any]]) -> set[Future[Any]]:
        """Those that are done, at least one."""
        done = wait(futures, PATIENCE_S, FIRST_COMPLETED).done
        if not done and len(futures) == len(self._coming):
            note("no worker is ready yet; waiting")
        return done or wait(futures, None, FIRST_COMPLETED).done

    def _arrived(self, future: Future[Any]) -> None:
        slot = self._coming.pop(future)
        try:
            self._staff.welcome(future.result())
            self._stillborn = 0
        except Exception as error:
            fate = self._lost(slot, error)
            self._stillborn += 1
            if self._stillborn == MOST_LOSSES:
                raise WorkError(f"{MOST_LOSSES} workers died as they started{fate}; {TRY}") from error
            note(f"a worker died as it started{fate}; another is started")

    def _lost(self, slot: int, error: Exception) -> str:
        """Lets go of a member that is lost, and returns how it ended, in brackets; any other error is raised."""
        meant = self._staff.meant(error)
        if isinstance(meant, MemoryError):
            raise WorkError(f"a worker ran out of memory; {TRY}") from error
        if meant is not None:
            raise meant
        fate = self._members[slot].fate()
        self._dismiss(slot, at_once=True)
        return f" ({fate})" if fate else ""

    def _dismiss(self, slot: int, at_once: bool) -> None:
        member = self._members.pop(slot, None)
        if member is not None:
            self._knows.pop(slot, None)
            self._coming.pop(member.ready, None)
            member.stop(at_once)


class Job(Generic[Item, Result]):
    """A job of a crew."""

    def __init__(self, crew: Crew, number: int, packed: Any) -> None:
        self.crew, self._number, self._packed = crew, number, packed

    def each(self, items: Sequence[Item]) -> Generator[Result, None, None]:
        """Yields the results of the items as they are ready.

        Args:
            items: picklable. Item i goes to the member that had item i of an earlier call, unless that one is lost or
                another has nothing to do.

        Raises:
            WorkError: members died as they started or of the same item again and again, or there is no room for them.
        """
        return self.crew.do(self._number, self._packed, items)


def shared_out(
    start: Callable[..., Callable[[Item], Result]],
    arguments: tuple[Any, ...],
    items: Sequence[Item],
    workers: int | Crew,
) -> Generator[Result, None, None]:
    """Yields the results of one job's items as they are ready; arguments as `Crew.job` and `Job.each`.

    Args:
        start: a function of a module.
        arguments: its arguments.
        items: what it does.
        workers: processes, 1 for this one; or a crew that exists.
    """
    if workers == 1:
        yield from map(start(*arguments), items)
        return
    with contextlib.nullcontext(workers) if isinstance(workers, Crew) else Crew(Processes(workers)) as crew:
        yield from crew.job(start, arguments).each(items)
