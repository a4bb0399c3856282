"""Conservation: whatever the fleet, the load and the policy, every request is in exactly one place and ends once."""

import copy

import by_hand
import numpy as np
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from envs.economics import ledger as books
from envs.fleet.state import ABANDONED, COMPLETED, FAILED, NOT_SUBMITTED
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


def held_jobs(worlds, w):
    """Requests in the batch queue, by walking its list."""
    i, jobs = int(worlds.desks["held_head"][w]), []
    while i >= 0:
        jobs.append(i)
        i = int(worlds.loads["next_held"][w, i])
    return jobs


def check_step(worlds):
    """What holds between any two decisions."""
    ended = worlds.counts[:, [books.SERVED, books.SHED, books.ABANDONED, books.FAILED]].sum(axis=(1, 2))
    first_calls = worlds.counts[:, books.FIRST_CALLS].sum(axis=1)
    fleet = worlds.fleet
    flying = fleet.replicas["in_flight"].sum(axis=1) + fleet.providers["in_flight"].sum(axis=1)
    for w in range(worlds.n_worlds):
        held = len(held_jobs(worlds, w))
        deciding = 0 if worlds.done[w] else 1
        assert first_calls[w] == ended[w] + flying[w] + held + deciding
    assert (worlds.counts >= 0).all() and (worlds.action_counts >= 0).all()
    assert np.isfinite(worlds.ledger_usd).all()
    assert np.isfinite(worlds.signals).all() and not np.isnan(worlds.request).any()
    assert (worlds.signals[v.KV_USAGE] <= 1.0).all()
    counters = worlds.signals[[v.IN_FLIGHT, v.HELD, v.PENDING_PREFILL_TOKENS, v.DECODING, v.DECODING_TOKENS]]
    assert (counters >= 0.0).all()
    assert (worlds.signals[v.HELD] <= worlds.signals[v.IN_FLIGHT]).all()
    assert worlds.legal[:, -1].all()
    np.testing.assert_allclose(worlds.desks["margin_usd"], worlds.ledger_usd.sum(axis=(1, 2)), rtol=1e-12, atol=1e-12)


def check_end(worlds, workloads):
    """What holds when every world has been settled."""
    fleet = worlds.fleet
    for field in ("in_flight", "held", "waiting", "running", "kv_used_blocks", "pending_prefill_tokens", "decoding"):
        assert not fleet.replicas[field].any(), field
    assert not fleet.replicas["decoding_tokens"].any() and not fleet.providers["in_flight"].any()
    for w, workload in enumerate(workloads):
        m, counts = workload.n_requests, worlds.counts[w]
        np.testing.assert_array_equal(
            counts[books.FIRST_CALLS], np.bincount(workload.class_index, minlength=counts.shape[1])
        )
        status = fleet.requests["status"][w, :m]
        assert (status == ABANDONED).sum() == counts[books.ABANDONED].sum()
        assert (status == FAILED).sum() == counts[books.FAILED].sum()
        from_cache = worlds.action_counts[w, v.CACHE]
        assert (status == COMPLETED).sum() == counts[books.SERVED].sum() - from_cache
        assert (status == NOT_SUBMITTED).sum() <= counts[books.SHED].sum() + from_cache
        served = counts[books.SERVED].sum()
        assert counts[books.GOOD].sum() <= served and counts[books.SLO_OK].sum() <= served
        done = status == COMPLETED
        cached_tokens = counts[books.PROMPT_TOKENS].sum() - workload.prompt_tokens[done].sum()
        assert cached_tokens >= from_cache  # prompts answered from the cache, of a token or more each
        assert (cached_tokens == 0) == (from_cache == 0)
        decisions = worlds.desks["sequence"][w]
        assert worlds.action_counts[w].sum() == decisions == m + counts[books.DEFERRED].sum() - settled(worlds, w)


def settled(worlds, w):
    """Deferrals that no second decision followed: jobs settled at the horizon."""
    return int((worlds.loads["offer_at_s"][w] >= worlds.desks["horizon_s"][w]).sum())


@settings(max_examples=40, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(scenario=scenarios(), seed=st.integers(0, 1000), illegal=st.booleans())
def test_every_request_is_in_one_place_and_ends_once(scenario, seed, illegal):
    worlds = FleetWorlds(scenario, 2)
    workloads = [scenario.generate(seed + w, "validation") for w in range(2)]
    worlds.load_all(workloads)
    worlds.set_in_flight_caps(None)
    rng = np.random.default_rng(seed)
    weights = rng.random(worlds.legal.shape[1]) ** 3  # most policies prefer something
    steps = 0
    while not worlds.done.all():
        draw = rng.random(worlds.legal.shape) * weights
        choices = np.where(worlds.legal, draw, -1.0).argmax(axis=1)
        if illegal:
            choices = np.where(rng.random(2) < 0.2, rng.integers(-1, worlds.legal.shape[1] + 1, 2), choices)
        worlds.step(choices)
        check_step(worlds)
        steps += 1
        assert steps < 5000
    check_end(worlds, workloads)


def test_the_policies_above_reach_every_kind_of_end(hand_scenario):
    """The property is about something: under load all kinds of actions and ends occur."""
    data = copy.deepcopy(by_hand.SCENARIO)
    data["plans"]["classes"]["metered"]["patience"] = {"median_s": 0.05, "sigma": 1.0}
    data["fleet"]["pools"]["one"] |= {"in_flight_cap": 1}
    data |= {"horizon_s": 10.0, "requests_per_episode": 200}
    data["workload"]["recurring"]["share"] = 0.8
    scenario = Scenario.model_validate({"name": "busy", **data})
    worlds = FleetWorlds(scenario, 1)
    worlds.load(0, scenario.generate(0))
    rng = np.random.default_rng(0)
    while not worlds.done.all():
        worlds.step(np.where(worlds.legal, rng.random(worlds.legal.shape), -1.0).argmax(axis=1))
    assert (worlds.action_counts[0] > 0).all()
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
