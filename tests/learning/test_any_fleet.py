"""One scorer for fleets of any size: the order of replicas does not matter, nor does their number."""

import copy

import by_hand
import numpy as np
import pytest
import torch

from agents.config import load_training
from agents.export import residual_policy
from agents.network import Scorer
from agents.train import fit_normaliser, make_model
from envs.plant import Plant
from envs.scenario import Scenario
from envs.vector_env import FleetVecEnv, default_advice
from envs.worlds import FleetWorlds
from marginroute import features
from marginroute import view as v
from marginroute.features import split
from marginroute.margin_rule import MarginRule
from marginroute.policy import ResidualPolicy


def specialists(replicas):
    """Weak answers chats and never code, strong the other way round, and the public prior thinks they are alike; so
    many replicas each, and traffic in proportion."""
    data = copy.deepcopy(by_hand.SCENARIO)
    fleet = data["fleet"]
    for tier, ability in (("weak", {"chat": 4.0, "code": -4.0}), ("strong", {"chat": -4.0, "code": 4.0})):
        fleet["tiers"][tier]["quality"] = {"slope": 0.0, "prior_ability": 0.0, "ability": ability}
    fleet["tiers"]["hosted"]["quality"] = {"slope": 0.0, "prior_ability": -4.0, "ability": {"chat": -4.0, "code": -4.0}}
    for pool in fleet["pools"].values():
        pool["replicas"] = replicas
    fleet["providers"] = {}
    del fleet["response_cache"], fleet["batch_queue"], data["plans"]["classes"]["night"]["delay_tolerant"]
    data["workload"]["recurring"] = {"share": 0.0, "prompts_per_tenant": 1, "zipf_exponent": 1.0}
    data["workload"]["arrivals"]["rate_per_s"] *= replicas
    data["requests_per_episode"] *= replicas
    return Plant(Scenario.model_validate({"name": "specialists", **data}))


@pytest.fixture(scope="module")
def trained():
    """A network trained on two replicas per tier, as the numpy runtime runs it."""
    settings = {"n_envs": 16, "rollout_steps": 32, "minibatch": 256, "width": 16, "learning_rate": 0.005}
    settings |= {"normaliser_episodes": 4, "temperature_share": 0.1, "steps": 20_480, "target_kl": None, "sees": "all"}
    plant, config = specialists(2), load_training(None, settings)
    torch.set_num_threads(1)
    advice = default_advice(plant)
    spec, scale_usd = fit_normaliser(plant, advice, config)
    model = make_model(FleetVecEnv(plant, 16, None, advice, spec, scale_usd, stagger=True), config, spec, 1, None)
    model.learn(config.steps)
    return residual_policy(model.policy, advice, spec)


def right_share(plant, policy):
    """Share of requests that go to the tier that can answer them."""
    worlds = FleetWorlds(plant, 2)
    worlds.load_all([plant.scenario.generate(seed, "validation") for seed in (5, 6)])
    right = decisions = 0
    while not worlds.done.any():
        view = worlds.view()
        choices = policy.decide_batch(view)
        right += (plant.layout.tier[choices] == view.request[v.TASK_INDEX]).sum()
        decisions += len(choices)
        worlds.step(choices)
    return right / decisions


@pytest.mark.parametrize("replicas", [1, 2, 4, 8])
def test_trained_on_four_replicas_right_on_two_to_sixteen(trained, replicas):
    plant = specialists(replicas)
    assert 0.3 < right_share(plant, trained.advice) < 0.7
    assert right_share(plant, trained) > 0.95


def test_the_order_of_replicas_does_not_matter(small_plant):
    """Permuted candidates get permuted logits, and the value of the state stays."""
    spec = features.feature_spec(small_plant.layout)
    torch.manual_seed(0)
    scorer = Scorer(spec, small_plant.layout.n_candidates, 16)
    torch.nn.init.normal_(scorer.head.weight)
    rng, c = np.random.default_rng(0), small_plant.layout.n_candidates
    observation = rng.standard_normal((5, spec.size(c))).astype(np.float32)
    split(observation, c, spec)[3][...] = rng.random((5, c)) < 0.8
    split(observation, c, spec)[3][:, -1] = 1.0
    order, permuted = rng.permutation(c), observation.copy()
    for part in (0, 2, 3):
        split(permuted, c, spec)[part][...] = split(observation, c, spec)[part][:, order]
    with torch.no_grad():
        ours, value = scorer(torch.as_tensor(observation))
        theirs, same = scorer(torch.as_tensor(permuted))
    np.testing.assert_allclose(theirs.numpy(), ours.numpy()[:, order], rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(same.numpy(), value.numpy(), rtol=1e-5, atol=1e-6)


def test_replicas_that_are_not_there_change_nothing(trained):
    """A view of two replicas per tier, and the same one among eight of which six may not be used."""
    small, large = specialists(2), specialists(8)
    worlds = FleetWorlds(small, 1)
    worlds.load_all([small.scenario.generate(0, "validation")])
    for _ in range(20):
        worlds.step(trained.decide_batch(worlds.view()))
    view = worlds.view()
    same = np.array([large.layout.names.index(name) for name in small.layout.names])
    shape = (len(v.SIGNALS), 1, large.layout.n_candidates)
    wide = v.View(large.layout, np.ones(shape), view.request, np.zeros(shape[1:], dtype=np.bool_))
    wide.signals[: v.N_STATIC_SIGNALS] = large.static_signals[:, None]
    wide.signals[v.UNDER_WAY_S] = 0.0  # nobody has the request yet
    wide.signals[..., same], wide.legal[..., same] = view.signals, view.legal
    for policy in (trained, trained.advice):
        assert isinstance(policy, ResidualPolicy | MarginRule)
        assert same[policy.decide_batch(view)] == policy.decide_batch(wide)
    ours, theirs = (trained.logits(trained.inputs(one)) for one in (view, wide))
    np.testing.assert_allclose(theirs[:, same], ours, rtol=1e-4, atol=1e-4)
