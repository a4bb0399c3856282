"""What ships is what was trained: the numpy runtime gives torch's logits, and the same choice in every state."""

import numpy as np
import pytest
import torch
from scorers import random_scorer

from agents.export import residual_policy, sample_observations, torch_logits
from envs.vector_env import ObservedWorlds
from marginroute import features
from marginroute.bundle import PARITY_TOLERANCE, parity_logits
from marginroute.decision import best_legal
from marginroute.margin_rule import MarginParameters, MarginRule


@pytest.fixture(scope="module")
def advice(small_plant):
    stations = len(small_plant.layout.station_names)
    return MarginRule("bid-price", MarginParameters((0.002,) * stations, 1.5, 1.2, 1.1, 3.0, 0.95, 0.2))


@pytest.fixture(scope="module", params=range(4))
def pair(request, small_plant, tiny_config, advice):
    """(torch policy, numpy policy) with the same weights."""
    policy, spec = random_scorer(small_plant, tiny_config, advice, request.param)
    return policy, residual_policy(policy, advice, spec)


def test_logits_agree_to_the_stated_tolerance(pair, small_plant):
    ours, theirs = pair
    observation = sample_observations(small_plant, theirs.advice, theirs.spec, 400)
    wanted, found = torch_logits(ours, observation), parity_logits(theirs, observation)
    legal = np.isfinite(found)
    assert legal.sum() > 1000 and not legal.all()
    assert np.abs(wanted - found)[legal].max() <= PARITY_TOLERANCE == 1e-5
    assert (wanted[~legal] < -1e8).all()
    np.testing.assert_array_equal(wanted.argmax(axis=1), found.argmax(axis=1))
    assert np.abs(wanted - wanted[:, :1])[legal].max() > 1.0  # the network says something


def test_the_gateways_path_chooses_as_torch_does(pair, small_plant):
    """From View to choice without a flat observation in between, batch and single, along an episode of its own."""
    ours, theirs = pair
    worlds = ObservedWorlds(small_plant, 3, theirs.advice, theirs.spec)
    worlds.load_all([small_plant.scenario.generate(seed, "validation") for seed in range(3)])
    moved = steps = 0
    while not worlds.done.any():
        observation, view = worlds.observe(), worlds.view()
        with torch.no_grad():
            actions, _, log_probs = ours(torch.as_tensor(observation), deterministic=True)
        choices = theirs.decide_batch(view)
        np.testing.assert_array_equal(choices, actions.numpy())
        assert [theirs.decide(view[w]).candidate for w in range(3)] == choices.tolist()
        logits = np.where(view.legal, theirs.logits(theirs.inputs(view)), -np.inf)
        log_softmax = logits - np.log(np.exp(logits - logits.max(axis=1, keepdims=True)).sum(axis=1, keepdims=True))
        log_softmax -= logits.max(axis=1, keepdims=True)
        np.testing.assert_allclose(log_softmax[np.arange(3), choices], log_probs.numpy(), atol=1e-4)
        moved += (choices != best_legal(theirs.advice.assess(view).score_usd, view.legal)).sum()
        worlds.step(choices)
        steps += 1
    assert moved > steps / 10  # these weights do not just repeat the advice


def test_illegal_candidates_are_never_drawn(pair, small_plant):
    ours, theirs = pair
    observation = sample_observations(small_plant, theirs.advice, theirs.spec, 400)
    *_, legal = features.split(observation, small_plant.layout.n_candidates, theirs.spec)
    torch.manual_seed(0)
    with torch.no_grad():
        actions, _, log_probs = ours(torch.as_tensor(observation))
        values, again, entropy = ours.evaluate_actions(torch.as_tensor(observation), actions)
        np.testing.assert_array_equal(values.numpy(), ours.predict_values(torch.as_tensor(observation)).numpy())
    assert (legal[np.arange(len(legal)), actions.numpy()] == 1.0).all()
    np.testing.assert_allclose(log_probs.numpy(), again.detach().numpy(), rtol=1e-5, atol=1e-6)
    assert (entropy >= 0.0).all() and torch.isfinite(entropy).all()


def test_draws_follow_the_probabilities(pair, small_plant):
    """Gumbel-max draws as often as the softmax says."""
    ours, theirs = pair
    observation = torch.as_tensor(sample_observations(small_plant, theirs.advice, theirs.spec, 8))
    log_probs, _ = ours.scorer(observation)
    busiest = int((log_probs.exp() * log_probs).sum(-1).argmin())  # the least certain state
    many = observation[busiest : busiest + 1].repeat(20_000, 1)
    torch.manual_seed(1)
    with torch.no_grad():
        drawn = np.bincount(ours(many)[0].numpy(), minlength=log_probs.shape[1]) / 20_000
    np.testing.assert_allclose(drawn, log_probs[busiest].exp().detach().numpy(), atol=0.015)


def test_values_do_not_depend_on_illegal_candidates(pair, small_plant):
    """Whatever stands in the rows of illegal candidates, probabilities and value stay the same."""
    ours, theirs = pair
    observation = sample_observations(small_plant, theirs.advice, theirs.spec, 50)
    c, f = small_plant.layout.n_candidates, theirs.spec.n_candidate
    *_, legal = features.split(observation, c, theirs.spec)
    changed = observation.copy()
    rows = changed[:, : c * f].reshape(len(changed), c, f)
    rows[legal < 0.5] = 7.0
    with torch.no_grad():
        first, second = (ours.scorer(torch.as_tensor(x)) for x in (observation, changed))
    np.testing.assert_allclose(first[1].numpy(), second[1].numpy(), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(first[0].numpy()[legal > 0.5], second[0].numpy()[legal > 0.5], atol=1e-5)
