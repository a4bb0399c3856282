"""`python -m envs fetch NAME --out DIR`: downloads a public set from its home; the file is whole, or absent."""

from __future__ import annotations

import argparse
import hashlib
import http.client
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path, PurePosixPath
from urllib.parse import urlsplit

from envs.fetch_catalog import CATALOG, Download
from envs.progress import Progress, silent
from marginroute.cli import QUIET, verbosity
from marginroute.errors import InputError
from marginroute.whole_file import replacing

_PIECE_BYTES = 1 << 16
_TIMEOUT_S = 30.0


def run(arguments: argparse.Namespace) -> int:
    """The command."""
    if arguments.list or arguments.name is None:
        for name, download in CATALOG.items():
            checked = "sha256 published" if download.sha256 else "no published digest"
            print(f"{name:<24} {download.trace_format:<10} {download.licence:<12} {checked:<20} {download.url}")
        return 0
    if arguments.name not in CATALOG:
        raise InputError(f"set {arguments.name!r} is not known; legal is {', '.join(CATALOG)}")
    download = CATALOG[arguments.name]
    path, sha256 = fetch(download, arguments.out, _bar(sys.stderr.isatty() and verbosity() > QUIET))
    state = "verified" if download.sha256 else "unverified: its publisher states no digest"
    print(f"{path}  {path.stat().st_size:,} bytes, {download.licence}\nsha256 {sha256} ({state})")
    print(f"read it with --trace {path} --trace-format {download.trace_format}")
    return 0


def fetch(download: Download, folder: Path, progress: Progress = silent) -> tuple[Path, str]:
    """Downloads a file into a folder, which is made.

    Args:
        download: what to fetch.
        folder: where to; the file keeps its name, and one that is there is replaced once the new one is whole.
        progress: called with bytes done and bytes expected (0: unknown).

    Returns:
        The path and the digest of what came.

    Raises:
        InputError: no connection, an answer other than the file, too few bytes, another digest, or no room.
    """
    path = folder / PurePosixPath(urlsplit(download.url).path).name
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with replacing(path) as partial:
            digest, size = hashlib.sha256(), 0
            with open(partial, "wb") as file, urllib.request.urlopen(download.url, timeout=_TIMEOUT_S) as answer:
                expected = int(answer.headers.get("Content-Length") or download.size_bytes)
                while piece := answer.read(_PIECE_BYTES):
                    file.write(piece)
                    digest.update(piece)
                    size += len(piece)
                    progress(size, expected)
            _check(download, digest.hexdigest(), size, expected)
        return path, digest.hexdigest()
    except urllib.error.HTTPError as error:
        raise InputError(
            f"{download.url}: answers {error.code} {error.reason}; legal is a file at that place"
        ) from None
    except (urllib.error.URLError, TimeoutError, http.client.HTTPException, ConnectionError) as error:
        reason = getattr(error, "reason", None) or error
        text = f"{download.url}: cannot be reached ({reason})"
        raise InputError(f"{text}; legal is a machine with a connection to it, or the file fetched elsewhere") from None
    except OSError as error:
        raise InputError(f"{path}: cannot be written ({error.strerror}); legal is a folder you own") from None


def _check(download: Download, sha256: str, size: int, expected: int) -> None:
    if expected and size != expected:
        raise InputError(f"{download.url}: {size:,} bytes came; legal is {expected:,}, try again")
    if download.sha256 and sha256 != download.sha256:
        raise InputError(f"{download.url}: has sha256 {sha256}; legal is {download.sha256}, as published")


def _bar(shown: bool) -> Progress:
    """A progress bar on stderr, at most five times a second."""
    last = 0.0

    def progress(done: int, total: int) -> None:
        nonlocal last
        now = time.monotonic()
        if shown and (now - last > 0.2 or done == total):
            last = now
            share = f"{done / total:4.0%} of {total / 1e6:,.1f} MB" if total else f"{done / 1e6:,.1f} MB"
            filled = "#" * round(30 * done / total) if total else ""
            print(f"\r[{filled:<30}] {share}", end="\n" if done == total else "", file=sys.stderr, flush=True)

    return progress if shown else lambda done, total: None
