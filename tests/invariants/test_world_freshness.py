"""Freshness: scraped signals are as of the last scrape and say how old they are; own counters are current."""

import itertools

import by_hand
import numpy as np
import pytest

from envs.fleet import engine
from envs.fleet.allocation import allocate
from envs.worlds import FleetWorlds
from marginroute import view as v

SCRAPED = [v.WAITING, v.RUNNING, v.KV_USAGE]


@pytest.fixture(scope="module")
def episode(small_plant):
    """A busy episode on replicas alone: (worlds after it, decisions as (now_s, signals (S, R)))."""
    worlds = FleetWorlds(small_plant, 1)
    worlds.load(0, small_plant.scenario.generate(9, "train"))
    worlds.set_in_flight_caps(np.full(len(small_plant.slots), 6))
    replicas = worlds.plant.spec.n_replicas
    rng, seen = np.random.default_rng(0), []
    while not worlds.done[0]:
        seen.append((float(worlds.desks["now_s"][0]), worlds.signals[:, 0, :replicas].copy()))
        worlds.step(rng.integers(0, replicas, 1))
    assert max(signals[v.HELD].max() for _, signals in seen) > 0
    return worlds, seen


def scrape_times(spec, r, until_s):
    """Scrapes of replica r: spread over the interval, then one per interval; the first is before the start."""
    phase_s = (r + 1.0) / spec.n_replicas * spec.scrape_interval_s
    return phase_s + spec.scrape_interval_s * np.arange(-1, int(until_s / spec.scrape_interval_s) + 1)


@pytest.fixture(scope="module")
def states_at_scrapes(episode):
    """The same requests sent to a bare engine, stopped at every scrape; {(r, scrape): (waiting, running, KV)}."""
    worlds, _ = episode
    spec, m = worlds.plant.spec, int(worlds.desks["n_requests"][0])
    ended = worlds.fleet.requests[0, :m]
    fleet = allocate(spec, 1, m)
    for field in ("prompt_tokens", "output_tokens", "patience_until_s"):
        fleet.requests[field][0, :m] = ended[field]
    engine.reset_world(*fleet.arrays, 0)
    for r in range(spec.n_replicas):
        engine.set_in_flight_cap(*fleet.arrays, 0, r, 6, 0.0)
    horizon_s = float(worlds.desks["horizon_s"][0])
    events = [(float(ended["dispatched_at_s"][i]), 1, i) for i in range(m)]
    for r in range(spec.n_replicas):
        events += [(float(t), 0, r) for t in scrape_times(spec, r, horizon_s) if t > 0.0]
    found = {(r, float(scrape_times(spec, r, horizon_s)[0])): (0, 0, 0.0) for r in range(spec.n_replicas)}
    for now_s, send, which in sorted(events):
        engine.advance(*fleet.arrays, 0, now_s)
        if send:
            engine.submit(*fleet.arrays, 0, int(ended["replica"][which]), which, now_s)
        else:
            rep = fleet.replicas[0, which]
            blocks = spec.pools[spec.pool_of_replica[which]].kv_blocks
            found[which, now_s] = (int(rep["waiting"]), int(rep["running"]), float(rep["kv_used_blocks"] / blocks))
    return found


def test_scraped_signals_are_the_state_at_the_last_scrape(episode, states_at_scrapes):
    worlds, seen = episode
    spec = worlds.plant.spec
    horizon_s = float(worlds.desks["horizon_s"][0])
    stale = 0
    for now_s, signals in seen:
        for r in range(spec.n_replicas):
            times_s = scrape_times(spec, r, horizon_s)
            last_s = float(times_s[times_s <= now_s][-1])
            assert signals[v.TELEMETRY_AGE_S, r] == pytest.approx(now_s - last_s, abs=1e-9)
            assert tuple(signals[SCRAPED, r]) == states_at_scrapes[r, last_s]
            stale += signals[v.RUNNING, r] + signals[v.HELD, r] != signals[v.IN_FLIGHT, r]
    assert stale > len(seen) / 4  # a fresh figure would have been another one


def test_age_grows_with_the_clock_and_starts_anew_at_a_scrape(episode):
    worlds, seen = episode
    interval_s = worlds.plant.spec.scrape_interval_s
    grown = 0
    for (before_s, before), (now_s, now) in itertools.pairwise(seen):
        age_s, was_s = now[v.TELEMETRY_AGE_S], before[v.TELEMETRY_AGE_S]
        assert (age_s >= 0.0).all() and (age_s < interval_s + 1e-9).all()
        scraped = was_s + (now_s - before_s) >= interval_s - 1e-9
        np.testing.assert_allclose(age_s[~scraped], (was_s + now_s - before_s)[~scraped], atol=1e-9)
        np.testing.assert_array_equal(now[SCRAPED][:, ~scraped], before[SCRAPED][:, ~scraped])
        grown += (~scraped).sum()
    assert grown > len(seen)


def test_own_counters_are_current(episode):
    """What the gateway counts itself follows from who was sent, started and ended by now."""
    worlds, seen = episode
    ended = worlds.fleet.requests[0, : int(worlds.desks["n_requests"][0])]
    never = np.where(np.isnan(ended["first_token_at_s"]), np.inf, ended["first_token_at_s"])
    for now_s, signals in seen:
        for r in range(signals.shape[1]):
            sent = (ended["replica"] == r) & (ended["dispatched_at_s"] < now_s)
            flying = sent & (ended["completed_at_s"] > now_s)
            started = flying & (never <= now_s)
            assert signals[v.IN_FLIGHT, r] == flying.sum()
            assert signals[v.DECODING, r] == started.sum()
            assert signals[v.PENDING_PREFILL_TOKENS, r] == ended["prompt_tokens"][flying & ~started].sum()


def test_streamed_tokens_are_counted_as_they_come(hand_env):
    """One token per 10 ms: at t the first answer has streamed t / 10 ms of them."""
    rows = [{"arrived_at_s": t, "output_tokens": 200} for t in (0.0, 0.055, 0.5005, 1.9995)]
    choices = [by_hand.ONE, by_hand.SHED, by_hand.SHED, by_hand.SHED]
    played = by_hand.Played(hand_env, by_hand.workload(hand_env.worlds.plant.scenario, *rows), choices)
    tokens = [view.signals[v.DECODING_TOKENS, by_hand.ONE] for view in played.views]
    assert tokens == [0, 100 + 5, 100 + 50, 100 + 199]
