"""The fitted generator: what was fitted to a trace, and streams drawn from it."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from envs.workload.arrivals import Arrivals, GammaArrivals
from envs.workload.clients import Client
from envs.workload.compose import compose
from envs.workload.fit_arrivals import as_dispersed, falls_silent, fit_arrivals, fit_mmpp
from envs.workload.fit_lengths import fit_lengths
from envs.workload.fit_sessions import Links, fit_session, link_calls
from envs.workload.lengths import LengthMixture
from envs.workload.prefixes import PrefixSpec
from envs.workload.quality import QualityTruth
from envs.workload.sessions import SessionKind, draw_sessions
from envs.workload.spec import Composition, WorkloadSpec
from envs.workload.statistics import clock_of
from envs.workload.traces import Trace
from marginroute.errors import InputError

Array = np.ndarray[Any, Any]

_CLIENT_COMPONENTS = 3
_SESSION_SAMPLE = 20_000
_FEWEST_REQUESTS = 50
_FEWEST_SESSIONS = 40  # of a kind; follow-ups in all
_FEWEST_THREADS = 500  # of a kind, where sessions are told from hashes


@dataclass(frozen=True)
class Sizes:
    """How rich the fit is.

    Attributes:
        prompt_components, output_components: of length mixtures.
        clients: with figures of their own; the rest is one more.
        arrivals: bursts, mmpp, or auto: states where the stream falls silent as independent bursts cannot.
        states: of mmpp.
        kinds: of sessions.
    """

    prompt_components: int = 8
    output_components: int = 6
    clients: int = 12
    arrivals: str = "auto"
    states: int = 5
    kinds: int = 10


@dataclass(frozen=True)
class Model:
    """What was fitted.

    Attributes:
        arrivals: of requests, or of sessions where there are some.
        prompt_lengths, output_lengths: of all requests.
        clients: own figures of the largest, and of the rest as one; empty without tenants.
        sessions: kinds of chats or agent runs; empty without sessions or hashes.
        prefixes: None without hashes.
        warm_up_s: before a stream, so that chats are under way when it begins.
        complete: whether sessions were recorded whole, so that a stream begins with none.
    """

    arrivals: Arrivals
    prompt_lengths: LengthMixture
    output_lengths: LengthMixture
    clients: tuple[Client, ...] = ()
    sessions: tuple[SessionKind, ...] = ()
    prefixes: PrefixSpec | None = None
    warm_up_s: float = 0.0
    complete: bool = False

    def draw(self, span_s: float, seed: int) -> Trace:
        """A stream of the given length."""
        composition = Composition(
            clients=self.clients,
            sessions=self.sessions,
            warm_up_s=self.warm_up_s,
            prefixes=self.prefixes,
        )
        spec = WorkloadSpec(
            arrivals=self.arrivals,
            horizon_s=span_s,
            requests_per_episode=None,
            class_share=(1.0,),
            task_share=((1.0,),),
            tenants=(1,),
            tenant_exponent=1.0,
            prompt_lengths=(self.prompt_lengths,),
            output_lengths=(self.output_lengths,),
            patience_median_s=(np.inf,),
            patience_sigma=(0.0,),
            deadline_s=(np.inf,),
            recurring_share=0.0,
            recurring_prompts=1,
            recurring_exponent=1.0,
            quality=QualityTruth(((0.0,),), (0.0,), (0.0,), 0.0, 1.0),
        )
        drawn = compose(spec, composition, np.random.default_rng([seed, 0xF17]))
        return Trace(
            path="the fitted generator",
            arrived_at_s=drawn.arrived_at_s,
            prompt_tokens=drawn.prompt_tokens,
            output_tokens=drawn.output_tokens,
            prefix_block_tokens=drawn.prefix_block_tokens,
            prefix_count=drawn.prefix_count,
            prefix_hash=drawn.prefix_hash,
        )


def parts(trace: Trace, share: float, alternate_s: float = 0.0) -> tuple[Trace, Trace | None]:
    """The rows to fit and the rows to try on.

    Args:
        trace: all rows.
        share: of the time that is fitted; of the sessions, where they were recorded whole.
        alternate_s: above 0, stretches of this length are fitted and tried on in turn, joined into two streams.
    """
    whole = trace.parent_index is not None and bool((trace.parent_index >= 0).any())
    if whole and trace.session_index is not None and trace.session_index.max() < 1 and (alternate_s or share < 1.0):
        raise InputError(f"{trace.path}: has one session; legal is two or more, some to fit and some to try on")
    if alternate_s > 0.0:
        return _alternating(trace, alternate_s, whole)
    if share >= 1.0:
        return trace, None
    if whole and trace.session_index is not None:
        edge = round(share * (int(trace.session_index.max()) + 1))
        return _sessions(trace, trace.session_index < edge), _sessions(trace, trace.session_index >= edge)
    edge_s = share * trace.span_s
    return trace.between(0.0, edge_s), trace.between(edge_s, np.nextafter(trace.span_s, np.inf))


def _sessions(trace: Trace, wanted: Array) -> Trace:
    part = trace.pick(np.flatnonzero(wanted))
    return replace(part, arrived_at_s=part.arrived_at_s - part.arrived_at_s[0])


def _alternating(trace: Trace, stretch_s: float, whole: bool) -> tuple[Trace, Trace]:
    if whole and trace.session_index is not None:
        odd = trace.session_index % 2 == 1
        return _sessions(trace, ~odd), _sessions(trace, odd)
    if trace.prefix_hash is not None:
        raise InputError(f"{trace.path}: has block hashes; legal is --fit-share, whose parts keep chats together")
    stretch = (trace.arrived_at_s / stretch_s).astype(np.int64)
    cut = []
    for side in (0, 1):
        rows = np.flatnonzero(stretch % 2 == side)
        shifted = trace.arrived_at_s[rows] - (stretch[rows] // 2 + side) * stretch_s
        cut.append(replace(trace.pick(rows), arrived_at_s=shifted))
    return cut[0], cut[1]


def fit(trace: Trace, sizes: Sizes = Sizes()) -> Model:
    """The generator fitted to all rows of a trace.

    Raises:
        InputError: there are too few rows, or all arrive at once.
    """
    if trace.span_s <= 0.0:
        raise InputError(f"{trace.path}: all requests arrive at once; legal is a recording that lasts")
    if trace.n_requests < _FEWEST_REQUESTS:
        text = f"{trace.path}: {trace.n_requests} requests to fit"
        raise InputError(f"{text}; legal is {_FEWEST_REQUESTS} or more")
    prompt = fit_lengths(trace.prompt_tokens, sizes.prompt_components)
    output = fit_lengths(trace.output_tokens, sizes.output_components)
    clock_s = clock_of(trace)
    links = link_calls(trace)
    prefixes = None
    if trace.prefix_hash is not None and links is not None:
        prefixes = PrefixSpec(trace.prefix_block_tokens, links.common_tokens, (0,))
    if links is not None and (links.parent >= 0).sum() >= _FEWEST_SESSIONS:
        return replace(_with_sessions(trace, links, sizes, clock_s, prompt, output), prefixes=prefixes)
    bursts = fit_arrivals(trace.arrived_at_s, trace.span_s, clock_s)
    clients = _clients(trace, sizes.clients, clock_s)
    silent = not clients and not clock_s and falls_silent(trace.arrived_at_s, trace.span_s, bursts)
    if sizes.arrivals == "mmpp" or (sizes.arrivals == "auto" and silent):
        return Model(fit_mmpp(trace.arrived_at_s, sizes.states), prompt, output, clients, (), prefixes)
    return Model(bursts, prompt, output, clients, (), prefixes)


def _clients(trace: Trace, most: int, clock_s: float) -> tuple[Client, ...]:
    """The largest clients and, as one more, the rest; none where the trace names fewer than three."""
    if trace.tenant_name is None or not most:
        return ()
    unique, client, counts = np.unique(trace.tenant_name, return_inverse=True, return_counts=True)
    if len(unique) < 3:
        return ()
    rank = np.empty(len(unique), dtype=np.int64)
    rank[np.argsort(-counts)] = np.arange(len(unique))
    place = np.minimum(rank[client], most)
    rows_of = [np.flatnonzero(place == number) for number in range(min(most + 1, len(unique)))]
    alone = [fit_arrivals(trace.arrived_at_s[rows], trace.span_s, clock_s) for rows in rows_of]
    together = as_dispersed(alone, trace.arrived_at_s, trace.span_s, clock_s)
    return tuple(
        Client(
            share=len(rows) / trace.n_requests,
            class_index=0,
            tenant_index=0,
            arrivals=arrivals.scaled(1.0 / arrivals.mean_rate_per_s()),
            prompt_lengths=fit_lengths(trace.prompt_tokens[rows], _CLIENT_COMPONENTS, steps=200),
            output_lengths=fit_lengths(trace.output_tokens[rows], _CLIENT_COMPONENTS, steps=200),
        )
        for rows, arrivals in zip(rows_of, together, strict=True)
    )


def _with_sessions(
    trace: Trace, links: Links, sizes: Sizes, clock_s: float, prompt: LengthMixture, output: LengthMixture
) -> Model:
    components = max(sizes.prompt_components, sizes.output_components)
    kinds = _kinds(trace, links, sizes.kinds, min(components, 5))
    if links.complete:
        starts = np.sort(trace.arrived_at_s[links.parent < 0])
        rate_per_s = (len(starts) - 1) / float(starts[-1] - starts[0])
        return Model(GammaArrivals(rate_per_s, 0.05), prompt, output, (), kinds, complete=True)
    drawn = [draw_sessions(kind, np.random.default_rng(0), np.arange(_SESSION_SAMPLE)).root for kind in kinds]
    calls = sum(kind.share * len(root) / _SESSION_SAMPLE for kind, root in zip(kinds, drawn, strict=True))
    process = fit_arrivals(trace.arrived_at_s, trace.span_s, clock_s)
    # of all calls; follow-ups, minutes later, do not vary with the starts: these must vary `calls` times as much
    arrivals = replace(process.scaled(1.0 / calls), cv=tuple(cv * calls for cv in process.cv))
    warm_up_s = min(4.0 * float(np.nanquantile(links.gap_s, 0.99)), 20_000.0)
    return Model(arrivals, prompt, output, (), kinds, warm_up_s=warm_up_s)


def _kinds(trace: Trace, links: Links, number: int, components: int) -> tuple[SessionKind, ...]:
    """Kinds of sessions, alike in number: of whole ones by their longest prompt, of others by their first.

    The longest prompt tells the context window and how fast a session fills it; growth, compaction and length of a
    session go together, and kinds keep that.
    """
    whole = links.complete and trace.session_index is not None
    session = trace.session_index if whole else links.session()
    assert session is not None
    total = int(session.max()) + 1
    prompt = np.zeros(total)
    rows = np.arange(trace.n_requests) if whole else np.flatnonzero(links.parent < 0)
    np.maximum.at(prompt, session[rows], trace.prompt_tokens[rows])
    number = max(1, min(number, total // (_FEWEST_SESSIONS if whole else _FEWEST_THREADS)))
    group = np.searchsorted(np.quantile(prompt, np.arange(1, number) / number), prompt, side="right")
    longest = int(trace.prompt_tokens.max())
    kinds = []
    for mine in _joined(group, np.bincount(session[links.parent >= 0], minlength=total)):
        rows = np.flatnonzero(mine[session])
        kind = fit_session(trace.pick(rows), links.pick(rows), components, longest)
        kinds.append(replace(kind, share=float(mine.mean())))
    return tuple(kinds)


def _joined(group: Array, follow_ups: Array) -> list[Array]:
    """Sessions (S,) bool of each group, of several where one has too few follow-ups (S,) to tell what comes next."""
    found = [np.zeros(len(group), dtype=np.bool_)]
    for index in range(int(group.max()) + 1):
        if follow_ups[found[-1]].sum() >= _FEWEST_SESSIONS:
            found.append(np.zeros(len(group), dtype=np.bool_))
        found[-1] |= group == index
    if len(found) > 1 and follow_ups[found[-1]].sum() < _FEWEST_SESSIONS:
        last = found.pop()
        found[-1] |= last
    return found
