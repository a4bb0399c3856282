"""The fitted generator: what was fitted to a trace, and streams drawn from it."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from envs.workload.arrivals import Arrivals, GammaArrivals, MmppArrivals
from envs.workload.arrivals_bursts import BurstArrivals
from envs.workload.clients import Client
from envs.workload.compose import compose
from envs.workload.fit_arrivals import fit_arrivals, fit_mmpp
from envs.workload.fit_lengths import fit_lengths
from envs.workload.fit_sessions import Links, fit_session, link_calls
from envs.workload.lengths import LengthMixture
from envs.workload.prefixes import PrefixSpec
from envs.workload.quality import QualityTruth
from envs.workload.sessions import SessionKind, draw_sessions
from envs.workload.spec import Composition, WorkloadSpec
from envs.workload.statistics import FANO_WINDOWS_S, clock_of
from envs.workload.traces import Trace
from marginroute.errors import InputError

Array = np.ndarray[Any, Any]

_CLIENT_COMPONENTS = 3
_SESSION_SAMPLE = 20_000
_FEWEST_REQUESTS = 50
_FEWEST_SESSIONS = 40  # of a kind


@dataclass(frozen=True)
class Sizes:
    """How rich the fit is.

    Attributes:
        prompt_components, output_components: of length mixtures.
        clients: with figures of their own; the rest is one more.
        arrivals: bursts or mmpp.
        states: of mmpp.
        kinds: of sessions, where they were recorded whole.
    """

    prompt_components: int = 8
    output_components: int = 6
    clients: int = 12
    arrivals: str = "bursts"
    states: int = 2
    kinds: int = 6


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
        InputError: there are too few rows.
    """
    if trace.n_requests < _FEWEST_REQUESTS:
        text = f"{trace.path}: {trace.n_requests} requests to fit"
        raise InputError(f"{text}; legal is {_FEWEST_REQUESTS} or more")
    prompt = fit_lengths(trace.prompt_tokens, sizes.prompt_components)
    output = fit_lengths(trace.output_tokens, sizes.output_components)
    clock_s = clock_of(trace)
    links = link_calls(trace)
    if links is not None:
        return _with_sessions(trace, sizes, clock_s, prompt, output)
    if sizes.arrivals == "mmpp":
        rate, dwell_s, jump = fit_mmpp(trace.arrived_at_s, sizes.states)
        rows = tuple(tuple(float(x) for x in row) for row in jump)
        arrivals: Arrivals = MmppArrivals(tuple(map(float, rate)), tuple(map(float, dwell_s)), rows)
    else:
        arrivals = fit_arrivals(trace.arrived_at_s, trace.span_s, clock_s)
    return Model(arrivals, prompt, output, _clients(trace, sizes.clients, clock_s))


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
    found = []
    for number in range(min(most + 1, len(unique))):
        rows = np.flatnonzero(place == number)
        arrivals = fit_arrivals(trace.arrived_at_s[rows], trace.span_s, clock_s)
        found.append(
            Client(
                share=len(rows) / trace.n_requests,
                class_index=0,
                tenant_index=0,
                arrivals=arrivals.scaled(1.0 / arrivals.mean_rate_per_s()),
                prompt_lengths=fit_lengths(trace.prompt_tokens[rows], _CLIENT_COMPONENTS, steps=200),
                output_lengths=fit_lengths(trace.output_tokens[rows], _CLIENT_COMPONENTS, steps=200),
            )
        )
    return _as_dispersed(tuple(found), trace, clock_s)


def _as_dispersed(clients: tuple[Client, ...], trace: Trace, clock_s: float) -> tuple[Client, ...]:
    """Bursts of all clients scaled alike, so that together they are as dispersed as all requests.

    Clients that were busy at different times vary less together than independent ones would.
    """
    windows_s = [window_s for window_s in FANO_WINDOWS_S if 10.0 * clock_s <= window_s < trace.span_s / 10.0]
    together = fit_arrivals(trace.arrived_at_s, trace.span_s, clock_s)
    rate_per_s = together.mean_rate_per_s()
    ratio = []
    for window_s in windows_s:
        alone = sum(
            client.share * (client.arrivals.scaled(rate_per_s * client.share).fano(window_s) - 1.0)
            for client in clients
            if isinstance(client.arrivals, BurstArrivals)
        )
        if alone > 0.0:
            ratio.append(max(together.fano(window_s) - 1.0, 0.0) / alone)
    factor = float(np.sqrt(np.mean(ratio))) if ratio else 1.0
    scaled = []
    for client in clients:
        own = client.arrivals
        if isinstance(own, BurstArrivals):
            own = replace(own, cv=tuple(max(cv * factor, 1e-3) for cv in own.cv))
        scaled.append(replace(client, arrivals=own))
    return tuple(scaled)


def _with_sessions(trace: Trace, sizes: Sizes, clock_s: float, prompt: LengthMixture, output: LengthMixture) -> Model:
    links = link_calls(trace)
    assert links is not None
    components = max(sizes.prompt_components, sizes.output_components)
    roots_s = trace.arrived_at_s[links.parent < 0]
    prefixes = None
    if trace.prefix_hash is not None:
        prefixes = PrefixSpec(trace.prefix_block_tokens, links.common_tokens, (0,))
    if links.complete:
        starts = np.sort(roots_s)
        rate_per_s = (len(starts) - 1) / float(starts[-1] - starts[0])
        kinds = _kinds(trace, links, sizes.kinds, min(components, 5))
        return Model(GammaArrivals(rate_per_s, 0.05), prompt, output, (), kinds, prefixes, 0.0, True)
    session = fit_session(trace, links, components)
    calls = len(draw_sessions(session, np.random.default_rng(0), np.arange(_SESSION_SAMPLE)).root)
    settled_s = min(float(np.nanquantile(links.gap_s, 0.95)), trace.span_s / 2.0)  # chats under way look like new ones
    settled = roots_s[roots_s >= settled_s] - settled_s
    process = fit_arrivals(settled, trace.span_s - settled_s, clock_s)
    wanted = trace.n_requests / trace.span_s * _SESSION_SAMPLE / calls
    arrivals = process.scaled(wanted / process.mean_rate_per_s())
    warm_up_s = min(4.0 * float(np.nanquantile(links.gap_s, 0.99)), 20_000.0)
    return Model(arrivals, prompt, output, (), (session,), prefixes, warm_up_s)


def _kinds(trace: Trace, links: Links, number: int, components: int) -> tuple[SessionKind, ...]:
    """Kinds of whole sessions by their longest prompt, which tells the context window and how fast a session fills it.

    Growth, compaction and length of a session go together; kinds keep that, and each has a context limit of its own.
    """
    assert trace.session_index is not None
    session = trace.session_index
    total = int(session.max()) + 1
    longest = np.zeros(total)
    np.maximum.at(longest, session, trace.prompt_tokens)
    number = max(1, min(number, total // _FEWEST_SESSIONS))
    edges = np.quantile(longest, np.arange(1, number) / number)
    group = np.searchsorted(edges, longest, side="right")
    kinds = []
    for index in range(number):
        part = trace.pick(np.flatnonzero(group[session] == index))
        own = link_calls(part)
        if own is not None and (own.parent >= 0).any():
            kinds.append(replace(fit_session(part, own, components), share=float((group == index).mean())))
    return tuple(kinds)
