"""Several gateway instances: own counters add up to everybody's; of what others do, only what engines tell is seen."""

import dataclasses

import by_hand
import numpy as np
import pytest
from by_hand import API, ONE, SHED, TWO_A, TWO_B, Played, workload

from envs.fleet_env import FleetEnv
from envs.world_gateways import PREFILL, instance_of, show_replica
from envs.worlds import FleetWorlds
from marginroute import view as v
from marginroute.rules import RoundRobin

COUNTERS = [v.IN_FLIGHT, v.HELD, v.PENDING_PREFILL_TOKENS, v.DECODING, v.DECODING_TOKENS]
FIELDS = ["in_flight", "held", "pending_prefill_tokens", "decoding", "decoding_tokens"]
BUSY = {
    "fleet.pools.one.in_flight_cap": 2,
    "fleet.pools.one.kv_blocks": 76,
    "fleet.pools.two.faults": {"mean_time_between_s": 3.0, "mean_repair_s": 2.0},
    "plans.classes.metered.patience": {"median_s": 0.3, "sigma": 1.0},
    "workload.feedback": {"share": 0.5, "delay_s": 2.0},
}


def _busy(tmp_path, gateways, **top):
    overrides = {**BUSY, "fleet.gateways": gateways}
    return by_hand.scenario(tmp_path, overrides, horizon_s=12.0, requests_per_episode=400, **top)


@pytest.mark.parametrize("speculation", [None, {"draft_tokens": 3, "acceptance": 0.7}])
def test_counters_of_all_instances_add_up_to_those_of_the_replica(tmp_path, speculation):
    """Held, waiting, preempted, streaming and speculating requests, users who leave, and crashes."""
    scenario = _busy(tmp_path, 3)
    if speculation is not None:
        scenario = scenario.model_copy(update={"fleet": _with(scenario.fleet, speculation)})
    worlds = FleetWorlds(scenario, 2)
    worlds.load_all([scenario.generate(seed) for seed in (0, 1)])
    signals, rng, seen = np.zeros_like(worlds.signals), np.random.default_rng(0), np.zeros(5)
    while not worlds.done.all():
        for w in np.flatnonzero(~worlds.done):
            mine = int(worlds.loads["gateway"][w, worlds.desks["current"][w]])
            for c in range(worlds.plant.spec.n_replicas):
                rep, total = worlds.fleet.replicas[w, c], np.zeros(5)
                for g in range(w, 6, 2):
                    show_replica(rep, worlds.fleet.requests, worlds.loads, worlds.own, signals, w, g, c)
                    total += signals[COUNTERS, w, c]
                    if g == mine:
                        own = signals[COUNTERS, w, c] + _others(worlds, g, c)
                        np.testing.assert_allclose(worlds.signals[COUNTERS, w, c], own, rtol=1e-12)
                assert total.tolist() == [rep[name] for name in FIELDS]
                seen = np.maximum(seen, total)
        score = np.where(worlds.legal, rng.random(worlds.legal.shape), -1.0)
        score[:, SHED] = 0.01
        worlds.step(score.argmax(axis=1))
    assert (seen > 1).all() and worlds.counts[:, 5:].any()
    assert (worlds.own["sent_head"] == -1).all()


def _others(worlds, g, c):
    """What instance `g` takes for others' at replica `c`, in the order of COUNTERS."""
    row, prefill = worlds.own[g, c], worlds.lengths[g, PREFILL, 0]
    waiting, decoding = float(row["others_waiting"]), float(row["others_decoding"])
    return np.array([waiting + decoding, 0.0, waiting * prefill["value"], decoding, float(row["others_tokens"])])


def _with(fleet, speculation):
    pools = {name: pool.model_dump() | {"speculation": speculation} for name, pool in fleet.pools.items()}
    return type(fleet).model_validate(fleet.model_dump() | {"pools": pools})


def test_what_others_had_is_forgotten_with_the_episode(tmp_path):
    """A world that has played a busy episode plays the next one as a new world does."""
    scenario = _busy(tmp_path, 3)
    used, fresh = FleetWorlds(scenario, 1), FleetWorlds(scenario, 1)
    used.load(0, scenario.generate(0))
    used.run(RoundRobin("round-robin"))
    assert used.own["scraped_at_s"].any()
    for worlds in (used, fresh):
        worlds.load(0, scenario.generate(1))
    while not fresh.done.all():
        np.testing.assert_array_equal(used.signals, fresh.signals)
        choice = RoundRobin("round-robin").decide_batch(fresh.view())
        for worlds in (used, fresh):
            worlds.step(choice)
    assert fresh.own["others_decoding"].any() and used.done.all()


def test_an_instance_sees_its_own_only(tmp_path):
    """Nine requests at once, one to each replica and the API in turn, round and round."""
    scenario = by_hand.scenario(tmp_path, {"fleet.gateways": 2, "fleet.providers.api.burst_requests": 20.0})
    rows = [{"arrived_at_s": 0.001 * i, "output_tokens": 100, "class_index": 1} for i in range(9)]
    episode = workload(scenario, *rows)
    choices = [(ONE, TWO_A, API)[i % 3] for i in range(9)]
    played = Played(FleetEnv(scenario), episode, choices)
    instance = instance_of(episode, 2, "request")
    assert 0 < instance.sum() < 9
    for i, view in enumerate(played.views):
        before = [
            sum(instance[j] == instance[i] and choices[j] == c for j in range(i)) for c in (ONE, TWO_A, TWO_B, API)
        ]
        assert view.signals[v.IN_FLIGHT, :4].tolist() == before
        assert view.request[v.SEQUENCE] == (instance[:i] == instance[i]).sum()
    assert played.count("served") == 9


def test_an_instance_learns_of_the_others_requests_from_the_next_scrape(tmp_path):
    """Twelve long requests at once to one replica: before a scrape each sees its own, after it everybody's."""
    scenario = by_hand.scenario(tmp_path, {"fleet.gateways": 3})
    rows = [{"arrived_at_s": 0.001 * i, "prompt_tokens": 50, "output_tokens": 4000} for i in range(12)]
    episode = workload(scenario, *rows, *({"arrived_at_s": t} for t in (1.2, 1.3, 1.4, 1.5)))
    played = Played(FleetEnv(scenario), episode, [ONE] * 12 + [SHED] * 4)
    assert played.views[11].signals[v.IN_FLIGHT, ONE] < 11
    for view in played.views[12:]:
        signals = view.signals[:, ONE]
        assert signals[v.RUNNING] == 8 and signals[v.WAITING] == 4
        assert signals[[v.IN_FLIGHT, v.DECODING, v.PENDING_PREFILL_TOKENS]].tolist() == [12, 8, 200]
        kept_tokens = signals[v.KV_USAGE] * signals[v.KV_CAPACITY_TOKENS]
        assert signals[v.DECODING_TOKENS] == pytest.approx(kept_tokens, rel=0.2)
        assert not view.signals[v.IN_FLIGHT, [TWO_A, TWO_B]].any()


def test_what_an_instance_has_learned_stays_with_it(tmp_path):
    """Errors of the API, latency of a replica and the length of answers: known to the one that met them."""
    outage = {"provider": "api", "starts_at_s": 0.0, "duration_s": 5.0}
    scenario = by_hand.scenario(tmp_path, {"fleet.gateways": 2, "fleet.faults": [outage]})
    rows = [{"arrived_at_s": float(t), "output_tokens": 60} for t in range(12)]
    episode = dataclasses.replace(workload(scenario, *rows), faults=scenario.generate(0).faults)
    instance = instance_of(episode, 2, "request")
    other = int(np.flatnonzero(instance != instance[0])[0])
    same = int(np.flatnonzero((instance == instance[0]) & (np.arange(12) > other))[0])
    played = Played(FleetEnv(scenario), episode, [API, ONE] + [SHED] * 11)
    theirs, ours = played.views[other + 1], played.views[same + 1]  # the retry is a decision, too
    assert theirs.signals[v.RECENT_ERRORS, API] == 0.0 < ours.signals[v.RECENT_ERRORS, API]
    start = played.views[0]
    for signal in (v.RECENT_TTFT_S, v.RECENT_TPOT_S):
        assert theirs.signals[signal, ONE] == start.signals[signal, ONE] or signal == v.RECENT_TPOT_S
    assert theirs.request[v.EXPECTED_OUTPUT_TOKENS] == start.request[v.EXPECTED_OUTPUT_TOKENS]
    assert ours.request[v.EXPECTED_OUTPUT_TOKENS] != start.request[v.EXPECTED_OUTPUT_TOKENS]


def test_each_instance_goes_round_by_itself(tmp_path):
    """Round robin over three replicas from two instances: each replica gets a third of each one's requests."""
    scenario = by_hand.scenario(tmp_path, {"fleet.gateways": 2, "fleet.providers": {}})
    rows = [{"arrived_at_s": 0.01 * i} for i in range(120)]
    worlds = FleetWorlds(scenario, 1)
    episode = workload(scenario, *rows)
    worlds.load(0, episode)
    worlds.run(RoundRobin("round-robin"))
    instance = instance_of(episode, 2, "request")
    for g in range(2):
        sent = np.bincount(worlds.loads["answered_by"][0, :120][instance == g], minlength=3)
        assert sent.max() - sent.min() <= 1


def test_arrivals_are_spread_evenly_and_sessions_stay_together(tmp_path):
    scenario = by_hand.scenario(tmp_path, requests_per_episode=4000, horizon_s=4000.0)
    episode = scenario.generate(3)
    counts = np.bincount(instance_of(episode, 8, "request"), minlength=8)
    assert abs(counts - 500).max() < 4.5 * np.sqrt(500 * 7 / 8)
    assert (instance_of(episode, 8, "request") == instance_of(episode, 8, "request")).all()
    assert (instance_of(episode, 8, "request") != instance_of(scenario.generate(4), 8, "request")).any()
    linked = by_hand.as_sessions(episode, 0)
    instance = instance_of(linked, 8, "session")
    first = np.unique(linked.session_index, return_index=True)[1]
    of_session = dict(zip(linked.session_index[first].tolist(), instance[first].tolist(), strict=True))
    assert [of_session[s] for s in linked.session_index.tolist()] == instance.tolist()
    assert len(set(of_session.values())) == 8


def test_what_becomes_of_the_same_choices_does_not_depend_on_the_number_of_instances(tmp_path):
    """Instances are knowledge: the same choices, the same outcomes and money."""
    totals = []
    for gateways in (1, 4):
        scenario = by_hand.scenario(tmp_path, {"fleet.gateways": gateways, "fleet.providers": {}})
        worlds = FleetWorlds(scenario, 1)
        worlds.load(0, scenario.generate(5))
        step = 0
        while not worlds.done.all():
            worlds.step(np.array([(ONE, TWO_A, TWO_B)[step % 3]]))
            step += 1
        totals.append((worlds.ledger_usd.copy(), worlds.counts.copy()))
    np.testing.assert_allclose(totals[0][0], totals[1][0], rtol=1e-3, atol=1e-6)  # unserved credits: expected lengths
    np.testing.assert_array_equal(totals[0][1], totals[1][1])
