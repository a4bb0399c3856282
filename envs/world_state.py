"""Record types of a world beside its fleet: requests with the gateway's bookkeeping, its desk, and what it has learned.

Scalar fields only, so that the kernels of `envs.world` compile once for every scenario. Shapes: N worlds, M requests,
R replicas, V providers, K classes, J tasks.
"""

from __future__ import annotations

import numpy as np

LOAD = np.dtype(
    [
        ("arrived_at_s", "f8"),
        ("deadline_s", "f8"),
        ("patience_s", "f8"),
        ("difficulty_signal", "f8"),
        ("ttft_noise", "f8"),
        ("tpot_noise", "f8"),
        ("think_s", "f8"),
        ("class_index", "i4"),
        ("task_index", "i4"),
        ("tenant_index", "i4"),
        ("prompt_tokens", "i4"),
        ("output_tokens", "i4"),
        ("prompt_key", "i4"),
        ("account", "i4"),  # of its customer, see world_accounts.py
        ("standing", "i4"),  # index into marginroute.contracts.STANDINGS
        ("outcome", "i4"),  # OPEN, MET, MISSED or UNSERVED
        # Gateway instances, see world_gateways.py
        ("gateway", "i4"),  # row of its instance in `own`, `lengths` and the prefix index; w, if there is one
        ("last_sent", "i4"),  # requests that its instance has in flight at the same place
        ("next_sent", "i4"),
        ("answered_by", "i4"),  # candidate that the request was last sent to
        ("cached_tokens", "i4"),  # of its prompt, expected there
        ("prefix_at", "i4"),  # where its block hashes begin
        ("prefix_count", "i4"),  # its full blocks that have one; 0: nobody looks
        ("price_times", "f8"),  # factor on the price of the provider that it was last sent to
        ("attempts", "i4"),  # that faults have ended
        # Feedback, see world_feedback.py
        ("judged", "i4"),  # 1: the gateway will hear whether the answer was good
        ("judged_tier", "i4"),
        ("judged_good", "i4"),
        ("next_judged", "i4"),
        ("last_judged", "i4"),
        ("judged_at_s", "f8"),
        ("next_held", "i4"),  # batch queue, or queue of retries
        ("offer_at_s", "f8"),
        # Verifiers and tasks, see world_tasks.py
        ("verified", "i4"),  # answers that it may be given; 0: nobody looks at them
        ("turned_down", "i4"),  # answers that were
        ("session", "i4"),  # -1: none
        ("workflow", "i4"),  # -1: not a call of a task that pays
        ("leads", "i4"),  # 1: its end may bring a decision
        ("tool_key", "i4"),  # result that is asked for before it, -1: none
        ("tool_usd", "f8"),
        # Sessions, see world_sessions.py
        ("follows", "i4"),  # 1: arrives after another request
        ("arrival", "i4"),
        ("first_child", "i4"),
        ("next_sibling", "i4"),
        ("ready_heap", "i4"),  # entry p of the world's heap of follow-ups on their way
    ]
)
"""The workload as records, `(N, M)`, with the gateway's bookkeeping of each request."""

OPEN, MET, MISSED, UNSERVED = range(4)  # LOAD.outcome: none yet or refused, answered within every SLO or not, lost

DESK = np.dtype(
    [
        ("now_s", "f8"),
        ("horizon_s", "f8"),
        ("elapsed_s", "f8"),  # between the last two decisions
        ("reward_usd", "f8"),
        ("margin_usd", "f8"),
        ("arrival_gap_s", "f8"),  # moving mean
        ("last_arrival_s", "f8"),
        ("arrivals", "i4"),
        ("window_closes_s", "f8"),  # next end of an SLO window; inf: there is none
        ("least_think_s", "f8"),
        ("n_roots", "i4"),  # requests that follow no other: at least so many decisions
        ("ready", "i4"),  # follow-ups on their way
        ("leading", "i4"),  # requests in flight that others follow, or that are looked at
        ("session_station", "i4"),  # candidate that the View shows the session at, -1: none
        ("tried", "i4"),  # 1: the View shows an answer in hand
        ("n_requests", "i4"),
        ("variant", "i4"),  # member of the scenario's family: row of its constants
        ("prefix_block_tokens", "i4"),  # 0: prompts are not hashed, or nothing is cached
        ("cursor", "i4"),  # next arrival of one that follows no other
        ("current", "i4"),  # request being decided
        ("held_head", "i4"),
        ("held_tail", "i4"),
        ("gated", "i4"),  # 1: a controller releases what is held, see world_hold.py
        ("offered", "i4"),  # 1: the current decision is about a request that was held
        ("release_per_s", "f8"),  # of held requests
        ("released_at_s", "f8"),  # last one that was not due
        ("retry_head", "i4"),  # requests that are offered again after an error, ordered by time
        ("elastic", "i4"),  # 0: replicas stay and nothing fails, which is simpler
        ("change", "i4"),  # next row of the world's faults
        ("n_changes", "i4"),
        ("sequence", "i4"),
        ("hedging", "i4"),  # 1: the current decision is about a second call, see world_hedge.py
        ("race_head", "i4"),  # requests that have two calls under way, -1: none
        ("shown_at", "i4"),  # candidate at which the View shows the current request under way, -1: none
        ("judged_head", "i4"),  # answers whose judgement is on its way
        ("judged_tail", "i4"),
        ("lru_head", "i4"),  # least recently used key of the response cache
        ("lru_tail", "i4"),
        ("cached", "i4"),
        ("illegal", "i4"),  # choices that were not legal and became shed
        ("done", "i4"),
    ]
)
"""The gateway's own state, `(N,)`."""

CONFIG = np.dtype(
    [
        ("gpu_usd_per_s", "f8"),  # of the replicas that are paid at the start
        ("elastic", "i4"),  # 1: replicas may come and go
        ("max_attempts", "i4"),
        ("backoff_s", "f8"),
        ("hold_s", "f8"),
        ("feedback_delay_s", "f8"),
        ("result_ttl_s", "f8"),  # of tools, -1: none is kept
        ("result_lookup_s", "f8"),
        ("cache_capacity", "i4"),
        ("cache_ttl_s", "f8"),
        ("cache_lookup_s", "f8"),
        ("cache_entry_usd", "f8"),
        ("cache_shared", "i4"),
        ("cache_semantic", "i4"),  # 1: looks for prompts that mean the same, too
        ("cache_min_similarity", "f8"),
        ("cache_half", "f8"),  # what the operator takes for the curve of response_cache.p_reuse
        ("cache_width", "f8"),
        ("keeps_accounts", "i4"),  # 1: some class has an allowance, a rate limit or a longest prompt
        ("gateways", "i4"),
        ("n_replicas", "i4"),
        ("n_providers", "i4"),
    ]
)
"""What holds for all worlds of a scenario, `(1,)`."""

OWN = np.dtype(
    [
        ("recent_ttft_s", "f8"),
        ("recent_tpot_s", "f8"),
        ("weight", "f8"),
        ("leading", "i4"),  # requests in flight there that others follow, or that are looked at
        # Several gateway instances, see world_gateways.py
        ("sent_head", "i4"),  # last request in flight there
        ("others_waiting", "f4"),  # at the engine by its last scrape, beyond this instance's own
        ("others_decoding", "f4"),
        ("others_tokens", "f4"),  # of those that decode
        ("scraped_at_s", "f8"),
        ("error_share", "f8"),  # of recent calls, as of error_at_s
        ("error_at_s", "f8"),
        ("gpu_usd_per_s", "f8"),  # price of a replica while it is paid
        ("price_times", "f8"),  # what a provider bills over its list price; not for gateways
        ("paid_s", "f8"),  # posted so far, if the world is elastic
        ("busy_s", "f8"),  # of a replica within the horizon, filled in at its end; not for gateways
        ("powered_s", "f8"),  # paid, the same
    ]
)
"""What a gateway measured itself per replica and provider, `(G N, R + V)`; facts of the world in the first N rows."""

MEAN = np.dtype([("value", "f8"), ("weight", "f8"), ("intercept", "f8"), ("slope", "f8"), ("length", "f8")])
"""Running means, `(G N, K + T, J)`: output tokens by class and task, then surprise about quality by tier and task.

The latter hold beside it what is expected of an answer: `quality.expected_good` of the prior, as the policy fits it.
"""
