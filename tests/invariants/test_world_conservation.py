"""Conservation: whatever the fleet, the load, the policy and its faults, each request is in one place and ends once."""

import copy

import by_hand
import numpy as np
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from envs import world_sessions as sessions
from envs.economics import ledger as books
from envs.fleet.state import ABANDONED, COMPLETED, FAILED, IN_FLIGHT, NOT_SUBMITTED
from envs.scenario import Scenario
from envs.worlds import FleetWorlds
from marginroute import view as v


def pools():
    return st.fixed_dictionaries(
        {
            "replicas": st.integers(1, 3),
            "kv_blocks": st.integers(76, 300),  # the largest request takes 75
            "max_num_seqs": st.integers(1, 8),
            "max_num_batched_tokens": st.sampled_from([64, 300, 1000]),
            "scheduler": st.sampled_from(["vllm-v1", "prefill-first", "sarathi"]),
            "in_flight_cap": st.none() | st.integers(1, 4),
            "prefix_caching": st.booleans(),
        }
    )


@st.composite
def scenarios(draw):
    """The scenario of `by_hand` with another fleet and another load; some without API, cache or batch queue."""
    data = copy.deepcopy(by_hand.SCENARIO)
    fleet, classes = data["fleet"], data["plans"]["classes"]
    for pool in fleet["pools"].values():
        pool |= draw(pools())
    if draw(st.booleans()):
        fleet["providers"] = {}
    else:
        fleet["providers"]["api"] |= {"requests_per_minute": draw(st.sampled_from([6.0, 60.0])), "ttft_sigma": 0.8}
    if draw(st.booleans()):
        del fleet["response_cache"]
    else:
        fleet["response_cache"]["capacity_entries"] = draw(st.integers(1, 4))
    if draw(st.booleans()):
        del fleet["batch_queue"], classes["night"]["delay_tolerant"]
    if draw(st.booleans()):
        classes["metered"]["patience"] = {"median_s": draw(st.sampled_from([0.05, 0.5])), "sigma": 1.0}
    data["workload"]["recurring"]["share"] = draw(st.sampled_from([0.0, 0.8]))
    data["horizon_s"] = draw(st.sampled_from([1.0, 10.0, 60.0]))
    data["requests_per_episode"] = draw(st.integers(1, 60))
    return Scenario.model_validate({"name": "random", **data})


def faults():
    return st.none() | st.fixed_dictionaries(
        {
            "mean_time_between_s": st.sampled_from([1.0, 10.0]),
            "mean_repair_s": st.sampled_from([0.1, 2.0]),
            "slow_mean_time_between_s": st.sampled_from([None, 3.0]),
            "slow_mean_s": st.just(2.0),
        }
    )


SPOT = {"replicas": 1, "gpu_usd_per_hour": 1.0, "mean_time_between_s": 3.0, "mean_absence_s": 2.0, "notice_s": 0.5}


@st.composite
def shaky_scenarios(draw):
    """The scenarios above with faults, retries, and pools that can be scaled."""
    data = draw(scenarios()).model_dump(exclude={"ranges", "conditions"})
    for pool in data["fleet"]["pools"].values():
        pool |= {
            "max_replicas": pool["replicas"] + draw(st.integers(0, 2)),
            "min_replicas": draw(st.integers(0, 1)),
            "reserved_replicas": draw(st.integers(0, 1)),
            "spot": draw(st.sampled_from([None, SPOT])) if pool["replicas"] > 1 else None,
            "provision_s": draw(st.sampled_from([0.0, 1.0])),
            "load_s": draw(st.sampled_from([0.0, 0.5])),
            "paid_from": draw(st.sampled_from(["provision", "load"])),
            "faults": draw(faults()),
            "detect_s": draw(st.sampled_from([0.0, 1.0, 100.0])),
            "connection_errors": draw(st.booleans()),
        }
        if pool["scheduler"] == "vllm-v1":
            pool["scheduling_policy"] = draw(st.sampled_from(["fcfs", "priority"]))
    for provider in data["fleet"]["providers"].values():
        provider |= {
            "faults": draw(faults()),
            "error_after_s": draw(st.sampled_from([0.0, 0.4])),
            "tokens_per_minute": draw(st.sampled_from([None, 6000.0])),
        }
    data["plans"]["classes"]["seats"]["priority"] = draw(st.integers(0, 1))
    data["fleet"]["retries"] = {
        "max_attempts": draw(st.integers(1, 4)),
        "backoff_s": draw(st.sampled_from([0.0, 0.3])),
    }
    return Scenario.model_validate(data)


@st.composite
def hedged_scenarios(draw):
    """The shaky scenarios with classes that send a late call twice."""
    data = draw(shaky_scenarios()).model_dump(exclude={"ranges", "conditions"})
    data["fleet"]["gateways"] = draw(st.integers(1, 2))
    for customer in data["plans"]["classes"].values():
        customer["hedge_after_s"] = draw(st.sampled_from([None, 0.02, 0.3]))
    return Scenario.model_validate(data)


def held_jobs(worlds, w, head="held_head"):
    """Requests in the batch queue, or in that of retries, by walking its list."""
    i, jobs = int(worlds.desks[head][w]), []
    while i >= 0:
        jobs.append(i)
        i = int(worlds.loads["next_held"][w, i])
    return jobs


def check_step(worlds):
    """What holds between any two decisions."""
    ended = worlds.counts[:, [books.SERVED, books.SHED, books.ABANDONED, books.FAILED]].sum(axis=(1, 2))
    calls = worlds.counts[:, books.CALLS].sum(axis=1)
    fleet = worlds.fleet
    flying = fleet.replicas["in_flight"].sum(axis=1) + fleet.providers["in_flight"].sum(axis=1)
    second = (worlds.books.arrays.hedges["second"] >= 0) & in_episode(worlds, worlds.books.arrays.hedges.shape[1])
    flying -= second.sum(axis=1)  # of two calls of a request one is in charge
    hedging = worlds.desks["hedging"] == 1
    for w in range(worlds.n_worlds):
        held = len(held_jobs(worlds, w)) + len(held_jobs(worlds, w, "retry_head"))
        deciding = 0 if worlds.done[w] or hedging[w] else 1
        assert calls[w] == ended[w] + flying[w] + held + deciding
    assert (worlds.counts >= 0).all() and (worlds.action_counts >= 0).all()
    assert np.isfinite(worlds.ledger_usd).all()
    assert np.isfinite(worlds.signals).all() and not np.isnan(worlds.request).any()
    assert (worlds.signals[v.KV_USAGE] <= 1.0).all()
    counters = worlds.signals[[v.IN_FLIGHT, v.HELD, v.PENDING_PREFILL_TOKENS, v.DECODING, v.DECODING_TOKENS]]
    assert (counters >= 0.0).all()
    assert (worlds.signals[v.HELD] <= worlds.signals[v.IN_FLIGHT]).all()
    assert (worlds.legal[:, -1] | hedging).all() and worlds.legal.any(axis=1).all()
    np.testing.assert_allclose(worlds.desks["margin_usd"], worlds.ledger_usd.sum(axis=(1, 2)), rtol=1e-12, atol=1e-12)


def in_episode(worlds, rows):
    """(N, M) bool: rows of the episodes."""
    return np.arange(rows) < worlds.desks["n_requests"][:, None]


def check_end(worlds, workloads, offers):
    """What holds when every world has been settled, after so many decisions at hedge timers, (N,)."""
    fleet = worlds.fleet
    for field in ("in_flight", "held", "waiting", "running", "kv_used_blocks", "pending_prefill_tokens", "decoding"):
        assert not fleet.replicas[field].any(), field
    assert not fleet.replicas["decoding_tokens"].any() and not fleet.providers["in_flight"].any()
    for w, workload in enumerate(workloads):
        m, counts = workload.n_requests, worlds.counts[w]
        arrival, follows = worlds.loads["arrival"][w, :m], workload.parent_index >= 0
        for count, rows in (
            (books.FIRST_CALLS, ~follows),
            (books.CALLS, arrival == sessions.ARRIVED),
            (books.LOST_CALLS, arrival == sessions.NEVER),
        ):
            of_class = np.bincount(workload.class_index[rows], minlength=counts.shape[1])
            np.testing.assert_array_equal(counts[count], of_class)
        ends = counts[[books.SERVED, books.SHED, books.ABANDONED, books.FAILED]].sum(axis=0)
        np.testing.assert_array_equal(ends, counts[books.CALLS])
        check_follow_ups(worlds, w, workload)
        status = fleet.requests["status"][w, :m]
        assert (status == ABANDONED).sum() == counts[books.ABANDONED].sum()
        assert (status == FAILED).sum() == counts[books.FAILED].sum()
        from_cache = worlds.action_counts[w, v.CACHE]
        assert (status == COMPLETED).sum() == counts[books.SERVED].sum() - from_cache
        assert (status[arrival == sessions.ARRIVED] == NOT_SUBMITTED).sum() <= counts[books.SHED].sum() + from_cache
        served = counts[books.SERVED].sum()
        assert counts[books.GOOD].sum() <= served and counts[books.SLO_OK].sum() <= served
        done = status == COMPLETED
        cached_tokens = counts[books.PROMPT_TOKENS].sum() - workload.prompt_tokens[done].sum()
        assert cached_tokens >= from_cache  # prompts answered from the cache, of a token or more each
        assert (cached_tokens == 0) == (from_cache == 0)
        decisions = worlds.desks["sequence"][w]
        again = counts[books.DEFERRED].sum() + counts[books.RETRIES].sum() - settled(worlds, w)
        assert decisions - offers[w] == counts[books.CALLS].sum() + again
        hedged = counts[books.HEDGED].sum()
        assert worlds.action_counts[w].sum() == decisions - offers[w] + hedged
        assert counts[books.HEDGES_WON].sum() <= hedged <= offers[w]
        assert worlds.desks["race_head"][w] == -1 and (worlds.books.arrays.timers["head"][w] == -1).all()


def check_follow_ups(worlds, w, workload):
    """A follow-up arrived exactly when it should, or would have come after the horizon, or its parent got no answer."""
    arrival, at_s = worlds.loads["arrival"][w], worlds.loads["arrived_at_s"][w]
    requests, horizon_s = worlds.fleet.requests[w], workload.horizon_s
    assert worlds.desks["leading"][w] == 0 and not worlds.own["leading"][w].any()
    for i in np.flatnonzero(workload.parent_index >= 0):
        p = workload.parent_index[i]
        if arrival[p] != sessions.ARRIVED:
            assert arrival[i] == arrival[p]
        elif requests["status"][p] == COMPLETED:
            ready_s = requests["completed_at_s"][p] + max(workload.think_s[i], sessions.LEAST_THINK_S)
            assert at_s[i] == ready_s
            assert arrival[i] == (sessions.ARRIVED if ready_s < horizon_s else sessions.EXPECTED)
        elif requests["status"][p] != NOT_SUBMITTED:
            assert arrival[i] == sessions.NEVER


def settled(worlds, w):
    """Deferrals and retries that no further decision followed: settled at the horizon."""
    return int((worlds.loads["offer_at_s"][w] >= worlds.desks["horizon_s"][w]).sum())


def play_at_random(scenario, seed, illegal, scaling, linked):
    """Plays two worlds with random choices and, with `scaling`, random targets, checking all the time.

    With `linked` most requests follow others and repeat their prompts.
    """
    worlds = FleetWorlds(scenario, 2)
    workloads = [scenario.generate(seed + w, "validation") for w in range(2)]
    if linked:
        workloads = [by_hand.as_sessions(workload, seed) for workload in workloads]
    worlds.load_all(workloads)
    worlds.set_in_flight_caps(None)
    rng = np.random.default_rng(seed)
    weights = rng.random(worlds.legal.shape[1]) ** 3  # most policies prefer something
    steps, offers = 0, np.zeros(2, dtype=np.int64)
    while not worlds.done.all():
        draw = rng.random(worlds.legal.shape) * weights
        choices = np.where(worlds.legal, draw, -1.0).argmax(axis=1)
        if illegal:
            choices = np.where(rng.random(2) < 0.2, rng.integers(-1, worlds.legal.shape[1] + 1, 2), choices)
        if scaling and rng.random() < 0.3:
            worlds.set_replicas(rng.integers(0, 6, (2, len(worlds.plant.slots))))
            assert (worlds.legal[:, -1] | (worlds.desks["hedging"] == 1)).all()
            continue
        offers += worlds.desks["hedging"]
        worlds.step(choices)
        check_step(worlds)
        steps += 1
        assert steps < 5000
    check_end(worlds, workloads, offers)
    return worlds, workloads


@settings(max_examples=40, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(scenario=scenarios(), seed=st.integers(0, 1000), illegal=st.booleans(), linked=st.booleans())
def test_every_request_is_in_one_place_and_ends_once(scenario, seed, illegal, linked):
    play_at_random(scenario, seed, illegal, False, linked)


@settings(max_examples=60, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(
    scenario=shaky_scenarios(),
    seed=st.integers(0, 1000),
    illegal=st.booleans(),
    scaling=st.booleans(),
    linked=st.booleans(),
)
def test_so_it_is_when_replicas_fail_and_come_and_go(scenario, seed, illegal, scaling, linked):
    worlds, workloads = play_at_random(scenario, seed, illegal, scaling, linked)
    fleet, spec = worlds.fleet, worlds.plant.spec
    for w, workload in enumerate(workloads):
        world = fleet.worlds[w]
        # every attempt ended once: lost ones are those that were tried again or were the last
        ended = world["completed"] + world["abandoned"] + world["failed"] + world["lost"]
        assert world["submitted"] == ended
        assert world["lost"] >= worlds.counts[w, books.RETRIES].sum()
        assert (worlds.loads["attempts"][w] <= scenario.fleet.retries.max_attempts).all()
        assert world["draining"] >= 0 and world["doomed_calls"] == 0
        # GPU-hours: never more than all rows, never less than the reserved ones, and what was posted is what is paid
        rows, horizon_s = spec.pool_of_replica, workload.horizon_s
        first = np.concatenate([np.arange(pool.rows) for pool in spec.pools])
        reserved = first < np.array([pool.reserved_replicas for pool in spec.pools])[rows]
        paid_s, price = worlds.own["powered_s"][w, : len(rows)], worlds.own["gpu_usd_per_s"][w, : len(rows)]
        assert (paid_s[reserved] == horizon_s).all() and (paid_s <= horizon_s + 1e-9).all()
        posted = -worlds.ledger_usd[w, books.GPU_HOURS].sum()
        np.testing.assert_allclose(posted, (paid_s * price).sum(), rtol=1e-9, atol=1e-12)
        assert (worlds.utilisation[w] <= 1.0 + 1e-9).all()


@settings(max_examples=60, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(
    scenario=hedged_scenarios(),
    seed=st.integers(0, 1000),
    illegal=st.booleans(),
    scaling=st.booleans(),
    linked=st.booleans(),
)
def test_so_it_is_when_late_calls_are_sent_twice(scenario, seed, illegal, scaling, linked):
    worlds, workloads = play_at_random(scenario, seed, illegal, scaling, linked)
    for w, workload in enumerate(workloads):
        world, m = worlds.fleet.worlds[w], workload.n_requests
        assert world["submitted"] == world["completed"] + world["abandoned"] + world["failed"] + world["lost"]
        assert (worlds.books.arrays.hedges["second"][w, :m] == -1).all()
        assert (worlds.fleet.requests["status"][w, : 2 * m] != IN_FLIGHT).all()


def test_the_policies_above_reach_every_kind_of_end(hand_scenario):
    """The property is about something: under load all kinds of actions and ends occur."""
    data = copy.deepcopy(by_hand.SCENARIO)
    data["plans"]["classes"]["metered"]["patience"] = {"median_s": 0.05, "sigma": 1.0}
    data["fleet"]["pools"]["one"] |= {"in_flight_cap": 1}
    data |= {"horizon_s": 10.0, "requests_per_episode": 200}
    data["workload"]["recurring"]["share"] = 0.8
    for customer in data["plans"]["classes"].values():
        customer["hedge_after_s"] = 0.2
    scenario = Scenario.model_validate({"name": "busy", **data})
    worlds = FleetWorlds(scenario, 1)
    worlds.load(0, scenario.generate(0))
    rng = np.random.default_rng(0)
    while not worlds.done.all():
        worlds.step(np.where(worlds.legal, rng.random(worlds.legal.shape), -1.0).argmax(axis=1))
    assert (worlds.action_counts[0] > 0).all()
    assert worlds.counts[0, books.HEDGED].sum() > worlds.counts[0, books.HEDGES_WON].sum() > 0
    assert (worlds.counts[0, [books.SERVED, books.SHED, books.ABANDONED, books.DEFERRED]].sum(axis=1) > 0).all()


def test_restarts_are_counted(hand_scenario):
    """Two long answers that do not fit together: one is preempted and recomputed, both are served."""
    data = copy.deepcopy(by_hand.SCENARIO)
    data["fleet"]["pools"]["one"]["kv_blocks"] = 76
    scenario = Scenario.model_validate({"name": "tight", **data})
    worlds = FleetWorlds(scenario, 1)
    row = {"prompt_tokens": 400, "output_tokens": 400}
    worlds.load(0, by_hand.workload(scenario, row, row))
    worlds.step(np.array([by_hand.ONE]))
    worlds.step(np.array([by_hand.ONE]))
    assert worlds.counts[0, books.RESTARTS].sum() >= 1
    assert worlds.counts[0, books.SERVED].sum() == 2
    assert worlds.counts[0, books.OUTPUT_TOKENS].sum() == 800
