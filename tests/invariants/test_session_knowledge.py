"""Sessions: a follow-up is a request like any other once it is there, and nothing of it shows before."""

import dataclasses

import by_hand
import numpy as np
import pytest

from envs import world_sessions as sessions
from envs.economics import ledger as books
from envs.workload.requests import Workload
from envs.worlds import FleetWorlds


@pytest.fixture(scope="module")
def worlds(tmp_path_factory):
    """Two pools that cache prefixes, an API with a cached price."""
    overrides = {
        "fleet.pools.one.prefix_caching": True,
        "fleet.pools.two.prefix_caching": True,
        "fleet.providers.api.cached_input_usd_per_mtok": 5.0,
        "requests_per_episode": 80,
    }
    return FleetWorlds(by_hand.scenario(tmp_path_factory.mktemp("sessions"), overrides), 1)


def preference(signal, n):
    """Which candidates a request prefers, the same in whatever row it stands: by its difficulty signal."""
    return np.random.default_rng(np.float64(signal).view(np.uint64)).random(n)


def play(worlds, episode):
    """Plays an episode; (now_s, View as bytes, rows that have not arrived) of every decision."""
    worlds.load(0, episode)
    worlds.set_in_flight_caps(None)
    seen = []
    while not worlds.done[0]:
        view, desk = worlds.view(), worlds.desks[0]
        bits = b"".join(np.ascontiguousarray(x).tobytes() for x in (view.signals, view.request, view.legal))
        ahead = np.flatnonzero(worlds.loads["arrival"][0, : episode.n_requests] != sessions.ARRIVED)
        seen.append((float(desk["now_s"]), bits, ahead))
        signal = episode.difficulty_signal[int(desk["current"])]
        worlds.step(np.array([np.where(worlds.legal[0], preference(signal, worlds.legal.shape[1]), -1.0).argmax()]))
    return seen


def as_roots(episode, worlds):
    """The requests that arrived, each at the time at which it did, following nobody."""
    arrived = np.flatnonzero(worlds.loads["arrival"][0, : episode.n_requests] == sessions.ARRIVED)
    rows = arrived[np.argsort(worlds.loads["arrived_at_s"][0, arrived], kind="stable")]
    lists = np.split(episode.prefix_hash, np.cumsum(episode.prefix_count)[:-1])
    changed = {name: getattr(episode, name)[rows] for name in Workload.array_names() if name != "prefix_hash"}
    changed |= {
        "arrived_at_s": worlds.loads["arrived_at_s"][0, rows].copy(),
        "parent_index": None,
        "think_s": None,
        "prefix_hash": np.concatenate([lists[i] for i in rows]),
    }
    return dataclasses.replace(episode, **changed)


@pytest.mark.parametrize("seed", range(4))
def test_a_session_is_worth_what_its_requests_would_be_at_the_same_times(worlds, seed):
    """Exact times: had the fleet run past an arrival, Views or money would differ."""
    episode = by_hand.as_sessions(worlds.plant.scenario.generate(seed), seed)
    shortest = np.minimum(episode.output_tokens, 16 - episode.prompt_tokens % 16)  # no answer fills a block
    episode = dataclasses.replace(episode, output_tokens=shortest)
    one = play(worlds, episode)
    ledger_usd, counts = worlds.ledger_usd.copy(), worlds.counts.copy()
    follow_ups = (worlds.loads["follows"][0, : episode.n_requests] == 1) & (
        worlds.loads["arrival"][0, : episode.n_requests] == sessions.ARRIVED
    )
    assert follow_ups.sum() >= 5
    other = play(worlds, as_roots(episode, worlds))
    assert [seen[:2] for seen in one] == [seen[:2] for seen in other]
    np.testing.assert_allclose(ledger_usd, worlds.ledger_usd, rtol=1e-12, atol=1e-12)
    same = [x for x in range(counts.shape[1]) if x not in (books.FIRST_CALLS, books.LOST_CALLS)]
    np.testing.assert_array_equal(counts[:, same], worlds.counts[:, same])


@pytest.mark.parametrize("seed", range(6))
def test_what_has_not_arrived_is_invisible(worlds, seed):
    """At any decision: everything hidden of later requests, when they come, and whether any come at all."""
    episode = by_hand.as_sessions(worlds.plant.scenario.generate(seed), seed)
    first, rng = play(worlds, episode), np.random.default_rng(seed)
    assert any(worlds.loads["follows"][0, : episode.n_requests])
    for d in rng.integers(0, len(first), 3):
        rows = first[d][2]
        hidden = {name: getattr(episode, name).copy() for name in Workload.hidden}
        hidden["output_tokens"][rows] = rng.integers(1, 400, len(rows))
        hidden["patience_s"][rows] = rng.choice([0.001, 1.0], len(rows))
        hidden["good"][rows] = 1 - hidden["good"][rows]
        hidden["p_good"][rows] = 1.0 - hidden["p_good"][rows]
        hidden["provider_noise"][rows] += 1.0
        for later_s in (0.7, 1e6):  # another time after this decision; never
            added_s = np.where(np.isin(np.arange(episode.n_requests), rows), later_s, 0.0)
            changed = dataclasses.replace(episode, **hidden | {"think_s": episode.think_s + added_s})
            second = play(worlds, changed)
            assert [seen[:2] for seen in second[: d + 1]] == [seen[:2] for seen in first[: d + 1]]


def test_the_property_above_is_about_something(worlds):
    """Cached prefixes are expected, and requests with other think times come at other times."""
    episode = by_hand.as_sessions(worlds.plant.scenario.generate(0), 0)
    first = play(worlds, episode)
    assert worlds.fleet.requests["cached_tokens"][0].any() and worlds.loads["cached_tokens"][0].any()
    second = play(worlds, dataclasses.replace(episode, think_s=episode.think_s + 1.0))
    assert [seen[0] for seen in first] != [seen[0] for seen in second]
