"""What deciding itself costs, so that savings can be stated net of it.

Both figures are assumptions, stated in every report. Half a millisecond of a core per decision covers what a policy
adds inside LiteLLM (docs/gateways.md) with the network's own microseconds in it; a core costs what clouds charge for a
vCPU on demand. The difference to the best heuristic is charged with all of it, as if that one decided for nothing.
"""

from __future__ import annotations

from evaluation.results import EpisodeResults

CPU_S_PER_DECISION = 0.0005
USD_PER_CORE_HOUR = 0.05


def router_usd_per_1k(results: EpisodeResults) -> float:
    """USD per 1k first calls for the policy's decisions."""
    decisions = float(results.action_counts.sum()) / max(float(results.first_calls.sum()), 1.0)
    return 1000.0 * decisions * CPU_S_PER_DECISION * USD_PER_CORE_HOUR / 3600.0


def router_words(results: EpisodeResults) -> str:
    """The assumption and what follows from it."""
    return (
        f"The router's own cost is assumed: {1000.0 * CPU_S_PER_DECISION:g} ms of a core per decision at"
        f" {USD_PER_CORE_HOUR:g} USD per core-hour, {router_usd_per_1k(results):.6f} USD per 1k requests"
    )
