"""Third-party providers: a call ends at ttft + tpot (output - 1) after it was sent; token buckets limit the rates.

The buckets are those of `marginroute.rate_limits`. Both levels are known to a gateway: it keeps the same, and providers
tell them with every response.

In an outage (`down`) a call ends with an error after `error_after_s`, without tokens and without a bill; calls that
were sent before go on. A degradation (`slowdown`) multiplies TTFT and TPOT of the calls sent while it lasts.

The calls of a world wait in one heap, ordered by the time they end; its p-th entry is `requests[w, p].call_heap`.
"""

# ruff: noqa: ANN001, ANN201, ANN202, D417 (Numba infers the types of kernels)
from __future__ import annotations

import math

from envs.fleet.queues import finish
from envs.fleet.state import ABANDONED, COMPLETED, FAILED, IN_FLIGHT, LOST
from envs.kernels import kernel
from marginroute import contracts, rate_limits

refilled = kernel(contracts.refilled, inline="always")
has_room = kernel(rate_limits.has_room, inline="always")
share_spent = kernel(rate_limits.share_spent, inline="always")


@kernel
def requests_left(provider, now_s):
    """Requests that the rate limit allows at once."""
    return refilled(provider.bucket, provider.bucket_size, provider.requests_per_s, now_s - provider.bucket_at_s)


@kernel
def _tokens_left(provider, now_s):
    """Tokens that the rate limit allows at once."""
    elapsed_s = now_s - provider.token_bucket_at_s
    return refilled(provider.token_bucket, provider.token_bucket_size, provider.tokens_per_s, elapsed_s)


@kernel
def provider_available(providers, w, v, now_s, prompt_tokens=1):
    """Whether a call to provider v is legal now, as far as its rate limits go."""
    provider = providers[w, v]
    requests, tokens = requests_left(provider, now_s), _tokens_left(provider, now_s)
    return has_room(requests, tokens, prompt_tokens, provider.token_bucket_size)


@kernel
def limit_spent(providers, w, v, now_s):
    """Share of the rate limits of provider v that is spent."""
    provider = providers[w, v]
    requests, tokens = requests_left(provider, now_s), _tokens_left(provider, now_s)
    return share_spent(requests, provider.bucket_size, tokens, provider.token_bucket_size)


@kernel
def _take_tokens(provider, tokens, now_s):
    if not math.isinf(provider.tokens_per_s):
        provider.token_bucket = _tokens_left(provider, now_s) - tokens
        provider.token_bucket_at_s = now_s


@kernel
def _ends_s(requests, w, p):
    return requests[w, requests[w, p].call_heap].completed_at_s


@kernel
def _push_call(world, requests, w, i):
    p = world.provider_calls
    world.provider_calls += 1
    end_s = requests[w, i].completed_at_s
    while p > 0:
        parent = (p - 1) >> 1
        if _ends_s(requests, w, parent) <= end_s:
            break
        requests[w, p].call_heap = requests[w, parent].call_heap
        p = parent
    requests[w, p].call_heap = i
    world.next_call_s = _ends_s(requests, w, 0)


@kernel
def _pop_call(world, requests, w):
    first = int(requests[w, 0].call_heap)
    world.provider_calls -= 1
    size = world.provider_calls
    i = int(requests[w, size].call_heap)
    end_s = requests[w, i].completed_at_s
    p = 0
    while True:
        child = 2 * p + 1
        if child >= size:
            break
        if child + 1 < size and _ends_s(requests, w, child + 1) < _ends_s(requests, w, child):
            child += 1
        if _ends_s(requests, w, child) >= end_s:
            break
        requests[w, p].call_heap = requests[w, child].call_heap
        p = child
    requests[w, p].call_heap = i
    world.next_call_s = _ends_s(requests, w, 0) if size > 0 else math.inf
    return first


@kernel
def submit_provider(pools, tables, worlds, replicas, slots, providers, requests, w, v, i, now_s, ttft_s, tpot_s):
    """Sends request i to provider v now.

    Without room in the rate limits the call fails at once. A user leaves when patience ends before the first token.
    In an outage the call is LOST, now or after `error_after_s`.

    Args:
        pools, tables, worlds, replicas, slots, providers, requests: `Fleet.arrays`.
        w: World.
        v: Provider.
        i: Request, whose inputs are filled in.
        now_s: Time; the world must have been advanced to it.
        ttft_s: Time to the first token of this call.
        tpot_s: Time per further token.
    """
    world, provider, request = worlds[w], providers[w, v], requests[w, i]
    world.submitted += 1
    request.replica = -1 - v
    request.dispatched_at_s = now_s
    room = provider_available(providers, w, v, now_s, request.prompt_tokens)
    provider.bucket = requests_left(provider, now_s)
    provider.bucket_at_s = now_s
    if not room:
        finish(world, requests, w, i, FAILED, now_s)
        return
    provider.bucket -= 1.0
    provider.calls += 1
    if provider.down == 1 and provider.error_after_s == 0.0:
        finish(world, requests, w, i, LOST, now_s)
        return
    provider.in_flight += 1
    request.status = IN_FLIGHT
    ttft_s *= provider.slowdown
    if provider.down == 1 and now_s + provider.error_after_s < request.patience_until_s:
        request.completed_at_s = now_s + provider.error_after_s
        world.doomed_calls += 1
    elif provider.down == 1 or now_s + ttft_s > request.patience_until_s:
        request.completed_at_s = max(request.patience_until_s, now_s)
    else:
        request.first_token_at_s = now_s + ttft_s
        request.completed_at_s = now_s + ttft_s + tpot_s * provider.slowdown * (request.output_tokens - 1)
    if provider.down == 0:
        _take_tokens(provider, request.prompt_tokens, now_s)
    _push_call(world, requests, w, i)


@kernel
def end_provider_calls(world, providers, requests, w, until_s):
    """Ends the provider calls of a world up to `until_s`."""
    while world.provider_calls > 0 and world.next_call_s <= until_s:
        i = _pop_call(world, requests, w)
        request = requests[w, i]
        provider = providers[w, -1 - request.replica]
        provider.in_flight -= 1
        status = ABANDONED
        if not math.isnan(request.first_token_at_s):
            status = COMPLETED
            _take_tokens(provider, request.output_tokens, request.completed_at_s)
        elif request.completed_at_s < request.patience_until_s:
            status = LOST
            world.doomed_calls -= 1
        finish(world, requests, w, i, status, request.completed_at_s)


@kernel
def cancel_call(world, providers, requests, w, i, now_s):
    """Ends a call that nobody waits for any more as ABANDONED; what it has used of the rate limits stays used."""
    request = requests[w, i]
    provider = providers[w, -1 - request.replica]
    if math.isnan(request.first_token_at_s) and request.completed_at_s < request.patience_until_s:
        world.doomed_calls -= 1
    p = 0
    while requests[w, p].call_heap != i:
        p += 1
    while p > 0:
        parent = (p - 1) >> 1
        requests[w, p].call_heap = requests[w, parent].call_heap
        p = parent
    requests[w, 0].call_heap = i
    _pop_call(world, requests, w)
    provider.in_flight -= 1
    if request.first_token_at_s <= now_s:
        _take_tokens(provider, 1, now_s)
    else:
        request.first_token_at_s = math.nan
    finish(world, requests, w, i, ABANDONED, now_s)
