"""The compiled scorer against the same few lines of torch: values, and gradients as torch's autograd finds them."""

import numpy as np
import pytest
import torch

from agents.fused import choose
from agents.network import Scorer
from marginroute.features import TIER_CONFIDENCE, feature_spec, split

B = 300  # several pieces, the last one not full


def plain(scorer, observation):
    """Log-probabilities and values, in torch."""
    candidate, context, advice, legal = split(observation, scorer.n_candidates, scorer.spec)
    pooled = (candidate * legal.unsqueeze(-1)).sum(-2) / legal.sum(-1, keepdim=True)
    x = (candidate - scorer.candidate_mean) / scorer.candidate_std
    y = (context - scorer.context_mean) / scorer.context_std
    state = torch.cat([(pooled - scorer.candidate_mean) / scorer.candidate_std, y], dim=-1)
    h = torch.relu(scorer.candidate(x) + scorer.context(y).unsqueeze(-2))
    trust = scorer.trust[0] + scorer.trust[1] * candidate[..., TIER_CONFIDENCE]
    logits = scorer.kappa * advice + trust * scorer.head(torch.relu(scorer.hidden(h))).squeeze(-1)
    logits = torch.where(legal > 0.5, logits, torch.full_like(logits, -1e9))
    return torch.log_softmax(logits, dim=-1), scorer.value(state).squeeze(-1)


@pytest.fixture(scope="module", params=[(32, 0), (8, 1)], ids=["width 32", "width 8"])
def case(request, small_plant):
    """A scorer far from its start with a normaliser, and observations with some candidates illegal."""
    width, seed = request.param
    generator = torch.Generator().manual_seed(seed)
    layout = small_plant.layout
    spec = feature_spec(layout)
    rng = np.random.default_rng(seed)
    spec = spec.with_normaliser(rng.normal(0.3, 2.0, (50, 7, spec.n_candidate)), rng.normal(0, 1, (50, spec.n_context)))
    scorer = Scorer(spec, layout.n_candidates, width)
    scorer.trust[:] = torch.tensor([0.4, 0.7])
    with torch.no_grad():
        for parameter in scorer.parameters():
            parameter += 0.3 * torch.randn(parameter.shape, generator=generator)
    observation = torch.randn(B, spec.size(layout.n_candidates), generator=generator)
    legal = (torch.rand(B, layout.n_candidates, generator=generator) < 0.6).float()
    legal[:, -1] = 1.0
    observation[:, -layout.n_candidates :] = legal
    return scorer, observation


def loss(function, observation, n):
    """Something like PPO's loss: log-probabilities of choices, entropy, and the critic's error."""
    log_probs, value = function(observation[:n])
    generator = torch.Generator().manual_seed(5)
    weight, target = torch.randn(n, generator=generator), torch.randn(n, generator=generator)
    entropy = -(log_probs.exp() * log_probs).sum(-1)
    return (log_probs[:, -1] * weight).mean() - 0.1 * entropy.mean() + ((value - target) ** 2).mean()


def gradients(scorer, function, observation, n):
    scorer.zero_grad()
    loss(function, observation, n).backward()
    return {name: parameter.grad.clone() for name, parameter in scorer.named_parameters()}


def test_values_agree(case):
    scorer, observation = case
    with torch.no_grad():
        for found, wanted in zip(scorer(observation), plain(scorer, observation), strict=True):
            torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("n", [B, 1])
def test_gradients_agree(case, n):
    scorer, observation = case
    wanted = gradients(scorer, lambda x: plain(scorer, x), observation, n)
    found = gradients(scorer, scorer, observation, n)
    for name, gradient in wanted.items():
        assert gradient.abs().max() > 0.0, name
        torch.testing.assert_close(found[name], gradient, rtol=1e-5, atol=1e-5)


def test_a_forward_pass_in_between_spoils_nothing(case):
    scorer, observation = case
    wanted = gradients(scorer, scorer, observation, B)
    scorer.zero_grad()
    pending = loss(scorer, observation, B)
    scorer.run(observation[:7])
    with torch.no_grad():
        scorer(observation[7:50])
    pending.backward()
    for name, parameter in scorer.named_parameters():
        torch.testing.assert_close(parameter.grad, wanted[name], rtol=0.0, atol=0.0)


def test_kept_weights_follow_the_optimiser(case):
    scorer, observation = case
    optimiser = torch.optim.Adam(scorer.parameters(), lr=0.01)
    before = scorer.run(observation)[1]
    gradients(scorer, scorer, observation, B)
    optimiser.step()
    with torch.no_grad():
        wanted = plain(scorer, observation)[1].numpy()
    found = scorer.run(observation)[1]
    assert np.abs(found - before).max() > 1e-3
    np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-5)


def test_choose_takes_the_most_probable_without_noise_and_never_an_illegal_one():
    log_probs = np.log(np.array([[0.2, 0.5, 0.3], [0.6, 0.4, 1e-30]], dtype=np.float32))
    actions, chosen = np.empty(2, dtype=np.int64), np.empty(2, dtype=np.float32)
    choose(log_probs, np.ones((2, 3), dtype=np.float32), actions, chosen)
    assert actions.tolist() == [1, 0]
    assert chosen == pytest.approx(np.log([0.5, 0.6]), rel=1e-5)
    log_probs[:, 1] = -1e9
    choose(log_probs, np.full((2, 3), [9.0, 1e-30, 9.0], dtype=np.float32), actions, chosen)
    assert actions.tolist() == [2, 0]
