"""What a gateway can estimate: TTFT, TPOT and work of a request, from visible state and profile coefficients.

An engine iteration with `b` decoding sequences that attend `kv` tokens takes about

    decode_s = base_s + decode_seq_s * b + kv_token_s * kv

and `prefill_token_s` more per prompt token mixed in. With a budget of B tokens per iteration, the prompt tokens ahead
of and in a new request need max(1, pending / (B - b)) iterations. If no sequence slot (or KV room) is free, the
request first waits until enough others have finished. Prompt tokens that the candidate is expected to have cached need
no prefill, but take their room in the KV cache like any others. The simulated gateway and the real one call these
functions.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from marginroute import view as v
from marginroute.view import Array, View

RECENT_ANSWERS = 10.0  # answers that the moving means of latency look back (LiteLLM's latency strategy keeps ten)
RECENT_LENGTHS = 200.0  # answers of a class and task that the mean output length looks back
RECENT_ARRIVALS = 50.0  # gaps between arrivals that the arrival rate looks back
RECENT_JUDGED = 40.0  # judged answers of a model and task that surprise looks back
HALF_CONFIDENT = 10.0  # judged answers at which confidence is a half
RECENT_CALLS = 5.0  # calls that the share of errors looks back
ERROR_HALF_LIFE_S = 10.0  # an error that nothing followed counts half after this; LiteLLM cools down for 5 s
_ZERO, _HALF, _ONE = np.array(0.0), np.array(0.5), np.array(1.0)  # see `View.asked`
PRIOR_LENGTHS = 20.0  # answers that the operator's own mean output length counts for at the start


def running_mean(mean: float, weight: float, value: float, horizon: float) -> tuple[float, float]:
    """One step of a mean over about the last `horizon` values; returns the new (mean, weight)."""
    weight = min(weight + 1.0, horizon)
    return mean + (value - mean) / weight, weight


def told(beyond_expected: Any, judged: Any) -> tuple[Any, Any]:
    """The View's `surprise` and `confidence`: of so many judged answers, so many more were good than expected."""
    return beyond_expected / np.sqrt(np.maximum(judged, 1.0)), judged / (judged + HALF_CONFIDENT)


def beyond(
    waiting: float, running: float, kv_tokens: float, at_engine: float, decoding: float, decoding_tokens: float
) -> tuple[float, float, float]:
    """What an engine has on its hands that this gateway did not send: other instances' requests, or other traffic.

    Args:
        waiting: requests that wait there, by the engine's metrics page.
        running: requests that run there, by the same.
        kv_tokens: in use in its KV cache, by the same.
        at_engine: requests that this gateway has there at that moment.
        decoding: of those, with a first token.
        decoding_tokens: prompt and streamed tokens of the latter.

    Returns:
        Requests before their first token, requests that decode, and prompt and streamed tokens of the latter.
    """
    total = max(waiting + running - at_engine, 0.0)
    streams = min(max(running - decoding, 0.0), total)
    return total - streams, streams, max(kv_tokens - decoding_tokens, 0.0) if streams > 0.0 else 0.0


def recent_errors(share: Any, age_s: Any) -> Any:
    """Share of recent calls that failed, `age_s` after the last one: it fades, so that a candidate is tried again."""
    return share * 0.5 ** (age_s / ERROR_HALF_LIFE_S)


def estimate(view: View) -> tuple[Array, Array]:
    """Seconds of TTFT and TPOT, and work in seconds, that each candidate would need for the request.

    Work is the engine time that the request takes from others: its prefill, and its share of every decode iteration
    with the iteration's fixed part spread over a full batch. At a provider it is the time in which the rate limits
    regain what the request takes of them, of calls and of tokens.

    Returns:
        latency_s: (2, ..., C), TTFT and TPOT; work_s: (..., C).
    """
    s = view.signals
    prompt_tokens, output_tokens = view.asked(v.PROMPT_TOKENS), view.asked(v.EXPECTED_OUTPUT_TOKENS)
    prefill_tokens = prompt_tokens - s[v.CACHED_TOKENS]
    slots = np.minimum(s[v.SLOTS], s[v.IN_FLIGHT_CAP])
    batch = np.minimum(s[v.DECODING] + _ONE, slots)
    kv_tokens = s[v.DECODING_TOKENS] + prompt_tokens
    latency_s = np.empty((2, *slots.shape))
    decode_s = np.add(s[v.BASE_S] + s[v.DECODE_SEQ_S] * batch, s[v.KV_TOKEN_S] * kv_tokens, out=latency_s[1])
    pending_tokens = s[v.PENDING_PREFILL_TOKENS] + prefill_tokens
    iterations = np.maximum(pending_tokens / np.maximum(s[v.TOKEN_BUDGET] - batch, _ONE), _ONE) + _HALF
    crowded_out = (kv_tokens + pending_tokens - s[v.KV_CAPACITY_TOKENS]) / (prompt_tokens + output_tokens)
    ahead = np.maximum(np.maximum(s[v.IN_FLIGHT] + _ONE - slots, crowded_out), _ZERO)
    wait_s = ahead * output_tokens * decode_s / slots
    np.add(iterations * decode_s, pending_tokens * s[v.PREFILL_TOKEN_S] + wait_s, out=latency_s[0])
    latency_s += s[v.FIXED_TTFT_S : v.FIXED_TPOT_S + 1]
    attended_tokens = np.asarray(prompt_tokens + 0.5 * output_tokens)
    per_output_token_s = s[v.DECODE_SEQ_S] + s[v.KV_TOKEN_S] * attended_tokens + s[v.BASE_S] / s[v.SLOTS]
    work_s = prefill_tokens * s[v.PREFILL_TOKEN_S] + output_tokens * per_output_token_s
    return latency_s, work_s + s[v.LIMIT_CALL_S] + (prompt_tokens + output_tokens) * s[v.LIMIT_TOKEN_S]
