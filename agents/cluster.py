"""A Ray cluster as a crew's staff: one actor per CPU, each with the same code and libraries as this process.

Whole items travel (a rollout, a chunk of episodes, a training), never single steps. Nodes need the checkout at the
same path and the same installed versions; both are checked when a member comes, since other code gives other numbers.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import importlib.util
import os
import signal
import socket
import sys
from collections.abc import Iterator
from concurrent.futures import Future
from pathlib import Path
from typing import Any

from agents.processes import Processes
from agents.workers import Crew, Member, usable_cores
from marginroute.errors import InputError

ROOT = Path(__file__).parents[1]
CODE = ("marginroute", "envs", "agents", "evaluation")
PROBE_S = 3.0
LEGAL = "legal is auto (the cluster of this machine), local (one made for this command), or HOST:PORT of a head node"
_HELLO = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes(3) + b"\x04" + bytes(5)  # RFC 9113, 3.4: preface, empty SETTINGS


@functools.cache
def code_digest(folders: tuple[str, ...]) -> str:
    """Digest of the source in folders of the checkout."""
    digest = hashlib.sha256()
    for folder in folders:
        for path in sorted((ROOT / folder).rglob("*.py")):
            digest.update(str(path.relative_to(ROOT)).encode())
            digest.update(path.read_bytes())
    return digest.hexdigest()


def identity() -> dict[str, str]:
    """What results depend on, beside the job: versions, and a digest of the code."""
    from agents.run import versions

    return {**versions(), "code": code_digest(CODE)}


@contextlib.contextmanager
def crew_of(address: str | None, limit: int | None) -> Iterator[Crew | int | None]:
    """The workers that a command line asks for.

    Args:
        address: of a Ray cluster, see `connected`; None: processes of this machine.
        limit: of --workers.

    Yields:
        A crew of at most `limit` members; the limit itself where that is None or 1 and there is no cluster.

    Raises:
        InputError: as `connected`.
    """
    if address is not None:
        with connected(address), Crew(Cluster(limit)) as crew:
            yield crew
    elif limit is not None and limit > 1:
        with Crew(Processes(limit)) as crew:
            yield crew
    else:
        yield limit


@contextlib.contextmanager
def connected(address: str) -> Iterator[None]:
    """A connection to a Ray cluster, quiet on stdout, that leaves signals as they are.

    Raises:
        InputError: Ray is not installed, or no cluster can be reached.
    """
    if importlib.util.find_spec("ray") is None:
        raise InputError(f'--ray {address} needs Ray; legal is an installation with pip install -e ".[ray]"')
    if address not in ("auto", "local"):
        _probe(address)
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    import ray

    before = signal.getsignal(signal.SIGTERM)
    if address == "local":
        os.environ.setdefault("RAY_worker_niceness", "0")  # as this process; Ray's own 15 yields to everything else
    own = {"num_cpus": usable_cores(), "include_dashboard": False} if address == "local" else {}
    try:
        ray.init(address, log_to_driver=False, configure_logging=False, **own)
    except Exception as error:  # Ray raises bare ones, too, where a node does not start in time
        raise InputError(f"--ray {address} cannot be reached ({str(error).splitlines()[0]:.160}); {LEGAL}") from None
    finally:
        with contextlib.suppress(ValueError):  # not the main thread: Ray left it alone, too
            signal.signal(signal.SIGTERM, before)
    ray._private.worker._worker_logs_enabled = False  # a lost node would print a page on stdout
    try:
        yield
    finally:
        ray.shutdown()


def _probe(address: str) -> None:
    """Says within seconds what Ray itself would try for two minutes."""
    host, _, port = address.rpartition(":")
    if not host or not port.isdigit() or "/" in host or int(port) > 65535:
        raise InputError(f"--ray {address!r} is not an address; {LEGAL}")
    try:
        with socket.create_connection((host, int(port)), PROBE_S) as line:
            if os.environ.get("RAY_USE_TLS", "0") == "0":
                line.sendall(_HELLO)
                if line.recv(9)[3:4] != b"\x04":  # a gRPC server says its SETTINGS first
                    raise InputError(f"--ray {address} is not a Ray cluster; {LEGAL}")
    except OSError as error:
        raise InputError(f"--ray {address} cannot be reached ({error}); {LEGAL}") from None


class Cluster:
    """Actors of the connected cluster as a crew's staff.

    Args:
        limit: how many at most; None: one for each CPU that the cluster has now.

    Attributes:
        size: how many; those that find no free CPU come later.
    """

    def __init__(self, limit: int | None = None) -> None:
        import ray

        cpus = max(int(ray.cluster_resources().get("CPU", 0)), 1)
        self.size = cpus if limit is None else min(limit, cpus)
        self._identity, self._ray = identity(), ray
        self._actor = ray.remote(num_cpus=1, scheduling_strategy="SPREAD")(_by_value())

    def hire(self) -> Member:
        """An actor, which comes as soon as there is a CPU for it."""
        return _Actor(self._ray, self._actor)

    def pack(self, job: bytes) -> Any:
        """A reference: every node fetches the job once."""
        return self._ray.put(job)

    def welcome(self, arrived: tuple[str, dict[str, str] | None]) -> None:
        """Refuses a node whose code or libraries are others."""
        node, found = arrived
        if found is None:
            raise InputError(f"node {node} has no checkout of marginroute at {ROOT}; legal is the same on all nodes")
        for name, ours in self._identity.items():
            if found.get(name) != ours:
                raise InputError(
                    f"node {node} has {name} {found.get(name)!s:.20}, this machine has {ours:.20}; legal is the same "
                    "on all nodes, since other versions give other numbers"
                )

    def meant(self, error: Exception) -> Exception | None:
        """The error that the work itself raised; None for all that a lost process, node or object brings with it."""
        if isinstance(error, self._ray.exceptions.RayTaskError):
            return error.cause if isinstance(error.cause, Exception) else error
        return None if isinstance(error, self._ray.exceptions.RayError) else error


class _Actor:
    """A handle on a member in another process."""

    def __init__(self, ray: Any, actor: Any) -> None:
        self._ray, self._handle = ray, actor.remote()
        self.ready: Future[Any] = self._handle.enter.remote(str(ROOT)).future()

    def submit(self, job: int, packed: Any, item: Any) -> Future[Any]:
        done: Future[Any] = self._handle.do.remote(job, packed, item).future()
        return done

    def fate(self) -> str:
        return ""

    def stop(self, at_once: bool) -> None:
        self._ray.kill(self._handle)


def _by_value() -> type:
    """The actor's class, made here so that it travels by value: a node may lack the checkout, and then says so."""

    class Member:
        def enter(self, root: str) -> tuple[str, dict[str, str] | None]:
            sys.path.insert(0, root)
            try:
                from agents.cluster import identity
                from agents.processes import Worker
            except ImportError:
                return socket.gethostname(), None
            self._worker = Worker()
            return socket.gethostname(), identity()

        def do(self, job: int, packed: bytes | None, item: Any) -> Any:
            return self._worker.do(job, packed, item)

    return Member
