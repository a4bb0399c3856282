"""The files of a bundle, whose meaning is in `bundle`: written whole or not at all, read with their hashes verified."""

from __future__ import annotations

import hashlib
import io
import json
import os
import shutil
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from marginroute.errors import InputError
from marginroute.features import FEATURE_VERSION
from marginroute.view import Array

FORMAT = 1
MAX_FILE_BYTES = 64 << 20


def plain(value: Any) -> Any:
    """Floats that JSON cannot hold become strings, so that the manifest is strict JSON in every language."""
    if isinstance(value, dict):
        return {key: plain(x) for key, x in value.items()}
    if isinstance(value, list | tuple):
        return [plain(x) for x in value]
    if isinstance(value, float) and not np.isfinite(value):
        return "Infinity" if value > 0 else "-Infinity" if value < 0 else "NaN"
    return value


def number(value: Any) -> float:
    """A float of the manifest."""
    return float(value)  # float("Infinity") is what `plain` wrote


def digest_of(manifest: dict[str, Any]) -> str:
    """sha256 of a manifest without its own `digest`."""
    body = {key: value for key, value in manifest.items() if key != "digest"}
    return hashlib.sha256(json.dumps(body, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def npz_bytes(arrays: dict[str, Array]) -> bytes:
    """An npz archive of arrays by name."""
    buffer = io.BytesIO()
    np.savez(buffer, **arrays)  # type: ignore[arg-type]
    return buffer.getvalue()


def write(folder: Path, manifest: dict[str, Any], files: dict[str, bytes], check: Callable[[Path], Any]) -> None:
    """Writes files and manifest beside the folder and has them checked, then puts them in its place.

    Args:
        folder: the bundle's.
        manifest: without hashes; those of the files and its own are added.
        files: the others by name.
        check: reads a complete bundle.

    Raises:
        InputError: as `check`, or the disk refuses them.
    """
    sha256 = {name: hashlib.sha256(data).hexdigest() for name, data in files.items()}
    whole = plain(manifest | {"sha256": sha256})
    whole["digest"] = digest_of(whole)
    files = {**files, "manifest.json": (json.dumps(whole, indent=1, sort_keys=True) + "\n").encode()}
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"{folder.parent} cannot be made ({error.strerror}); name another folder") from None
    try:
        _replace(folder, files, check)
    except OSError as error:
        raise InputError(f"{folder} cannot be written ({error.strerror}); name another folder") from None


def _replace(folder: Path, files: dict[str, bytes], check: Callable[[Path], Any]) -> None:
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}-") as scratch:
        complete = Path(scratch) / "bundle"
        complete.mkdir()
        for name, data in files.items():
            (complete / name).write_bytes(data)
        check(complete)
        if folder.exists():
            shutil.rmtree(folder)
        os.replace(complete, folder)


def _read(folder: Path, name: str) -> bytes:
    path = folder / name
    try:
        if path.stat().st_size > MAX_FILE_BYTES:
            raise InputError(f"{path} is larger than the {MAX_FILE_BYTES >> 20} MiB that a bundle file may have")
        return path.read_bytes()
    except OSError:
        raise InputError(f"{path} is missing or unreadable; a bundle is a folder written by export.py") from None


def read_manifest(folder: Path) -> dict[str, Any]:
    """The verified manifest of a bundle.

    Raises:
        InputError: missing, malformed, tampered with, or of another format or feature version.
    """
    path = folder / "manifest.json"
    data = _read(folder, "manifest.json")
    try:
        manifest = json.loads(data)
        digest, fmt, version = manifest["digest"], manifest["format"], manifest["feature_version"]
    except (ValueError, KeyError, TypeError):
        raise InputError(f"{path} is not a bundle manifest; export the policy again") from None
    if fmt != FORMAT:
        raise InputError(f"{path} has format {fmt}; this marginroute reads format {FORMAT}; export the policy again")
    if version != FEATURE_VERSION:
        raise InputError(
            f"{path} was made for feature version {version}; this marginroute computes version {FEATURE_VERSION}; "
            "train and export the policy again"
        )
    if digest != digest_of(manifest):
        raise InputError(f"{path} does not match its digest: it was changed after the export; export the policy again")
    return dict(manifest)


def verified(folder: Path, name: str, sha256: dict[str, str]) -> bytes:
    """Content of a file that is what the manifest's hashes say.

    Raises:
        InputError: it is missing, too large, or another.
    """
    data = _read(folder, name)
    if hashlib.sha256(data).hexdigest() != sha256.get(name):
        raise InputError(f"{folder / name} does not match the sha256 in the manifest; export the policy again")
    return data


def arrays_of(folder: Path, name: str, sha256: dict[str, str]) -> dict[str, Array]:
    """The same of an npz archive, as arrays by name; raises as `verified`, or where it is no plain archive."""
    data = verified(folder, name, sha256)
    try:
        with np.load(io.BytesIO(data), allow_pickle=False) as archive:
            return {key: archive[key] for key in archive.files}
    except (ValueError, OSError, zipfile.BadZipFile):
        raise InputError(f"{folder / name} is not a plain npz archive; export the policy again") from None
