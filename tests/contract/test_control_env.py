"""`marginroute/Control-v0`: Gymnasium's checker, both clocks alike, rewards, levers, and release of held work."""

import warnings

import gymnasium
import numpy as np
import pytest
from gymnasium.utils.env_checker import check_env

from envs.control_env import ENV_ID, ControlEnv, ControlVectorEnv, make_worlds
from envs.control_plant import ControlPlant, counts_of, traffic_of
from envs.control_worlds import EngineControl
from envs.economics.ledger import ACCOUNTS, COUNTS
from envs.scenario import load_scenario
from envs.worlds import FleetWorlds
from marginroute import control
from marginroute.control import Levers
from marginroute.errors import InputError
from marginroute.rules import LeastInFlight

HOUR = {"horizon_s": 3600.0, "plans.classes.batch.delay_tolerant.deadline_s": 1800.0}


@pytest.fixture(scope="module")
def plant():
    return ControlPlant(load_scenario("day_night", HOUR))


def levers(layout, n, **changed):
    """Everything as at the start, nothing held back, spilled or shed."""
    k = len(layout.class_names)
    values = {
        "caps": np.tile(layout.slots, (n, 1)),
        "replicas": np.tile(layout.start_replicas, (n, 1)),
        "release_per_s": np.full(n, layout.top_per_s),
        "spill_share": np.zeros((n, k)),
        "shed_share": np.zeros((n, k)),
    }
    return Levers(**{**values, **changed})


def play(worlds, action):
    rewards = np.zeros(worlds.n_worlds)
    while not worlds.done.all():
        worlds.step(action)
        rewards += worlds.rewards_usd
    return rewards


def engine(plant, n=1, router=None):
    worlds = EngineControl(FleetWorlds(plant.plant, n), plant.layout, router)
    for w in range(n):
        worlds.load_seed(w, w, "train")
    return worlds


def fluid(plant, n=1):
    worlds = make_worlds(plant, n, "fluid")
    for w in range(n):
        worlds.load_seed(w, w, "train")
    return worlds


@pytest.mark.parametrize("clock", ["fluid", "engine"])
def test_gymnasium_checker_has_nothing_to_say(plant, clock):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check_env(gymnasium.make(ENV_ID, scenario=plant, clock=clock, render_mode="ansi").unwrapped)


def test_both_clocks_have_the_same_spaces_and_begin_alike(plant):
    one, other = ControlEnv(plant, "fluid"), ControlEnv(plant, "engine")
    assert one.observation_space == other.observation_space and one.action_space == other.action_space
    first, second = (env.reset(seed=3)[0] for env in (one, other))
    names = control.observation_names(plant.layout)
    assert len(names) == len(first)
    np.testing.assert_allclose(first, second, atol=0.05)  # the engine stands at its first arrival already


def test_rewards_add_up_to_the_ledger_on_both_clocks(plant):
    for worlds in (fluid(plant, 2), engine(plant, 2)):
        rewards = play(worlds, control.encode(plant.layout, levers(plant.layout, 2)))
        np.testing.assert_allclose(rewards, worlds.ledger_usd.sum(axis=(1, 2)), rtol=1e-9)


def test_the_surrogate_is_worth_what_the_engine_is(plant):
    action = control.encode(plant.layout, levers(plant.layout, 2))
    surrogate, exact = fluid(plant, 2), engine(plant, 2)
    np.testing.assert_allclose(play(surrogate, action), play(exact, action), rtol=0.02)
    for name in ("first_calls", "served"):
        row = COUNTS.index(name)
        np.testing.assert_allclose(surrogate.counts[:, row].sum(), exact.counts[:, row].sum(), rtol=1e-6)
    gpu = ACCOUNTS.index("gpu_hours")
    np.testing.assert_allclose(surrogate.ledger_usd[:, gpu].sum(), exact.ledger_usd[:, gpu].sum(), rtol=1e-9)


def test_vector_env_starts_ended_worlds_again(plant):
    env = gymnasium.make_vec(ENV_ID, num_envs=3, vectorization_mode="vector_entry_point", scenario=plant)
    assert isinstance(env.unwrapped, ControlVectorEnv)
    observation, info = env.reset(seed=4)
    assert env.observation_space.contains(observation) and info["action_mask"].shape == env.action_space.shape
    for _ in range(plant.ticks):
        observation, _, terminated, truncated, info = env.step(env.action_space.sample())
        assert env.observation_space.contains(observation) and not terminated.any()
    assert truncated.all() and info["_final_obs"].all() and (info["now_s"] == 0).all()
    assert info["final_info"]["ledger_usd"].shape[0] == 3


def test_scaling_takes_its_lag_on_both_clocks(plant):
    """Two more replicas are ordered at 0; they are on their way for 360 s and paid from the order on."""
    action = control.encode(plant.layout, levers(plant.layout, 1, replicas=np.array([[5.0]])))
    for worlds in (fluid(plant), engine(plant)):
        ready = []
        for _ in range(4):
            worlds.step(action)
            ready.append(worlds.view().pools[0, 0, [control.READY, control.STARTING]].tolist())
        assert ready == [[3.0, 2.0], [3.0, 2.0], [5.0, 0.0], [5.0, 0.0]]


def test_held_work_waits_for_the_release_and_is_out_when_due(plant):
    """Nothing is released: batch work waits until its deadline nears, on both clocks; then all of it goes out."""
    layout = plant.layout
    action = control.encode(layout, levers(layout, 1, release_per_s=np.zeros(1)))
    batch = layout.class_names.index("batch")
    held = []
    for worlds in (fluid(plant), engine(plant)):
        of_clock = []
        while worlds.tick[0] < plant.ticks - 1:
            worlds.step(action)
            of_clock.append(worlds.view().held[0, batch].sum())
        held.append(of_clock)
        play(worlds, action)
        arrived = worlds.counts[0, COUNTS.index("calls"), batch]
        assert worlds.counts[0, COUNTS.index("served"), batch] == pytest.approx(arrived)
        assert worlds.counts[0, COUNTS.index("deferred"), batch] == pytest.approx(arrived)
        assert -worlds.ledger_usd[0, ACCOUNTS.index("api_spend")].sum() > 0.0  # what is left at the horizon is bought
    np.testing.assert_allclose(held[0][:12], held[1][:12], atol=3.0)
    assert held[0][11] > 500.0 > 3.0 * np.diff(held[0])[-5:].max()  # it no longer grows once work is due


def test_the_release_rate_is_kept(plant):
    layout = plant.layout
    action = control.encode(layout, levers(layout, 1, release_per_s=np.array([0.25])))
    batch = layout.class_names.index("batch")
    for worlds in (fluid(plant), engine(plant)):
        for _ in range(10):
            worlds.step(action)
        out = worlds.counts[0, COUNTS.index("calls"), batch] - worlds.view().held[0, batch].sum()
        assert out == pytest.approx(0.25 * 1200.0, abs=3.0)


def test_shares_are_spilled_and_shed(plant):
    layout = plant.layout
    spill, shed = np.zeros((1, 3)), np.zeros((1, 3))
    spill[0, 0], shed[0, 1] = 0.1, 0.25
    action = control.encode(layout, levers(layout, 1, spill_share=spill, shed_share=shed))
    for router in (None, LeastInFlight("least-in-flight")):
        worlds = engine(plant, router=router)
        play(worlds, action)
        calls, lost = (worlds.counts[0, COUNTS.index(name)] for name in ("calls", "shed"))
        assert lost[1] / calls[1] == pytest.approx(0.25, abs=0.01) and lost[[0, 2]].sum() == 0
        sent = worlds.worlds.action_counts[0, 1]
        assert sent / calls[0] == pytest.approx(0.1, abs=0.01)


def test_a_router_under_the_levers_does_what_the_plain_gateway_does(plant):
    """With one pool, least in flight is the plain gateway's rule: the same ledger, held work included."""
    layout = plant.layout
    action = control.encode(layout, levers(layout, 1, release_per_s=np.array([0.3])))
    plain, routed = engine(plant), engine(plant, router=LeastInFlight("least-in-flight"))
    np.testing.assert_allclose(play(plain, action), play(routed, action), rtol=1e-9)
    np.testing.assert_array_equal(plain.counts, routed.counts)


def test_levers_that_a_scenario_lacks_are_masked():
    layout = ControlPlant(load_scenario("azure_conversation", {"fleet.batch_queue": None})).layout
    names = np.array(layout.lever_names)
    off = set(names[~layout.mask])
    assert "release" in off and {f"replicas:{name}" for name in layout.pool_names} <= off
    meant = control.decode(layout, np.ones((1, len(names))))
    assert np.isinf(meant.release_per_s).all() and (meant.replicas[0] == layout.start_replicas).all()


def test_encode_and_decode_are_inverse(plant):
    layout = plant.layout
    rng = np.random.default_rng(0)
    action = rng.uniform(-1.0, 1.0, (50, len(layout.lever_names)))
    meant = control.decode(layout, action)
    again = control.decode(layout, control.encode(layout, meant))
    for name in ("caps", "replicas", "release_per_s", "spill_share", "shed_share"):
        np.testing.assert_allclose(getattr(again, name), getattr(meant, name), rtol=1e-9, err_msg=name)


@pytest.mark.parametrize("scenario", ["day_night", "quickstart"])
def test_counts_are_those_of_the_requests(scenario):
    scenario = load_scenario(scenario, {"horizon_s": 1800.0})
    workload = scenario.generate(5, "validation")
    k = len(scenario.class_names)
    np.testing.assert_array_equal(
        traffic_of(scenario, 5, "validation", 60.0).arrivals,
        counts_of(workload.arrived_at_s, workload.class_index, workload.horizon_s, 60.0, k),
    )


def test_earlier_deadlines_come_back_first():
    """Two classes that may wait, with deadlines of 600 and 300 s: what is due first is offered first."""
    overrides = {
        "horizon_s": 900.0,
        "plans.classes.batch.delay_tolerant.deadline_s": 600.0,
        "plans.classes.team.delay_tolerant": {"deadline_s": 300.0},
        "plans.classes.team.slo": {},
    }
    scenario = load_scenario("day_night", overrides)
    plant = ControlPlant(scenario)
    worlds = engine(plant)
    worlds.step(control.encode(plant.layout, levers(plant.layout, 1, release_per_s=np.zeros(1))))
    desk, loads = worlds.worlds.desks[0], worlds.worlds.loads[0]
    due, i = [], int(desk["held_head"])
    while i >= 0:
        due.append(float(loads["offer_at_s"][i]))
        i = int(loads["next_held"][i])
    assert len(due) > 100 and due == sorted(due)
    assert len(set(loads["class_index"][loads["offer_at_s"] > 0.0])) == 2


def test_bad_input_is_one_sentence(plant):
    with pytest.raises(InputError, match="legal is fluid, engine"):
        make_worlds(plant, 1, "wall")
    with pytest.raises(InputError, match="legal is a number above 0"):
        make_worlds(plant.plant.scenario, 1, "fluid", tick_s=0.0)
    with pytest.raises(InputError, match="render_mode"):
        ControlEnv(plant, render_mode="human")
