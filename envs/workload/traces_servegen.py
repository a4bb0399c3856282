"""ServeGen's client archives: not requests but their description, from which a trace is sampled.

Layout (data/ of github.com/alibaba/ServeGen; Xiang et al., "ServeGen: Workload characterization and generation of
large language model serving in production", 2025): per client `chunk-<n>-trace.csv` without a header, one line per
600 s: start (s), requests/s, coefficient of variation of gaps, Gamma or Weibull or nothing, shape, scale; and
`chunk-<n>-dataset.json`: every 6 h (key: seconds) for each field a distribution, `{value: probability}` as a string.

Gaps are drawn from the window's law, scaled to its rate (the fitted scale alone misses the rate by up to 2 times),
and prompts and outputs independently from the distributions last published before the arrival. A client without
lengths draws them from the clients that have some, by their traffic.
"""

from __future__ import annotations

import json
import re
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from envs.workload.arrivals import unit_gaps
from envs.workload.traces import MAX_TOKENS, ReadOptions, Trace
from envs.workload.traces_files import DAMAGE, opened
from marginroute.errors import InputError

Array = np.ndarray[Any, Any]

WINDOW_S = 600.0
MAX_PER_S = 1e5  # of one client: beyond what any service sees in all
DEFAULT_SPAN_S = 3600.0  # a day of the largest archives has 10**8 requests
_NAME = re.compile(r"chunk-(\d+)-(trace\.csv|dataset\.json)$")
_INPUT = ("input_tokens", "text_tokens", "image_tokens", "audio_tokens", "video_tokens")


@dataclass
class Client:
    """One client's description, W windows.

    Attributes:
        name: number in the archive.
        start_s: (W,) f8.
        rate_per_s: (W,) f8.
        weibull: (W,) bool, False for Gamma.
        shape: (W,) f8, of the law of gaps.
        lengths: distributions as (values, cumulated probabilities) of prompt and output, by the second they begin.
    """

    name: int
    start_s: Array
    rate_per_s: Array
    weibull: Array
    shape: Array
    lengths: dict[float, tuple[tuple[Array, Array], tuple[Array, Array]]]


def read_servegen(path: Path, options: ReadOptions) -> Trace:
    """A sample of requests from `start_s` to `end_s` (left out: one hour); the tenant is the client."""
    clients = read_clients(path)
    end_s = max(float(client.start_s[-1]) for client in clients) + WINDOW_S
    end_s = min(end_s, options.start_s + DEFAULT_SPAN_S if options.end_s is None else options.end_s)
    if end_s <= options.start_s:
        raise InputError(f"{path}: start_s {options.start_s:g} is not legal; legal is 0 to below {end_s:g}")
    rng = np.random.default_rng([options.seed, 0x5E12E6E4])
    donors = [client for client in clients if client.lengths]
    if not donors:
        raise InputError(f"{path}: no client has lengths; legal is at least one chunk-<n>-dataset.json")
    weight = np.cumsum([client.rate_per_s.sum() + 1e-12 for client in donors])
    parts = []
    for client in clients:
        times = _times(client, rng, options.start_s, end_s)
        if len(times):
            parts.append((times, *_lengths(client, donors, weight, rng, times), client.name))
    if not parts:
        raise InputError(f"{path}: no requests from {options.start_s:g} s to {end_s:g} s; legal is a busy stretch")
    times = np.concatenate([part[0] for part in parts])
    order = np.argsort(times, kind="stable")
    tenant = np.repeat([str(part[3]) for part in parts], [len(part[0]) for part in parts])
    return Trace(
        path=str(path),
        arrived_at_s=times[order] - options.start_s,
        prompt_tokens=np.concatenate([part[1] for part in parts])[order],
        output_tokens=np.concatenate([part[2] for part in parts])[order],
        tenant_name=tenant[order],
        note=f"sampled from a description with seed {options.seed}; "
        f"{len(clients) - len(donors)} of {len(clients)} clients draw lengths from others",
    )


def read_clients(path: Path) -> list[Client]:
    """Clients of an archive (tar, packed or not) or of a folder.

    Raises:
        InputError: nothing in it is named chunk-<n>-trace.csv, or a file cannot be read.
    """
    texts: dict[int, dict[str, bytes]] = {}
    for name, text in _members(path):
        found = _NAME.search(name)
        if found:
            texts.setdefault(int(found[1]), {})[found[2]] = text
    clients = [
        _client(path, number, files) for number, files in sorted(texts.items()) if files.get("trace.csv", b"").strip()
    ]
    if not clients:
        legal = "legal is a folder or tar archive of chunk-<n>-trace.csv and chunk-<n>-dataset.json"
        raise InputError(f"{path}: has no client; {legal}")
    return clients


def _members(path: Path) -> Iterator[tuple[str, bytes]]:
    if path.is_dir():
        for file in sorted(path.rglob("chunk-*")):
            if _NAME.search(file.name) and file.is_file():
                with opened(file) as content:
                    yield file.name, content.read()
        return
    try:
        with tarfile.open(path) as archive:
            for member in archive:
                if member.isfile() and _NAME.search(member.name):
                    content = archive.extractfile(member)
                    yield member.name, content.read() if content else b""
    except (tarfile.TarError, *DAMAGE, OSError) as error:
        problem = str(error).splitlines()[0].rstrip(":") if str(error) else type(error).__name__
        raise InputError(f"{path}: is not a whole tar archive ({problem}); legal is a tar archive") from None


def _client(path: Path, number: int, files: dict[str, bytes]) -> Client:
    name = f"chunk-{number}-trace.csv"
    rows = []
    for line, text in enumerate(files["trace.csv"].decode("utf-8", "replace").splitlines(), start=1):
        cells = text.split(",")
        try:
            start_s, rate, _, law, shape, _ = cells
            row = (float(start_s), float(rate), law.strip().lower() == "weibull", float(shape or 0.0))
            if not 0.0 <= row[1] <= MAX_PER_S or not np.isfinite(row).all() or (row[1] > 0.0 and not row[3] > 0.0):
                raise ValueError
        except ValueError:
            legal = "legal is start, rate, cv, Gamma or Weibull, shape, scale"
            raise InputError(f"{path}, {name}, line {line}: {text[:60]!r}; {legal}") from None
        rows.append(row)
    start, rate_per_s, weibull, shape = (np.array(column) for column in zip(*rows, strict=True))
    return Client(number, start, rate_per_s, weibull, shape, _distributions(path, number, files.get("dataset.json")))


def _distributions(path: Path, number: int, text: bytes | None) -> dict[float, Any]:
    if text is None:
        return {}
    try:
        data = json.loads(text)
        found = {}
        for key, fields in data.items():
            prompt = _sum([_law(fields[name]) for name in _INPUT if name in fields])
            output = _law(fields.get("output_tokens", "{}"))
            if not np.isfinite(float(key)):
                raise ValueError(f"{key} is not a number of seconds")
            if prompt is not None and output is not None:
                found[float(key)] = (prompt, output)
        return found
    except (ValueError, AttributeError, TypeError, KeyError) as error:
        legal = "legal is an object of seconds to fields of '{value: probability}'"
        raise InputError(f"{path}, chunk-{number}-dataset.json: cannot be read ({error}); {legal}") from None


def _law(text: str) -> tuple[Array, Array] | None:
    """(values, cumulated probabilities) of `{value: probability}`; None where it is empty."""
    pairs = [part.split(":") for part in text.strip().strip("{}").split(",") if ":" in part]
    values = np.array([float(value) for value, _ in pairs])
    weight = np.array([float(share) for _, share in pairs])
    if not (np.abs(values) <= MAX_TOKENS).all() or not ((weight >= 0.0) & (weight < np.inf)).all():
        raise ValueError(f"{text[:60]!r} is not a distribution of tokens")
    if not weight.sum() > 0.0:
        return None
    return values, np.cumsum(weight) / weight.sum()


def _sum(laws: list[tuple[Array, Array] | None]) -> tuple[Array, Array] | None:
    """The law of text plus image, audio and video tokens; with several, quantiles are added (largest with largest)."""
    known = [law for law in laws if law is not None]
    if not known:
        return None
    if len(known) == 1:
        return known[0]
    grid = (np.arange(1000) + 0.5) / 1000
    values = sum(law[0][np.argsort(law[0])][_place(law, grid)] for law in known)
    return np.asarray(values), np.cumsum(np.full(len(grid), 1.0 / len(grid)))


def _place(law: tuple[Array, Array], uniform: Array) -> Array:
    order = np.argsort(law[0])
    edges = np.cumsum(np.diff(law[1], prepend=0.0)[order])
    return np.minimum(np.searchsorted(edges, uniform), len(edges) - 1)


def _times(client: Client, rng: np.random.Generator, start_s: float, end_s: float) -> Array:
    """Arrivals (n,) of one client: unit-mean gaps run through its piecewise constant rate."""
    inside = (client.start_s + WINDOW_S > start_s) & (client.start_s < end_s) & (client.rate_per_s > 0.0)
    times = []
    for window in np.flatnonzero(inside):
        low, high = max(client.start_s[window], start_s), min(client.start_s[window] + WINDOW_S, end_s)
        expected = client.rate_per_s[window] * (high - low)
        law = "weibull" if client.weibull[window] else "gamma"
        gaps = unit_gaps(rng, law, float(client.shape[window]), expected)
        passed = np.cumsum(gaps) - gaps[0] * rng.random()  # the window opens inside a gap
        times.append(low + passed[passed < expected] / client.rate_per_s[window])
    return np.concatenate(times) if times else np.empty(0)


def _lengths(
    client: Client, donors: list[Client], weight: Array, rng: np.random.Generator, times: Array
) -> tuple[Array, Array]:
    source = client if client.lengths else donors[int(np.searchsorted(weight, rng.random() * weight[-1]))]
    keys = np.array(sorted(source.lengths))
    published = np.maximum(np.searchsorted(keys, times, side="right") - 1, 0)
    prompt, output = np.empty(len(times), dtype=np.int32), np.empty(len(times), dtype=np.int32)
    for index in np.unique(published):
        mine = np.flatnonzero(published == index)
        for tokens, (values, edges) in zip((prompt, output), source.lengths[keys[index]], strict=True):
            at = np.minimum(np.searchsorted(edges, rng.random(len(mine))), len(edges) - 1)
            tokens[mine] = np.maximum(np.rint(values[at]), 1).astype(np.int32)
    return prompt, output
