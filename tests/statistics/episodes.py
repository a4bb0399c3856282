"""Hand-made episode results with known totals, for tests of the report."""

import numpy as np

from envs.economics.ledger import ACCOUNTS, COUNTS
from evaluation.latency import BINS
from evaluation.results import EpisodeResults

CLASSES = ("free", "pro", "enterprise")
POOLS = ("small", "large")
REPLICAS = (3, 1)
EPISODES, CALLS_PER_CLASS = 12, 100


def make_results(name="bid-price", edge_usd=0.0, episodes=EPISODES, seed=0, classes=CLASSES):
    """Per episode and class: 100 first calls, 90 answered, 80 good; USD 2 of usage, 1 of seats, 5 of GPUs in all.

    Days differ by the same noise for every policy; `edge_usd` is added to the usage revenue of every episode.
    """
    k = len(classes)
    day_usd = np.random.default_rng(seed).gamma(4.0, 0.5, episodes)
    ledger_usd = np.zeros((episodes, len(ACCOUNTS), k + 1))
    per_class = {
        "usage_revenue": 2.0,
        "seat_revenue": 1.0,
        "slo_credits": -0.1,
        "unserved_credits": -0.2,
        "refunds": -0.05,
        "api_spend": -0.3,
        "energy": -0.02,
        "cache": -0.03,
    }
    for account, usd in per_class.items():
        ledger_usd[:, ACCOUNTS.index(account), :k] = usd
    ledger_usd[:, ACCOUNTS.index("usage_revenue"), 0] += day_usd + edge_usd
    ledger_usd[:, ACCOUNTS.index("gpu_hours"), k] = -5.0
    counts = np.zeros((episodes, len(COUNTS), k), dtype=np.int64)
    calls = {
        "first_calls": 100,
        "calls": 100,
        "served": 90,
        "shed": 5,
        "abandoned": 3,
        "failed": 2,
        "good": 72,
        "slo_ok": 85,
        "ttft_ok": 88,
        "tpot_ok": 89,
        "e2e_ok": 86,
        "deferred": 10,
    }
    for count, n in calls.items():
        counts[:, COUNTS.index(count)] = n
    histogram = np.zeros((episodes, 3, k, BINS), dtype=np.int64)
    histogram[..., 400] = 90
    return EpisodeResults(
        policy=name,
        class_names=tuple(classes),
        pool_names=POOLS,
        pool_replicas=REPLICAS,
        seeds=np.arange(episodes),
        ledger_usd=ledger_usd,
        counts=counts,
        action_counts=np.tile([70, 10, 5, 10, 5], (episodes, 1)) * k,
        tier_counts=np.tile([60, 20], (episodes, 1)),
        utilisation=np.tile([0.4, 0.8], (episodes, 1)),
        horizon_s=np.full(episodes, 1800.0),
        latency_histogram=histogram,
    )


def comparison(**edges_usd):
    """Results by policy name, with an edge in USD per episode each."""
    return {name.replace("_", "-"): make_results(name.replace("_", "-"), edge) for name, edge in edges_usd.items()}
