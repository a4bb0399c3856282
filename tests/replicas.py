"""One pool of replicas that come and go, for tests by hand."""

import math

from envs.fleet import engine
from envs.fleet.allocation import Fleet, allocate
from envs.fleet.profile import constant_profile
from envs.fleet.scaling import paid_seconds
from envs.fleet.spec import FleetSpec, PoolSpec


def one_pool(most_requests: int, rows=(), **pool) -> Fleet:
    """A fleet of one pool with iterations of 1 s, whose requests have (prompt, output) tokens and all patience."""
    spec = PoolSpec("p", constant_profile(1.0), **({"max_num_seqs": 4, "max_num_batched_tokens": 8} | pool))
    fleet = allocate(FleetSpec((spec,), (), scrape_interval_s=4.0), 1, most_requests)
    for i, (prompt, output) in enumerate(rows):
        fleet.requests["prompt_tokens"][0, i], fleet.requests["output_tokens"][0, i] = prompt, output
    fleet.requests["patience_until_s"] = math.inf
    engine.reset_world(*fleet.arrays, 0)
    return fleet


def states(fleet: Fleet) -> list[int]:
    """Of the replicas of its world."""
    return fleet.replicas["state"][0].tolist()


def all_paid_s(fleet: Fleet, now_s: float) -> list[float]:
    """Seconds for which each replica's machine is paid until now."""
    return [paid_seconds(fleet.pools[0], rep, r, now_s) for r, rep in enumerate(fleet.replicas[0])]
