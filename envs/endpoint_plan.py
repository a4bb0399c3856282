"""Which iterations of an endpoint are measured, and how long that takes."""

from __future__ import annotations

import dataclasses

from envs.endpoint_measure import WINDOW, Bench

SHORTEST_CONTEXT = 64
CHUNKS = (16, 32, 64, 96, 128, 192, 256, 320, 384, 512, 640, 768, 1024, 1280, 1536, 1792, 2048)
BEHIND = (1.125, 1.25, 1.5, 1.75, 1.95, 2.75, 3.75)  # prompts of several chunks, in budgets
BESIDE = (16, 64, 128, 512)  # chunks beside large batches, which tell token(T) from decode(n)
AT_ONCE = ((2, 0.4), (2, 0.65), (2, 0.9), (3, 0.6), (4, 0.9))  # prompts in one iteration, share of the budget
HELD_OUT = ((12, 700), (5, 300), (24, 200))  # (streams, prompt or context): measured, not fitted on


@dataclasses.dataclass(frozen=True)
class Step:
    """One experiment: `batch` decodes of a context of `tokens`, or a prompt of `tokens` beside `batch` streams."""

    kind: str  # decode, prefill
    batch: int
    tokens: int
    held_out: bool = False
    prefills: int = 1


def _ladder(low: int, high: int, factor: int) -> list[int]:
    """low, low * factor, ... and high."""
    return sorted({min(low * factor**k, high) for k in range(32)})


def plan(max_concurrency: int, max_context: int, budget_tokens: int) -> list[Step]:
    """The experiments, quick ones first."""
    room = budget_tokens - 1
    limit = max(max_context, 2 * budget_tokens)
    chunks = [c for c in CHUNKS if c < room - 8] + [room - 8]
    # no short rest behind a full chunk: it would be lost in the noise
    behind = [c for share in BEHIND if (c := int(budget_tokens * share)) <= limit]
    steps = [Step("prefill", 1, c) for c in [*chunks, *behind]]
    batches = sorted({max(max_concurrency // 8, 2), max(max_concurrency // 2, 2)})
    steps += [Step("prefill", n, c) for n in batches for c in BESIDE if c < room - n]
    steps += [Step("prefill", 1, int(room * share / k), prefills=k) for k, share in AT_ONCE]
    contexts = _ladder(SHORTEST_CONTEXT, max_context, 4)
    steps += [Step("decode", n, m) for m in contexts for n in _ladder(1, max_concurrency, 2)]
    for batch, tokens in HELD_OUT:
        if batch <= max_concurrency and tokens <= max_context:
            steps += [Step("decode", batch, tokens, True), Step("prefill", batch, tokens, True)]
    return steps


def expected_s(step: Step, bench: Bench, per_token_s: float, repeats: int) -> float:
    """The fleet's seconds that a step is expected to take."""
    if step.kind == "prefill":
        once_s = step.prefills * step.tokens * per_token_s + 6.0 * bench.base_s + 3.0 * bench.round_trip_s
        return (repeats + 1) * once_s
    ramp_s = step.batch * step.tokens * per_token_s
    return 1.2 * ramp_s + WINDOW * bench.base_s * (1.0 + step.batch / 128.0) + 2.0 * bench.round_trip_s
