"""Networks of the router that no training made."""

import torch

from agents.train import fit_normaliser, make_model
from envs.vector_env import FleetVecEnv


def random_scorer(plant, config, advice, seed):
    """A policy object whose weights are as far from their start as training takes them, and its feature spec."""
    spec, _ = fit_normaliser(plant, advice, config)
    env = FleetVecEnv(plant, config.n_envs, advice=advice, spec=spec)
    policy = make_model(env, config, spec, seed, tensorboard=None).policy
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in policy.scorer.parameters():
            parameter += 0.3 * torch.randn(parameter.shape, generator=generator)
        policy.scorer.trust[:] = torch.tensor([0.8, 0.5])
    return policy, spec
