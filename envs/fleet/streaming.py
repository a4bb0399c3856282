"""What a user has seen so far of answers that are still being written.

A request that decodes has `computed` + (counter - joined_at) tokens in the KV cache and one more that is not there yet,
so prompt_tokens + streamed = computed + (counter - joined_at) + 1. Waiting after a preemption it has streamed
target - prompt_tokens. Every token appears at the end of an iteration.
"""

# ruff: noqa: ANN001, ANN201, ANN202 (Numba infers the types of kernels)
from __future__ import annotations

import math

from envs.fleet.speculation import elapsed_s
from envs.fleet.state import COMPLETED, IN_FLIGHT
from envs.kernels import kernel


@kernel
def _of_provider(request, now_s):
    """Tokens come evenly between the first and the last."""
    first_s, gaps = request.first_token_at_s, request.output_tokens - 1
    if math.isnan(first_s) or now_s < first_s:
        return 0, math.nan
    tpot_s = (request.completed_at_s - first_s) / gaps if gaps > 0 else 0.0
    further = min(int((now_s - first_s) / tpot_s), gaps) if tpot_s > 0.0 else gaps
    return 1 + further, first_s + further * tpot_s


@kernel
def streamed(worlds, replicas, requests, w, rows, tokens, token_at_s):
    """Tokens that the requests in `rows` have streamed by now, and when the last of them came.

    Args:
        worlds: (N,) `Fleet.worlds`.
        replicas: (N, R) `Fleet.replicas`.
        requests: (N, M) `Fleet.requests`.
        w: World, advanced to now.
        rows: (n,) submitted requests.
        tokens: (n,) filled in.
        token_at_s: (n,) filled in; nan without a token, and where no token is new since a preemption.
    """
    for k in range(rows.shape[0]):
        request = requests[w, rows[k]]
        tokens[k], token_at_s[k] = 0, math.nan
        if request.status == COMPLETED:
            tokens[k], token_at_s[k] = request.output_tokens, request.completed_at_s
        elif request.status == IN_FLIGHT and request.replica < 0:
            tokens[k], token_at_s[k] = _of_provider(request, worlds[w].clock_s)
        elif request.status == IN_FLIGHT and not math.isnan(request.first_token_at_s):
            rep = replicas[w, request.replica]
            if request.joined_at >= 0:
                tokens[k] = request.computed + rep.counter - request.joined_at + 1 - request.prompt_tokens
                token_at_s[k] = rep.segment_start_s + elapsed_s(True, rep, rep.done)
            else:
                tokens[k] = request.target - request.prompt_tokens


@kernel
def next_change_s(worlds, replicas, requests, w, rows, tokens):
    """When the next iteration ends, or the next token of a provider's answer comes; inf if nothing is under way.

    Args:
        worlds: (N,) `Fleet.worlds`.
        replicas: (N, R) `Fleet.replicas`.
        requests: (N, M) `Fleet.requests`.
        w: World.
        rows: (n,) submitted requests.
        tokens: (n,) what `streamed` said of them.
    """
    due_s = worlds[w].next_call_s
    for r in range(replicas.shape[1]):
        due_s = min(due_s, replicas[w, r].iteration_end_s)
    for k in range(rows.shape[0]):
        request = requests[w, rows[k]]
        if request.status == IN_FLIGHT and request.replica < 0 and not math.isnan(request.first_token_at_s):
            gaps = request.output_tokens - 1
            tpot_s = (request.completed_at_s - request.first_token_at_s) / gaps if gaps > 0 else 0.0
            due_s = min(due_s, request.first_token_at_s + tokens[k] * tpot_s)
    return due_s
