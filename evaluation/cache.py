"""Episodes that were played before, by content: scenario, trace, policy, code and seed decide the file's name."""

from __future__ import annotations

import contextlib
import hashlib
import os
import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from agents.cluster import code_digest
from agents.workers import Crew
from envs.progress import Progress, silent
from evaluation.protocol import CHUNK_EPISODES, evaluate_policies
from evaluation.results import EpisodeResults, check_paired, concatenate
from marginroute.policy import Policy
from marginroute.whole_file import replacing

if TYPE_CHECKING:
    from envs.scenario import Scenario, Split

ROOT = Path(__file__).parents[1]
CACHE = ROOT / ".marginroute_cache" / "results"
CODE = ("marginroute", "envs", "evaluation")
MOST_BYTES = 1 << 30
"""Above it the files that were used least recently go."""


def cached_play(
    scenario: Scenario,
    policies: Mapping[str, Policy],
    episodes: int,
    seed: int,
    progress: Progress | None = None,
    workers: int | Crew | None = None,
    use_cache: bool = True,
    split: Split = "heldout",
) -> dict[str, EpisodeResults]:
    """As `evaluate_policies`, but only what was not played before is played.

    Policies are asked for in chunks of episodes; the results are the same with and without the cache.
    """
    report = progress or silent
    if not use_cache:
        return evaluate_policies(
            scenario, policies, episodes, split=split, first_seed=seed, progress=report, workers=workers
        )
    total, done = episodes * len(policies), 0
    parts: dict[str, list[EpisodeResults]] = {name: [] for name in policies}
    missing: dict[tuple[int, int], dict[str, Path]] = {}
    for start in range(seed, seed + episodes, CHUNK_EPISODES):
        size = min(CHUNK_EPISODES, seed + episodes - start)
        for name, policy in policies.items():
            path = CACHE / f"{_key(scenario, policy, name, split, start, size)}.pkl"
            found = _read(path)
            if found is None:
                missing.setdefault((start, size), {})[name] = path
            else:
                parts[name].append(found)
                done += size
    report(done, total)
    for block, names in _blocks(missing):
        start, size = block
        before = done

        def count(inner: int, _: int, before: int = before) -> None:
            report(before + inner, total)

        chosen = {name: policies[name] for name in names}
        played = evaluate_policies(
            scenario, chosen, size, split=split, first_seed=start, progress=count, workers=workers
        )
        done += size * len(chosen)
        for name, results in played.items():
            parts[name].append(results)
            for (first, length), paths in missing.items():
                if start <= first < start + size and name in paths:
                    rows = slice(first - start, first - start + length)
                    _write(paths[name], results.episodes(rows))
    whole = {name: concatenate(of_name) for name, of_name in parts.items()}
    check_paired(whole)
    return whole


def _blocks(missing: dict[tuple[int, int], dict[str, Path]]) -> list[tuple[tuple[int, int], tuple[str, ...]]]:
    """Joins neighbouring chunks that miss the same policies, so that processes share them out together."""
    blocks: list[tuple[tuple[int, int], tuple[str, ...]]] = []
    for (start, size), paths in sorted(missing.items()):
        names = tuple(paths)
        if blocks and blocks[-1][1] == names and sum(blocks[-1][0]) == start:
            (first, length), _ = blocks.pop()
            blocks.append(((first, length + size), names))
        else:
            blocks.append(((start, size), names))
    return blocks


def _key(scenario: Scenario, policy: Policy, name: str, split: str, start: int, size: int) -> str:
    digest = hashlib.sha256(pickle.dumps(policy))
    trace = scenario.trace.sha256 if scenario.trace is not None else ""
    for part in (code_digest(CODE), scenario.hash, trace, name, split, str(start), str(size)):
        digest.update(b"|" + part.encode())
    return digest.hexdigest()[:40]


def _read(path: Path) -> EpisodeResults | None:
    """A stored chunk; None if there is none or it cannot be read."""
    with contextlib.suppress(Exception):
        found = pickle.loads(path.read_bytes())
        os.utime(path)
        return found if isinstance(found, EpisodeResults) else None
    return None


def _write(path: Path, results: EpisodeResults) -> None:
    """Stores a chunk if the disk allows; makes room first."""
    with contextlib.suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        files = sorted(path.parent.glob("*.pkl"), key=lambda file: file.stat().st_mtime)
        room = MOST_BYTES - sum(file.stat().st_size for file in files)
        while files and room < 0:
            room += files[0].stat().st_size
            files.pop(0).unlink()
        with replacing(path) as partial:
            partial.write_bytes(pickle.dumps(results))
