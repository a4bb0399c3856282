"""Several gateway instances in front of one fleet: each knows what it has done itself, and what engines tell everybody.

A request arrives at one of G instances and stays there (retries, held work). What an instance measures and remembers is
its own: counters of what it has in flight, recent latencies and errors, mean output lengths, judged answers, arrival
rate, which prompt blocks and which session it sent where. Scraped metrics, health checks, what providers say of their
rate limits, customers' accounts, SLO windows, the response cache and the line of held requests are common to all.

Memory of world w at instance g is row g N + w of `own`, `lengths` and the prefix index (`loads.gateway`), so that with
one instance it is row w. With more, its counters are the sums over the calls that it has in flight, which each row of
`own` lists by their row of `requests`, and what others have there by `latency.beyond`: at each scrape an instance takes
what the engine says beyond its own for theirs, until the next one. Arrival rate, number of decisions and prompt tokens
that it sends for prefill stand in three more rows of `lengths`.

Shapes: N worlds, G instances, M requests, S replicas and providers.
"""

# ruff: noqa: ANN001, ANN201 (Numba infers the types of kernels)
from __future__ import annotations

import math
from typing import Any

import numpy as np

from envs.economics.formulas import running_mean
from envs.kernels import kernel
from envs.workload.requests import Workload
from marginroute import latency
from marginroute import view as v

# Rows of `lengths`: (mean tokens, requests); (mean gap, arrivals); (last arrival in seconds, decisions)
PREFILL, RATE, CLOCK = -3, -2, -1
ROWS = 3

beyond = kernel(latency.beyond, inline="always")


def instance_of(workload: Workload, gateways: int, spread: str) -> Any:
    """(M,) which instance each request arrives at: by a hash of the request, or of its session.

    Args:
        workload: of the episode; its arrival times are the hash's salt.
        gateways: G.
        spread: `request` or `session`; requests without a session are spread one by one.
    """
    number = np.arange(workload.n_requests, dtype=np.uint64)
    if spread == "session":
        number = np.where(workload.session_index >= 0, workload.session_index + workload.n_requests, number)
    salt = np.bitwise_xor.reduce(np.ascontiguousarray(workload.arrived_at_s, dtype=np.float64).view(np.uint64))
    # SplitMix64 (Steele, Lea and Flood 2014)
    x = number.astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15) + salt
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return ((x ^ (x >> np.uint64(31))) % np.uint64(gateways)).astype(np.int64)


@kernel
def sent(own, loads, w, i, c):
    """Request `i` leaves its instance for replica or provider `c`."""
    load = loads[w, i]
    mine = own[load.gateway, c]
    load.last_sent, load.next_sent = -1, mine.sent_head
    if mine.sent_head >= 0:
        loads[w, mine.sent_head].last_sent = i
    mine.sent_head = i


@kernel
def ended(own, loads, w, i, c):
    """Request `i` has left replica or provider `c`, answered or not."""
    load = loads[w, i]
    if load.last_sent >= 0:
        loads[w, load.last_sent].next_sent = load.next_sent
    else:
        own[load.gateway, c].sent_head = load.next_sent
    if load.next_sent >= 0:
        loads[w, load.next_sent].last_sent = load.last_sent


@kernel
def note_prefill(lengths, load, cached_tokens):
    """A request leaves for a replica that has `cached_tokens` of it, as far as is known."""
    mean, tokens = lengths[load.gateway, PREFILL, 0], load.prompt_tokens - cached_tokens
    mean.value, mean.weight = running_mean(mean.value, mean.weight, tokens, latency.RECENT_LENGTHS)


@kernel
def note_arrival(lengths, gateway, now_s):
    """A request is there for the first time."""
    rate, clock = lengths[gateway, RATE, 0], lengths[gateway, CLOCK, 0]
    rate.value, _ = running_mean(rate.value, rate.weight, now_s - clock.value, latency.RECENT_ARRIVALS)
    rate.weight += 1.0
    clock.value = now_s


@kernel
def show_replica(replica, requests, loads, own, signals, w, g, c):
    """Writes what instance `g` has at replica `c`."""
    in_flight, held, pending, decoding, tokens = 0, 0, 0, 0, 0
    i = int(own[g, c].sent_head)
    while i >= 0:
        request = requests[w, i]
        in_flight += 1
        if math.isnan(request.first_token_at_s):
            pending += request.prompt_tokens - request.expected_cached_tokens
        else:
            decoding += 1
            joined = request.joined_at >= 0
            tokens += request.computed + replica.counter - request.joined_at + 1 if joined else request.target
        i = int(loads[w, i].next_sent)
    i = int(replica.hold_head)
    while i >= 0:
        held += 1 if loads[w, i].gateway == g else 0
        i = int(requests[w, i].next)
    signals[v.IN_FLIGHT, w, c] = in_flight
    signals[v.HELD, w, c] = held
    signals[v.PENDING_PREFILL_TOKENS, w, c] = pending
    signals[v.DECODING, w, c] = decoding
    signals[v.DECODING_TOKENS, w, c] = tokens


@kernel
def note_scrape(replica, requests, loads, own, signals, w, n_worlds, c):
    """A new page of the metrics of replica `c`: what is beyond an instance's own is others'."""
    kv_tokens = replica.scraped_kv_usage * signals[v.KV_CAPACITY_TOKENS, w, c]
    for g in range(w, own.shape[0], n_worlds):
        show_replica(replica, requests, loads, own, signals, w, g, c)
        mine = own[g, c]
        mine.others_waiting, mine.others_decoding, mine.others_tokens = beyond(
            replica.scraped_waiting,
            replica.scraped_running,
            kv_tokens,
            signals[v.IN_FLIGHT, w, c] - signals[v.HELD, w, c],
            signals[v.DECODING, w, c],
            signals[v.DECODING_TOKENS, w, c],
        )
        mine.scraped_at_s = replica.scraped_at_s


@kernel
def show(config, replicas, requests, desks, loads, own, lengths, signals, request_view, w):
    """Puts what the instance that decides knows in the place of everybody's counters."""
    g = int(loads[w, desks[w].current].gateway)
    for c in range(config[0].n_replicas):
        mine = own[g, c]
        if replicas[w, c].scraped_at_s > mine.scraped_at_s:
            note_scrape(replicas[w, c], requests, loads, own, signals, w, desks.shape[0], c)
        show_replica(replicas[w, c], requests, loads, own, signals, w, g, c)
        signals[v.IN_FLIGHT, w, c] += mine.others_waiting + mine.others_decoding
        signals[v.PENDING_PREFILL_TOKENS, w, c] += mine.others_waiting * lengths[g, PREFILL, 0].value
        signals[v.DECODING, w, c] += mine.others_decoding
        signals[v.DECODING_TOKENS, w, c] += mine.others_tokens
    for c in range(config[0].n_replicas, config[0].n_replicas + config[0].n_providers):
        in_flight = 0
        i = int(own[g, c].sent_head)
        while i >= 0:
            in_flight += 1
            i = int(loads[w, i].next_sent)
        signals[v.IN_FLIGHT, w, c] = in_flight
    request_view[v.ARRIVAL_RATE_PER_S, w] = 1.0 / max(lengths[g, RATE, 0].value, 1e-6)
    request_view[v.SEQUENCE, w] = lengths[g, CLOCK, 0].weight
    lengths[g, CLOCK, 0].weight += 1.0
