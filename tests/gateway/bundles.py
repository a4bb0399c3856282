"""A bundle made by hand: two replicas of different tiers and a third-party API under a margin rule."""

from __future__ import annotations

import numpy as np

from marginroute import view as v
from marginroute.bundle import Bundle
from marginroute.guard import GuardLimits
from marginroute.margin_rule import MarginParameters, MarginRule
from marginroute.quality import QualityPrior
from marginroute.rules import LeastInFlight
from marginroute.view import Layout

TERMS = {
    "input_usd_per_token": 4e-6,
    "output_usd_per_token": 1.6e-5,
    "seat_usd_per_s": 0.0,
    "request_value_usd": 0.0,
    "refund_share": 1.0,
    "bad_answer_usd": 0.001,
    "slo_ttft_s": 1.0,
    "slo_tpot_s": 0.05,
    "slo_e2e_s": float("inf"),
    "ttft_credit_share": 0.25,
    "tpot_credit_share": 0.1,
    "e2e_credit_share": 0.0,
    "unserved_credit_share": 0.5,
    "unserved_credit_usd": 0.0,
    "patience_s": 10.0,
    "delay_tolerant": 0.0,
    "cached_input_usd_per_token": 4e-6,
    "request_usd": 0.0,
}


def small_bundle() -> Bundle:
    layout = Layout(
        names=("small/0", "large/0", "api", "cache", "defer", "shed"),
        kind=np.array([v.REPLICA, v.REPLICA, v.PROVIDER, v.CACHE, v.DEFER, v.SHED]),
        station=np.array([0, 1, 2, 3, 3, 3]),
        tier=np.array([0, 1, 1, -1, -1, -1]),
        station_names=("small", "large", "api"),
        tier_names=("small", "large"),
        class_names=("standard", "premium", "batch"),
        task_names=("chat", "code"),
    )
    static = np.zeros((v.N_STATIC_SIGNALS, 6))
    static[[v.TOKEN_BUDGET, v.SLOTS, v.KV_CAPACITY_TOKENS]] = 1e9
    static[[v.BASE_S, v.PREFILL_TOKEN_S, v.DECODE_SEQ_S, v.KV_TOKEN_S], 0] = 0.006, 2e-5, 1e-4, 1e-8
    static[[v.BASE_S, v.PREFILL_TOKEN_S, v.DECODE_SEQ_S, v.KV_TOKEN_S], 1] = 0.02, 8e-5, 3e-4, 3e-8
    static[[v.TOKEN_BUDGET, v.SLOTS, v.KV_CAPACITY_TOKENS], :2] = [[2048.0], [8.0], [65536.0]]
    static[[v.FIXED_TTFT_S, v.FIXED_TPOT_S], 2] = 0.6, 0.012
    static[[v.INPUT_USD, v.OUTPUT_USD], 0] = 1e-7, 2e-7
    static[[v.INPUT_USD, v.OUTPUT_USD], 1] = 4e-7, 8e-7
    static[[v.INPUT_USD, v.OUTPUT_USD], 2] = 2.5e-6, 1e-5
    return Bundle(
        policy=MarginRule("bid-price", MarginParameters(station_usd_per_s=(0.001, 0.004, 0.0))),
        fallback=LeastInFlight("least-in-flight", use_providers=True),
        limits=GuardLimits(),
        layout=layout,
        static_signals=static,
        slots=np.array([8.0, 8.0]),
        terms={
            "standard": TERMS,
            "premium": TERMS
            | {
                "input_usd_per_token": 1e-5,
                "cached_input_usd_per_token": 1e-5,
                "output_usd_per_token": 4e-5,
                "slo_ttft_s": 0.4,
            },
            "batch": TERMS | {"delay_tolerant": 1.0, "slo_ttft_s": float("inf"), "patience_s": float("inf")},
        },
        allowed=np.ones((3, 6), dtype=np.bool_),
        output_tokens=np.array([[120.0, 260.0], [150.0, 300.0], [400.0, 500.0]]),
        prior=QualityPrior(np.array([0.4, 1.4]), np.array([0.8, 0.6]), 0.7, 0.03),
        scenario={"name": "by hand", "hash": "0" * 16},
        evaluation={"policies": {"bid-price": {"margin_usd_per_1k_requests": {"mean": 1.25, "ci95": [1.2, 1.3]}}}},
        provenance={"seed": 1},
    )


class Records(list):
    """A record log in memory."""

    def write(self, record):
        self.append(record)
        return True

    def close(self):
        pass
