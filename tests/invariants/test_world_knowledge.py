"""Knowledge boundary: hidden truths do not touch the View by a bit before something observable happened."""

import dataclasses

import by_hand
import numpy as np
import pytest
from by_hand import API, ONE, workload
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from envs.economics.ledger import COUNTS
from envs.scenario import load_scenario
from envs.vector_env import ObservedWorlds
from envs.workload.requests import Workload
from envs.worlds import FleetWorlds


def play(worlds, episode, choose):
    """Plays an episode; (now_s, View as bytes, undecided requests) of every decision."""
    worlds.load(0, episode)
    worlds.set_in_flight_caps(None)
    seen = []
    while not worlds.done[0]:
        view = worlds.view()
        desk = worlds.desks[0]
        undecided, held = {int(desk["current"]), *range(int(desk["cursor"]), episode.n_requests)}, desk["held_head"]
        while held >= 0:
            undecided.add(int(held))
            held = worlds.loads["next_held"][0, held]
        bits = b"".join(np.ascontiguousarray(x).tobytes() for x in (view.signals, view.request, view.legal))
        seen.append((float(desk["now_s"]), bits, undecided))
        worlds.step(np.array([choose(len(seen) - 1, worlds.legal[0])]))
    return seen


def other_truths(episode, rows, rng):
    """The episode with every hidden field of the given requests drawn anew."""
    m, tiers = episode.p_good.shape
    drawn = {
        "output_tokens": rng.integers(1, 400, m),
        "patience_s": rng.choice([0.001, 1.0, np.inf], m),
        "p_good": rng.random((m, tiers)),
        "good": rng.integers(0, 2, (m, tiers)),
        "provider_noise": rng.standard_normal((m, 2)),
        "think_s": rng.random(m),
        "needed_similarity": rng.random(m),
        "valid_for_s": rng.choice([0.1, 5.0, np.inf], m),
        "judged": rng.integers(0, 2, m),
        "task_calls": rng.integers(1, 9, m),
        "tool_key": rng.integers(-1, 3, m),
        "tool_usd": rng.random(m),
        "attempt_luck": rng.random(episode.attempt_luck.shape),
        "ability_shift": rng.standard_normal(episode.ability_shift.shape),
    }
    assert set(drawn) == set(Workload.hidden)
    changed = {}
    for name, values in drawn.items():
        changed[name] = getattr(episode, name).copy()
        changed[name][rows] = values[rows]
    return dataclasses.replace(episode, **changed)


@pytest.fixture(scope="module")
def worlds(small_plant):
    return FleetWorlds(small_plant, 1)


NEAR = {
    "horizon_s": 20.0,
    "requests_per_episode": 100,
    "workload.recurring.share": 0.0,
    "workload.intents": {"share": 0.9, "per_tenant": 3, "spread": 0.3},
    "fleet.response_cache.semantic": {"embed_s": 0.02, "embed_usd_per_mtok": 0.02},
}


def test_what_reuse_needs_is_never_visible():
    """The similarity that requests need and the age they bear: the Views of the whole episode stay the same."""
    worlds = FleetWorlds(load_scenario("quickstart", NEAR), 1)
    episode = worlds.plant.scenario.generate(1, "train")
    changed = dataclasses.replace(
        episode, needed_similarity=1.0 - episode.needed_similarity, valid_for_s=np.full(episode.n_requests, 1.0)
    )
    cache = worlds.plant.layout.names.index("cache")
    first, second = (
        play(worlds, x, lambda step, legal: cache if legal[cache] and step % 2 else step % 3)
        for x in (episode, changed)
    )
    assert [seen[:2] for seen in first] == [seen[:2] for seen in second]
    assert worlds.action_counts[0, 2] > 5  # answers from the cache
    assert worlds.counts[0, COUNTS.index("wrong_hits")].sum() > 0


@settings(max_examples=30, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(seed=st.integers(0, 100), at=st.floats(0.0, 1.0), policy=st.integers(0, 100))
def test_truths_of_undecided_requests_are_invisible(worlds, small_scenario, seed, at, policy):
    """At decision d, change every hidden field of the current, the held and all future requests."""
    episode = small_scenario.generate(seed, "train")
    preference = np.random.default_rng(policy).random((10_000, len(worlds.plant.layout.names)))

    def choose(step, legal):
        return int(np.where(legal, preference[step], -1.0).argmax())

    first = play(worlds, episode, choose)
    d = int(at * (len(first) - 1))
    rows = sorted(first[d][2])
    second = play(worlds, other_truths(episode, rows, np.random.default_rng(seed + 1)), choose)
    assert [seen[:2] for seen in second[: d + 1]] == [seen[:2] for seen in first[: d + 1]]


def test_the_property_above_can_fail(worlds, small_scenario):
    """The same change shows up in later Views, once answers have come back."""
    episode = small_scenario.generate(0, "train")
    changed = other_truths(episode, np.arange(episode.n_requests), np.random.default_rng(1))
    first, second = (play(worlds, x, lambda step, legal: step % 3) for x in (episode, changed))
    assert [seen[1] for seen in first] != [seen[1] for seen in second]


FAULTS = {
    "horizon_s": 20.0,
    "requests_per_episode": 100,
    "fleet.pools.small.faults": {"mean_time_between_s": 4.0, "mean_repair_s": 1.0, "slow_mean_time_between_s": 5.0},
    "fleet.providers.api.faults": {"mean_time_between_s": 5.0, "mean_repair_s": 1.0, "slow_mean_time_between_s": 5.0},
    "fleet.pools.small.detect_s": 0.5,
}


@pytest.fixture(scope="module", params=[True, False])
def shaky(request):
    overrides = FAULTS | {"fleet.pools.small.connection_errors": request.param}
    return FleetWorlds(load_scenario("quickstart", overrides), 1)


@pytest.mark.parametrize("seed", range(6))
def test_faults_of_the_future_are_invisible(shaky, seed):
    """Cut the list of faults off at some decision: everything up to that decision stays as it was, to the bit."""
    scenario = shaky.plant.scenario
    episode = scenario.generate(seed, "train")
    assert len(episode.faults) > 0
    preference = np.random.default_rng(seed).random((10_000, len(shaky.plant.layout.names)))

    def choose(step, legal):
        return int(np.where(legal, preference[step], -1.0).argmax())

    first = play(shaky, episode, choose)
    for share in (0.2, 0.7):
        d = int(share * (len(first) - 1))
        past = episode.faults[episode.faults["starts_at_s"] <= first[d][0]]
        second = play(shaky, dataclasses.replace(episode, faults=past), choose)
        assert [seen[:2] for seen in second[: d + 1]] == [seen[:2] for seen in first[: d + 1]]
    assert [seen[1] for seen in second] != [seen[1] for seen in first]


def test_who_answers_well_is_never_visible(worlds, small_scenario):
    """P(good) and outcomes of past, present and future: where nobody judges, the Views of the whole episode stay."""
    episode = small_scenario.generate(2, "train")
    episode = dataclasses.replace(episode, judged=np.zeros_like(episode.judged))
    changed = dataclasses.replace(episode, p_good=1.0 - episode.p_good, good=1 - episode.good)
    rng = np.random.default_rng(0).random((10_000, len(worlds.plant.layout.names)))
    first, second = (
        play(worlds, x, lambda step, legal: int(np.where(legal, rng[step], -1.0).argmax())) for x in (episode, changed)
    )
    assert [seen[:2] for seen in first] == [seen[:2] for seen in second]
    assert len(first) >= episode.n_requests


def test_observations_know_no_more_than_the_view(small_plant):
    """Hidden P(good) reaches the learner's signal and nothing else."""
    episode = small_plant.scenario.generate(2, "train")
    changed = dataclasses.replace(episode, p_good=1.0 - episode.p_good, good=1 - episode.good)
    one, other = (ObservedWorlds(small_plant, 1, None, None) for _ in range(2))
    one.load(0, episode)
    other.load(0, changed)
    np.testing.assert_array_equal(one.observe(), other.observe())
    choice = np.array([0])
    assert one.signal_usd(choice) != other.signal_usd(choice)


SENT = {"arrived_at_s": 0.0}
CLOCK = [{"arrived_at_s": 0.1 * step + 0.005} for step in range(1, 40)]  # requests that only make Views


@pytest.mark.parametrize(
    ("choice", "one", "other", "first_event_s"),
    [
        # 100 and 300 tokens at 10 ms: the View differs from the first completion on, at 1.00 s
        (ONE, {"output_tokens": 100}, {"output_tokens": 300}, 1.00),
        # 0.5 s and 20 ms for 51 tokens: complete at 1.5 s; one sigma slower changes nothing before
        (API, {"output_tokens": 51}, {"output_tokens": 51, "provider_noise": [1.0, 0.0]}, 1.5),
        # the API answers at 0.5 s, the user leaves at 0.3 s
        (API, {"patience_s": np.inf, "output_tokens": 51}, {"patience_s": 0.3, "output_tokens": 51}, 0.3),
    ],
)
def test_a_request_in_flight_shows_when_it_ends(tmp_path, choice, one, other, first_event_s):
    scenario = by_hand.scenario(tmp_path, {"fleet.providers.api.ttft_sigma": 0.5})
    shed = len(by_hand.SCENARIO["fleet"]["pools"]) + 4  # the rest is shed
    worlds = FleetWorlds(scenario, 1)
    views = [
        play(worlds, workload(scenario, SENT | truth, *CLOCK), lambda step, legal: choice if step == 0 else shed)
        for truth in (one, other)
    ]
    same = [first[1] == second[1] for first, second in zip(*views, strict=True)]
    now_s = np.array([seen[0] for seen in views[0]])
    assert same[: int((now_s < first_event_s).sum())] == [True] * int((now_s < first_event_s).sum())
    assert not same[int((now_s < first_event_s).sum())]
