"""`python -m envs describe TRACE|SCENARIO [--against ...]`: what matters about requests, as a table and as plots.

A scenario, or a workload alone, is drawn for as long as the other stream lasts, or for `--duration-s`, and `--draws`
times: its figures are means over the drawn streams, since a single one says little about a generator of bursts.
`--against fit` fits the generator to the trace itself. Beside goals stands how far two parts of the recording are from
each other: nothing that is drawn can be expected to come nearer than that.
Where one side was recorded on a coarse clock, dispersion is measured with both sides rounded to it.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from envs import scenario_files
from envs.describe_page import page
from envs.scenario import Scenario, load_scenario
from envs.workload.fit_model import parts
from envs.workload.requests import Workload
from envs.workload.statistics import CACHE_TOKENS, FANO_WINDOWS_S, Summary, clock_of, ks_two_samples, mean_of, summary
from envs.workload.traces import FORMATS, Trace, parse_columns, read_trace
from marginroute.errors import InputError
from marginroute.whole_file import write_whole

Array = np.ndarray[Any, Any]

_DEFAULT_S = 3600.0
FIT = "fit"  # in place of a scenario: the generator fitted to the trace
_FEWEST_ROWS = 100  # of a half of a recording that is compared with the other
MOST_KS, MOST_FANO, MOST_HITS = 0.07, 0.30, 0.03  # how far a fitted generator may be off, see docs/workloads.md
Row = tuple[str, ...]
Lengths = tuple[Array, Array]  # prompt and output tokens
Generator = Callable[[float, int], Trace]  # seconds and seed to a stream


def run(arguments: argparse.Namespace) -> int:
    """The command."""
    _check(arguments)
    names = [name for name in (arguments.what, arguments.against) if name]
    columns = _columns(names, arguments)
    firsts = [column.first for column in columns]
    clock_s = max(clock_of(first) for first in firsts)
    measured = [column.measured(clock_s) for column in columns]
    figures, distances = [figure for figure, _ in measured], _distances([lengths for _, lengths in measured])
    titles = [f"{Path(name).name}{column.times()}" for name, column in zip(names, columns, strict=True)]
    halves = _halves(firsts[0], clock_s) if len(columns) == 2 and not columns[0].others else []
    rows = [*table(figures, distances), *goals(figures, distances, halves)]
    _print(titles, rows, firsts, clock_s)
    if arguments.out is not None:
        write_whole(arguments.out, page(titles, firsts, rows, clock_s))
        print(f"wrote {arguments.out}")
    return 0


def _check(arguments: argparse.Namespace) -> None:
    """Refuses what cannot be drawn, cut or written, before anything is read."""
    out, duration_s = arguments.out, arguments.duration_s
    if out is not None and (out.is_dir() or not out.parent.is_dir()):
        raise InputError(f"--out {out}: no such folder, or one itself; legal is a file in one that exists")
    if arguments.draws < 1:
        raise InputError(f"--draws {arguments.draws} is not legal; legal is 1 or more")
    if duration_s is not None and not 0.0 < duration_s < math.inf:
        raise InputError(f"--duration-s {duration_s:g} is not legal; legal is more than 0")
    if not 0.0 <= arguments.from_s < math.inf:
        raise InputError(f"--from-s {arguments.from_s:g} is not legal; legal is 0 or more")
    if arguments.to_s is not None and not arguments.to_s > arguments.from_s:
        raise InputError(f"--to-s {arguments.to_s:g} is not legal; legal is more than --from-s, {arguments.from_s:g}")


@dataclass(frozen=True)
class _Column:
    """A trace, or the first of several drawn streams and what draws the others: one at a time is in memory."""

    first: Trace
    others: tuple[Callable[[], Trace], ...] = ()

    def times(self) -> str:
        return f" x {1 + len(self.others)}" if self.others else ""

    def measured(self, clock_s: float) -> tuple[Summary, Lengths]:
        """Mean figures, and all prompt and output lengths."""
        figures, lengths = [summary(self.first, clock_s)], [_lengths(self.first)]
        for draw in self.others:
            stream = draw()
            figures.append(summary(stream, clock_s))
            lengths.append(_lengths(stream))
        prompt, output = zip(*lengths, strict=True)
        return mean_of(figures), (np.concatenate(prompt), np.concatenate(output))


def _lengths(stream: Trace) -> Lengths:
    return stream.prompt_tokens, stream.output_tokens


def _columns(names: list[str], arguments: argparse.Namespace) -> list[_Column]:
    """The streams of each name: a trace alone, or those drawn for as long as a trace lasts."""
    found: dict[int, _Column] = {}
    generators: dict[int, Generator] = {}
    for place, name in enumerate(names):
        if name == FIT and place:
            generators[place] = _fitted(names[0], arguments)
        elif _is_trace(name, arguments):
            found[place] = _Column(_trace(name, arguments))
        else:
            generators[place] = partial(drawn, _generator(name))
    lasting_s = max((column.first.span_s for column in found.values()), default=_DEFAULT_S)
    length_s = arguments.duration_s or lasting_s or _DEFAULT_S
    for place, generator in generators.items():
        later = range(arguments.seed + 1, arguments.seed + arguments.draws)
        others = tuple(partial(generator, length_s, seed) for seed in later)
        found[place] = _Column(generator(length_s, arguments.seed), others)
    return [found[place] for place in range(len(names))]


def _fitted(name: str, arguments: argparse.Namespace) -> Generator:
    """The generator fitted to the whole trace; of a description, to the stretch that is sampled."""
    from envs.workload.fit_model import fit

    if not _is_trace(name, arguments):
        raise InputError(f"--against {FIT} beside {name}; legal is a file of recorded requests before it")
    return fit(_trace(name, arguments, whole=True)).draw


def _generator(name: str) -> Scenario:
    """A scenario, or a workload (its file, or a name in configs/workloads) behind a fleet that any request fits."""
    path = Path(name)
    if not path.exists():
        path = scenario_files.CONFIGS / "workloads" / f"{name}.yaml"
        if (scenario_files.CONFIGS / "scenarios" / path.name).exists() or not path.exists():
            return load_scenario(name)
    if "arrivals" not in scenario_files.read_yaml(path):
        return load_scenario(name)
    roomy = {f"fleet.pools.{pool}.kv_blocks": 1_000_000 for pool in ("small", "medium", "large")}
    return load_scenario("azure_conversation", {"workload": name, "load_scale": 1.0, "conditions": {}, **roomy})


def _is_trace(name: str, arguments: argparse.Namespace) -> bool:
    path = Path(name)
    if arguments.trace_format and arguments.trace_format not in FORMATS:
        raise InputError(f"--trace-format {arguments.trace_format!r} is not legal; legal is {', '.join(FORMATS)}")
    plain = path.suffix in ("", ".yaml", ".yml")
    if not path.exists() and not plain:
        raise InputError(
            f"{name}: no such file; legal is a file of recorded requests, a YAML file or a scenario's name"
        )
    return path.exists() and path.suffix not in (".yaml", ".yml")


def _trace(name: str, arguments: argparse.Namespace, whole: bool = False) -> Trace:
    """The stretch of it that is asked for, or all of it; a description is sampled over the stretch in any case."""
    columns = parse_columns(arguments.columns) if arguments.columns else None
    trace_format = arguments.trace_format or ""
    sampled = Path(name).is_dir() or (trace_format or _told(name, columns)) == "servegen"
    if sampled:
        options = {"start_s": arguments.from_s, "end_s": arguments.to_s, "seed": arguments.seed}
        return read_trace(name, "servegen", None, **options)
    trace = read_trace(name, trace_format, columns)
    if whole or (not arguments.from_s and arguments.to_s is None):
        return trace
    return trace.between(arguments.from_s, math.inf if arguments.to_s is None else arguments.to_s)


def _told(name: str, columns: dict[str, str] | None) -> str:
    from envs.workload.traces_detect import detect

    return "csv" if columns else detect(Path(name))


def drawn(scenario: Scenario, duration_s: float, seed: int) -> Trace:
    """A scenario's requests as a trace, drawn at its own rate for the given time."""
    count = scenario.requests_per_episode
    if count is not None:
        count = max(1, round(count * duration_s / scenario.horizon_s))
    longer = scenario.model_copy(update={"horizon_s": duration_s, "requests_per_episode": count})
    return as_trace(longer.generate(seed), scenario.name)


def as_trace(workload: Workload, name: str) -> Trace:
    """A workload in order of its (nominal) arrival times."""
    order = np.argsort(workload.arrived_at_s, kind="stable")
    place = np.empty(len(order), dtype=np.int32)
    place[order] = np.arange(len(order), dtype=np.int32)
    parent = workload.parent_index[order]
    first = np.cumsum(workload.prefix_count, dtype=np.int64) - workload.prefix_count
    count = workload.prefix_count[order]
    within = np.arange(int(count.sum())) - np.repeat(np.cumsum(count) - count, count)
    hashed, chats = workload.prefix_block_tokens > 0, workload.has_sessions
    return Trace(
        path=name,
        arrived_at_s=workload.arrived_at_s[order],
        prompt_tokens=workload.prompt_tokens[order],
        output_tokens=workload.output_tokens[order],
        tenant_name=workload.tenant_index[order].astype(str),
        prompt_key=workload.prompt_key[order],
        session_index=workload.session_index[order] if chats else None,
        parent_index=np.where(parent >= 0, place[parent], -1).astype(np.int32) if chats else None,
        think_s=np.where(parent >= 0, workload.think_s[order], np.nan) if chats else None,
        prefix_block_tokens=workload.prefix_block_tokens,
        prefix_count=count if hashed else None,
        prefix_hash=workload.prefix_hash[np.repeat(first[order], count) + within] if hashed else None,
    )


def _distances(lengths: list[Lengths]) -> list[tuple[float, float]]:
    """Kolmogorov-Smirnov distances of the first prompt and output lengths from the second."""
    if len(lengths) < 2:
        return []
    one, other = lengths
    return [(ks_two_samples(one[0], other[0]), ks_two_samples(one[1], other[1]))]


def _halves(recorded: Trace, clock_s: float) -> list[str]:
    """How far the second half of a recording (of its sessions, where they are whole) is from the first, per goal.

    Empty where a half has too few requests to tell.
    """
    if recorded.session_index is not None and recorded.session_index.max() < 1:
        return []
    if recorded.n_requests < 2 * _FEWEST_ROWS or recorded.span_s <= 0.0:
        return []
    one, other = parts(recorded, 0.5)
    if other is None or min(one.n_requests, other.n_requests) < _FEWEST_ROWS:
        return []
    ends_s = min(one.span_s, other.span_s)
    if recorded.session_index is not None:  # both begin with no session under way, and are compared while some begin
        ends_s = min(ends_s, recorded.span_s / 2.0)
    if ends_s <= other.arrived_at_s[0]:
        return []
    pair = [part.between(0.0, np.nextafter(ends_s, np.inf)) for part in (one, other)]
    figures = [summary(part, clock_s) for part in pair]
    return [found for _, found, _ in goals(figures, _distances([_lengths(part) for part in pair]), [])]


def table(figures: list[Summary], distances: list[tuple[float, float]]) -> list[Row]:
    """Rows of label and one text per stream; figures that no stream has are left out."""
    rows: list[Row] = []

    def add(label: str, form: str, values: list[Any]) -> None:
        known = [value is not None and not (isinstance(value, float) and math.isnan(value)) for value in values]
        texts = [form.format(value) if told else "" for value, told in zip(values, known, strict=True)]
        if any(texts):
            rows.append((label, *texts))

    def each(label: str, form: str, name: str, at: int | None = None) -> None:
        values = [getattr(figure, name) for figure in figures]
        add(label, form, values if at is None else [value[at] if len(value) > at else None for value in values])

    each("requests", "{:,}", "requests")
    each("span s", "{:,.0f}", "span_s")
    each("rate /s", "{:.3g}", "rate_per_s")
    each("peak minute /s", "{:.3g}", "peak_per_s")
    each("gap CV", "{:.2f}", "gap_cv")
    for at, window_s in enumerate(FANO_WINDOWS_S):
        each(f"Fano {window_s:g} s", "{:.2f}", "fano", at)
    for name in ("prompt", "output"):
        for at, label in enumerate(("p10", "p50", "p90", "p99", "mean", "max")):
            each(f"{name} tokens {label}", "{:,.0f}", name, at)
    for at, name in enumerate(("prompt", "output")):
        if distances:
            rows.append((f"{name} tokens KS", f"{distances[0][at]:.3f}", ""))
    each("prompt~output rank corr.", "{:+.2f}", "length_correlation")
    each("prompt~output corr. of clients", "{:+.2f}", "client_correlation")
    add("clients", "{:,}", [figure.clients or None for figure in figures])
    each("largest client", "{:.1%}", "top_client_share")
    each("largest tenth of clients", "{:.1%}", "top_tenth_share")
    each("10-min windows active", "{:.1%}", "active_share")
    add("sessions", "{:,}", [figure.sessions or None for figure in figures])
    for at, label in enumerate(("p10", "p50", "p90", "p99", "mean")):
        each(f"requests per session {label}", "{:,.1f}", "session_requests", at)
    each("follow-ups", "{:.1%}", "follow_share")
    for at, label in enumerate(("p10", "p50", "p90", "p99", "mean")):
        each(f"think s {label}", "{:,.1f}", "think", at)
    each("repeated prompts", "{:.1%}", "repeat_share")
    for at, tokens in enumerate(CACHE_TOKENS):
        size = "any size" if math.isinf(tokens) else f"{tokens / 1e6:g}M tokens"
        each(f"prefix hits, {size}", "{:.1%}", "hits", at)
    return rows


def goals(figures: list[Summary], distances: list[tuple[float, float]], halves: list[str]) -> list[Row]:
    """Whether the second stream is as near to the first as a generator should be: what was found, met or missed.

    `halves`: what is found so between the halves of the first; empty where that is not known.
    """
    rows: list[Row] = []

    def judge(label: str, found: list[str], met: bool) -> None:
        known = halves[len(rows) :][:1]
        own = f" (its halves: {known[0]})" if known else ""
        rows.append((f"goal: {label}", " / ".join(found) + own, "met" if met else "missed"))

    for (one, other), pair in zip([figures] if len(figures) == 2 else [], distances, strict=False):
        judge(f"lengths, KS <= {MOST_KS:g}", [f"{x:.3f}" for x in pair], max(pair) <= MOST_KS)
        off = [theirs / ours - 1.0 for ours, theirs in zip(one.fano, other.fano, strict=False) if ours > 0.0]
        off = [x for x in off if math.isfinite(x)]
        if off:
            judge(f"Fano within {MOST_FANO:.0%}", [f"{x:+.0%}" for x in off], max(map(abs, off)) <= MOST_FANO)
        points = [abs(theirs - ours) for ours, theirs in zip(one.hits, other.hits, strict=False)]
        if points:
            judge(f"prefix hits within {MOST_HITS:.0%}", [f"{max(points):.1%}"], max(points) <= MOST_HITS)
    return rows


def _print(titles: list[str], rows: list[Row], streams: list[Trace], clock_s: float) -> None:
    from rich.console import Console
    from rich.table import Table

    shown = Table(box=None, pad_edge=False)
    shown.add_column("")
    for title in titles:
        shown.add_column(title, justify="right")
    for row in rows:
        shown.add_row(*row)
    console = Console()
    console.print(shown)
    notes = [f"{stream.path}: {stream.note}" for stream in streams if stream.note]
    notes += [f"{stream.path}: {stream.skipped_rows:,} rows left out" for stream in streams if stream.skipped_rows]
    if clock_s:
        notes.append(f"a recorder rounded arrivals to about {clock_s:g} s; gaps and dispersion are of times so rounded")
    for note in notes:
        console.print(note, style="dim", highlight=False, soft_wrap=True)
