"""Hedging: a call without a first token is sent a second time, elsewhere, and the first token serves the customer.

A class may say `hedge_after_s`. Where a call of it has been under way for so long without a first token, and somebody
else may take it, the router decides once more about the request (the *hedge timer*). Legal are there: the candidate
that has it, which means *wait*, and every other replica or provider that may serve it. One that is chosen gets the
request too, and the two calls race. The first token of either decides: that call answers the request, the other is
cancelled at that instant (`envs.fleet.cancel`); of two at once the first call stays. A call that ends without a token
leaves the other one alone, as if nothing had been sent twice; users leave both at once. What a call that does not
answer has cost is posted when it ends: a provider's prompt in full, an engine's energy as far as it ran, tokens that
were streamed.

A request has two rows of `requests`: row i, and row i + n of an episode of n requests, of which `HEDGE.row` has the
call in charge; `loads` speaks of that call, `HEDGE.second*` of the other one. A cancelled call that waits in an
engine's line stays there until the scheduler reaches it, and keeps its row meanwhile: there is no further hedge of the
request before that.

While calls race the fleet runs no further at a time than to the next instant at which one of them can get its first
token. Timers are due in order of sending within a class. A world without hedging, where `hedges` has no columns, pays a
few comparisons per decision.

Shapes: N worlds, M requests, K classes.
"""

# ruff: noqa: ANN001, ANN201, ANN202 (Numba infers the types of kernels)
from __future__ import annotations

import math

import numpy as np

from envs.economics import ledger as books
from envs.fleet import engine, scaling
from envs.fleet.cancel import cancel
from envs.fleet.provider import provider_available
from envs.fleet.state import IN_FLIGHT
from envs.kernels import kernel
from marginroute import view as v

HEDGE = np.dtype(
    [
        ("row", "i4"),  # of `requests`: the call in charge
        ("second", "i4"),  # candidate of the other call, until that has ended; -1: there is none
        ("second_cached", "i4"),  # tokens of the prompt, expected to be cached there
        ("second_times", "f8"),  # factor on its price
        ("state", "i4"),
        ("due_s", "f8"),
        ("before", "i4"),  # in the line of timers of its class, or among the races
        ("after", "i4"),
    ]
)
"""The two calls of a request, `(N, M)`; no columns without hedging."""

TIMER = np.dtype([("after_s", "f8"), ("head", "i4"), ("tail", "i4")])
"""The line of timers of a class, `(N, K)`, in order of time; `after_s` is inf where it does not hedge."""

NOWHERE, TIMED, RACING = range(3)  # HEDGE.state


@kernel
def row_of(follow, w, i):
    """Row of `requests` that has the call in charge of request `i`."""
    return int(follow.hedges[w, i].row) if follow.hedges.shape[1] > 0 else i


@kernel
def _other_row(desk, hedge, i):
    return i + desk.n_requests if hedge.row == i else i


@kernel
def begun(request, now_s):
    """Whether a call has its first token by now."""
    return request.first_token_at_s <= now_s  # not while that is nan


@kernel
def set_timer(follow, loads, w, i, now_s):
    """Request `i` is sent now; its class may want to know when it has waited for too long."""
    k = loads[w, i].class_index
    timer = follow.timers[w, k]
    if math.isinf(timer.after_s):
        return
    hedge = follow.hedges[w, i]
    hedge.due_s, hedge.state = now_s + timer.after_s, TIMED
    hedge.before, hedge.after = timer.tail, -1
    if timer.tail >= 0:
        follow.hedges[w, timer.tail].after = i
    else:
        timer.head = i
    timer.tail = i


@kernel
def _leave_line(follow, w, hedge):
    """Takes a request out of the line that it is in, of timers or of races; the line's ends are the caller's."""
    hedge.state = NOWHERE
    if hedge.before >= 0:
        follow.hedges[w, hedge.before].after = hedge.after
    if hedge.after >= 0:
        follow.hedges[w, hedge.after].before = hedge.before


@kernel
def drop_timer(follow, loads, w, i):
    """Takes request `i` out of the line of timers."""
    hedge, timer = follow.hedges[w, i], follow.timers[w, loads[w, i].class_index]
    _leave_line(follow, w, hedge)
    if hedge.before < 0:
        timer.head = hedge.after
    if hedge.after < 0:
        timer.tail = hedge.before


@kernel
def due_s(follow, requests, desk, loads, w):
    """When the next timer is due, those aside whose call has begun to answer; inf: there is none."""
    soonest_s = math.inf
    for k in range(follow.timers.shape[1]):
        timer = follow.timers[w, k]
        while timer.head >= 0 and begun(requests[w, follow.hedges[w, timer.head].row], desk.now_s):
            drop_timer(follow, loads, w, timer.head)
        if timer.head >= 0:
            soonest_s = min(soonest_s, follow.hedges[w, timer.head].due_s)
    return soonest_s


@kernel
def _somebody_else(terms, replicas, providers, desk, load, w):
    """Whether another replica or provider than the one that has the request may take it now."""
    allowed, n_replicas = terms.allowed[load.class_index], replicas.shape[1]
    for r in range(n_replicas):
        if r != load.answered_by and allowed[r] and scaling.takes_requests(replicas[w, r]):
            return True
    for p in range(providers.shape[1]):
        c = n_replicas + p
        if c != load.answered_by and allowed[c] and provider_available(providers, w, p, desk.now_s, load.prompt_tokens):
            return True
    return False


@kernel
def pop_due(terms, replicas, providers, requests, desk, loads, follow, w):
    """A request whose timer is due and that can be hedged, or -1; takes its timer, and those that come to nothing."""
    for k in range(follow.timers.shape[1]):
        timer = follow.timers[w, k]
        while timer.head >= 0 and follow.hedges[w, timer.head].due_s <= desk.now_s:
            i = int(timer.head)
            drop_timer(follow, loads, w, i)
            hedge = follow.hedges[w, i]
            call = requests[w, hedge.row]
            waits = call.status == IN_FLIGHT and not begun(call, desk.now_s) and hedge.second < 0
            if waits and _somebody_else(terms, replicas, providers, desk, loads[w, i], w):
                return i
    return -1


@kernel
def take_row(requests, desk, loads, follow, w, i, c, cached_tokens, price_times):
    """Request `i` will be sent to candidate `c`, too; returns the row of `requests` for it."""
    hedge = follow.hedges[w, i]
    j = _other_row(desk, hedge, i)
    engine.reset_request(requests, w, j)
    requests[w, j].patience_until_s = requests[w, hedge.row].patience_until_s
    requests[w, j].expected_cached_tokens = cached_tokens
    hedge.second, hedge.second_cached, hedge.second_times = c, cached_tokens, price_times
    hedge.state, hedge.before, hedge.after = RACING, -1, desk.race_head
    if desk.race_head >= 0:
        follow.hedges[w, desk.race_head].before = i
    desk.race_head = i
    return j


@kernel
def end_race(desk, follow, w, i):
    """The calls of request `i` race no more."""
    hedge = follow.hedges[w, i]
    _leave_line(follow, w, hedge)
    if hedge.before < 0:
        desk.race_head = hedge.after


@kernel
def change_over(desk, loads, follow, w, i):
    """The second call of request `i` is in charge from now on."""
    load, hedge = loads[w, i], follow.hedges[w, i]
    hedge.row = _other_row(desk, hedge, i)
    c, cached_tokens, times = load.answered_by, load.cached_tokens, load.price_times
    load.answered_by, load.cached_tokens, load.price_times = hedge.second, hedge.second_cached, hedge.second_times
    hedge.second, hedge.second_cached, hedge.second_times = c, cached_tokens, times
    if load.session >= 0:
        follow.tasks[w, load.session].station = load.answered_by


@kernel
def _may_begin_s(replicas, call, w, now_s):
    """Until when a call certainly has no first token and no end."""
    if call.status != IN_FLIGHT:
        return math.inf
    if call.replica < 0:
        return call.completed_at_s if math.isnan(call.first_token_at_s) else call.first_token_at_s
    wake_s = replicas[w, call.replica].wake_s
    return wake_s if wake_s > now_s else np.nextafter(now_s, math.inf)  # its next iteration is put together after now


@kernel
def safe_until_s(replicas, requests, desk, follow, w, now_s):
    """How far the fleet may run: no race is decided earlier. inf: there is none."""
    safe_s = math.inf
    i = int(desk.race_head)
    while i >= 0:
        hedge = follow.hedges[w, i]
        safe_s = min(safe_s, _may_begin_s(replicas, requests[w, hedge.row], w, now_s))
        safe_s = min(safe_s, _may_begin_s(replicas, requests[w, _other_row(desk, hedge, i)], w, now_s))
        i = int(hedge.after)
    return safe_s


@kernel
def decide_races(
    pools, tables, worlds, replicas, slots, providers, requests, desk, loads, follow, counts, w, now_s
):  # fmt: skip
    """Whoever has a first token by now answers; the other call is cancelled."""
    i = int(desk.race_head)
    while i >= 0:
        hedge = follow.hedges[w, i]
        following = int(hedge.after)
        other = _other_row(desk, hedge, i)
        first, second = requests[w, hedge.row], requests[w, other]
        if begun(first, now_s) or begun(second, now_s):
            end_race(desk, follow, w, i)
            if begun(second, now_s) and not first.first_token_at_s <= second.first_token_at_s:
                other = int(hedge.row)
                change_over(desk, loads, follow, w, i)
                counts[w, books.HEDGES_WON, loads[w, i].class_index] += 1
            cancel(pools, tables, worlds, replicas, slots, providers, requests, w, other, now_s)
        i = following


@kernel
def show(requests, desk, loads, follow, signals, legal, w, cache):
    """Writes into the View who has the current request, and what may be done; `cache` is the first of the others."""
    i = desk.current
    c = loads[w, i].answered_by
    signals[v.UNDER_WAY_S, w, c] = desk.now_s - requests[w, follow.hedges[w, i].row].dispatched_at_s
    signals[v.TRIED, w, c] = 1.0
    desk.tried, desk.shown_at = 1, c
    legal[w, c] = True
    for other in range(cache, legal.shape[1]):
        legal[w, other] = False


@kernel
def show_nothing(desk, signals, w):
    """Takes what `show` has written beside `tried` out of the View again."""
    if desk.shown_at >= 0:
        signals[v.UNDER_WAY_S, w, desk.shown_at] = 0.0
        desk.shown_at = -1


@kernel
def end_episode(requests, desk, follow, w):
    """At the end: row i says what became of request `i`, whichever call answered it."""
    for i in range(desk.n_requests):
        if follow.hedges[w, i].row != i:
            mine, call = requests[w, i], requests[w, follow.hedges[w, i].row]
            mine.status, mine.replica, mine.restarts = call.status, call.replica, call.restarts
            mine.computed, mine.cached_tokens = call.computed, call.cached_tokens
            mine.dispatched_at_s, mine.first_token_at_s = call.dispatched_at_s, call.first_token_at_s
            mine.completed_at_s, mine.patience_until_s = call.completed_at_s, call.patience_until_s
            follow.hedges[w, i].row = i
