"""Where a server of ours listens: a Unix socket or loopback unless there is TLS."""

from __future__ import annotations

import asyncio
import ipaddress
import os
import socket
import stat
from collections.abc import Coroutine
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from marginroute.errors import InputError

STOP_S = 5.0  # that requests under way get when the process is asked to end


@dataclass(frozen=True)
class Listen:
    """An address.

    Attributes:
        uds: path of a Unix socket; empty: TCP.
        host, port: for TCP; port 0 is any that is free.
        tls: files of key, certificate, and of the CA whose clients are let in (None: any client); None: no TLS.
    """

    uds: str = ""
    host: str = "127.0.0.1"
    port: int = 0
    tls: tuple[str, str, str | None] | None = None

    @property
    def text(self) -> str:
        """For messages."""
        return f"unix:{self.uds}" if self.uds else f"{self._host}:{self.port}"

    @property
    def local(self) -> bool:
        """Whether only this machine can reach it."""
        return bool(self.uds) or is_loopback(self.host)

    @property
    def _host(self) -> str:
        return f"[{self.host}]" if ":" in self.host else self.host

    @property
    def grpc_address(self) -> str:
        """As gRPC writes it."""
        return f"unix:{os.path.abspath(self.uds)}" if self.uds else f"{self._host}:{self.port}"

    def clear(self) -> None:
        """Takes away the socket of a process that is no more.

        Raises:
            InputError: something else is there, or a process listens on it.
        """
        if not self.uds:
            return
        path = Path(self.uds)
        if len(os.fsencode(os.path.abspath(path))) > 100:
            raise InputError(f"{path} is too long for a Unix socket; legal is up to 100 bytes")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            if not stat.S_ISSOCK(path.stat().st_mode):
                raise InputError(f"{path} exists and is no socket; name another path")
        except FileNotFoundError:
            return
        except OSError as error:
            raise InputError(f"{path} cannot be used ({error.strerror}); name another path") from None
        with socket.socket(socket.AF_UNIX) as probe:
            try:
                probe.connect(str(path))
            except OSError:
                path.unlink()
                return
        raise InputError(f"a process listens on {path} already; name another path")

    def leave(self) -> None:
        """Takes our own socket away."""
        if self.uds:
            Path(self.uds).unlink(missing_ok=True)


def run_loop(main: Coroutine[Any, Any, None]) -> None:
    """Runs a server on uvloop, where it is installed; it takes a fifth off a round trip."""
    try:
        import uvloop
    except ImportError:
        asyncio.run(main)
    else:
        uvloop.run(main)


def is_loopback(host: str) -> bool:
    """Whether an address is only reached from this machine."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def listen_from(uds: str | None, host: str, port: int, tls: tuple[str | None, str | None, str | None]) -> Listen:
    """An address from a command line.

    Args:
        uds: path of a Unix socket, or None.
        host: for TCP.
        port: for TCP.
        tls: files of certificate, key, and client CA, or None each.

    Raises:
        InputError: an address that others can reach without TLS, half a TLS set-up, or a file that cannot be read.
    """
    cert, key, ca = tls
    if (cert is None) != (key is None) or (ca is not None and cert is None):
        raise InputError("TLS needs both --tls-cert and --tls-key")
    if not 0 <= port < 65536:
        raise InputError(f"port {port} is not legal; legal is 0 to 65535")
    for path in (cert, key, ca):
        if path is not None and not os.access(path, os.R_OK):
            raise InputError(f"{path} is missing or unreadable; name a PEM file")
    files = None if cert is None or key is None else (key, cert, ca)
    listen = Listen(uds or "", host, port, files)
    if not listen.local and files is None:
        raise InputError(f"{host} can be reached from other machines: give --tls-cert and --tls-key, or use --uds")
    return listen
