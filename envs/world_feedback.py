"""What a gateway hears about its answers: some are judged good or bad, a while after they were given.

A thumb, a regeneration, a failed validation or a claimed refund reaches the gateway for a share of the answers
(`workload.feedback`). What it makes of them is one running mean per tier and task of

    good - P(good) that the policy expected,

over about the last `latency.RECENT_JUDGED` of them, and how many, n, those are. The View's `surprise` is the sum of
good answers beyond expectation over the root of n, which chance alone moves equally far whatever n, and `confidence` is
n / (n + `latency.HALF_CONFIDENT`); once for the request's task and once over all tasks. A model that has become worse,
or a kind of work that it does not do, shows there after a while, whatever was promised. The means stand behind those of
output tokens: `lengths` (N, K + T, J), a row per class, then one per tier.
"""

# ruff: noqa: ANN001, ANN201 (Numba infers the types of kernels)
from __future__ import annotations

from envs.economics.formulas import running_mean
from envs.kernels import kernel
from marginroute import latency, quality
from marginroute import view as v

told = kernel(latency.told, inline="always")
expected_good = kernel(quality.expected_good, inline="always")


@kernel
def answered(config, desks, loads, w, i, tier, good, now_s):
    """An answer whose user will judge it was completed; it joins the queue of judgements, which goes by time."""
    desk, load = desks[w], loads[w, i]
    load.judged_at_s, load.judged_tier, load.judged_good = now_s + config[0].feedback_delay_s, tier, good
    before = desk.judged_tail  # of a few replicas that ended answers since the last decision, in no order
    while before >= 0 and loads[w, before].judged_at_s > load.judged_at_s:
        before = loads[w, before].last_judged
    after = loads[w, before].next_judged if before >= 0 else desk.judged_head
    load.last_judged, load.next_judged = before, after
    if before >= 0:
        loads[w, before].next_judged = i
    else:
        desk.judged_head = i
    if after >= 0:
        loads[w, after].last_judged = i
    else:
        desk.judged_tail = i


@kernel
def hear(desks, loads, prior, lengths, n_classes, w):
    """Learns from every judgement that has come in by now."""
    desk = desks[w]
    while desk.judged_head >= 0 and loads[w, desk.judged_head].judged_at_s <= desk.now_s:
        i = desk.judged_head
        load = loads[w, i]
        desk.judged_head = load.next_judged
        if desk.judged_head < 0:
            desk.judged_tail = -1
        else:
            loads[w, desk.judged_head].last_judged = -1
        mean = lengths[load.gateway, n_classes + load.judged_tier, load.task_index]
        p_good = prior[w, i, load.judged_tier]
        expected = expected_good(p_good, mean.intercept, mean.slope, mean.length, load.prompt_tokens)
        surprise = load.judged_good - expected
        mean.value, mean.weight = running_mean(mean.value, mean.weight, surprise, latency.RECENT_JUDGED)


@kernel
def show(config, tiers, lengths, signals, n_classes, w, load):
    """Writes what judged answers tell of every candidate's model into the View."""
    for c in range(config[0].n_replicas + config[0].n_providers):
        if c > 0 and tiers[c] == tiers[c - 1]:
            for row in range(v.SURPRISE, v.TIER_CONFIDENCE + 1):
                signals[row, w, c] = signals[row, w, c - 1]
            continue
        mean, total, judged = lengths[load.gateway, n_classes + tiers[c], load.task_index], 0.0, 0.0
        for j in range(lengths.shape[2]):
            other = lengths[load.gateway, n_classes + tiers[c], j]
            total += other.value * other.weight
            judged += other.weight
        signals[v.SURPRISE, w, c], signals[v.CONFIDENCE, w, c] = told(mean.value * mean.weight, mean.weight)
        signals[v.TIER_SURPRISE, w, c], signals[v.TIER_CONFIDENCE, w, c] = told(total, judged)
