"""A two-armed queue with a known optimum: of two equal servers the one with the shorter queue (Winston, JAP 1977)."""

import copy

import by_hand
import pytest
import torch

from agents.config import load_training
from agents.export import residual_policy
from agents.objective import margins
from agents.train import fit_normaliser, make_model
from envs.plant import Plant
from envs.scenario import Scenario
from envs.vector_env import FleetVecEnv, default_advice
from envs.worlds import FleetWorlds
from marginroute import view as v
from marginroute.rules import LeastInFlight, Random


@pytest.fixture(scope="module")
def plant():
    """Two replicas of one model that serve one request at a time in a second, 1.3 requests/s, and an SLO of TTFT."""
    data = copy.deepcopy(by_hand.SCENARIO)
    fleet, plans = data["fleet"], data["plans"]
    del fleet["pools"]["one"], fleet["response_cache"], fleet["batch_queue"]
    fleet["providers"] = {}
    fleet["pools"]["two"] |= {"max_num_seqs": 1}
    plans["plans"] = {"metered": {"kind": "usage", "input_usd_per_mtok": 30.0, "output_usd_per_mtok": 300.0}}
    slo = {"ttft_s": 0.5, "ttft_credit_share": 1.0}
    plans["classes"] = {"metered": {"plan": "metered", "slo": slo, "remedies": {"unserved_credit_share": 1.0}}}
    data["workload"] |= {
        "arrivals": {"kind": "gamma", "rate_per_s": 1.3, "gap_cv": 1.0},
        "class_share": {"metered": 1.0},
        "recurring": {"share": 0.0, "prompts_per_tenant": 1, "zipf_exponent": 1.0},
        "output_tokens": {"components": [{"weight": 1.0, "median_tokens": 100, "sigma": 1e-4}], "max_tokens": 400},
    }
    return Plant(Scenario.model_validate({"name": "two queues", **data, "requests_per_episode": 78}))


@pytest.fixture(scope="module")
def learned(plant):
    """A network that starts from nothing: no advice, every candidate as likely as any other."""
    settings = {"n_envs": 16, "rollout_steps": 32, "minibatch": 256, "width": 16, "learning_rate": 0.005}
    settings |= {
        "steps": 24_576,
        "residual": False,
        "normaliser_episodes": 4,
        "target_kl": None,
        "tau_s": 0.0,
        "taught_share": 0.0,
    }
    config = load_training(None, settings)
    torch.set_num_threads(1)
    advice = default_advice(plant)
    spec, scale_usd = fit_normaliser(plant, advice, config)
    env = FleetVecEnv(plant, 16, None, advice, spec, scale_usd, stagger=True)
    model = make_model(env, config, spec, 0, None)
    uniform = model.policy.scorer(torch.as_tensor(env.reset()))[0].exp().detach().numpy()
    assert uniform == pytest.approx(env.action_masks() / env.action_masks().sum(axis=1, keepdims=True), abs=1e-6)
    model.learn(config.steps)
    assert float(model.policy.scorer.kappa) == 0.0
    return residual_policy(model.policy, advice, spec)


def played(plant, policy):
    """Margin per 1k, and the share of decisions between unequal queues that take the shorter one."""
    worlds = FleetWorlds(plant, 16)
    worlds.load_all([plant.scenario.generate(seed, "validation") for seed in range(16)])
    shorter = unequal = 0
    while not worlds.done.all():
        view = worlds.view()
        choices = policy.decide_batch(view)
        queue = view.signals[v.IN_FLIGHT][:, :2]
        differ = (queue[:, 0] != queue[:, 1]) & ~worlds.done
        unequal += differ.sum()
        shorter += (choices == queue.argmin(axis=1))[differ].sum()
        worlds.step(choices)
    return float(margins(worlds).mean()), shorter / unequal


def test_learns_to_join_the_shorter_queue(plant, learned):
    best_usd, always = played(plant, LeastInFlight("least-in-flight"))
    blind_usd, half = played(plant, Random("random"))
    usd, share = played(plant, learned)
    assert always == 1.0 and half == pytest.approx(0.5, abs=0.1)
    assert share > 0.97
    assert usd > best_usd - 0.1 * (best_usd - blind_usd) and best_usd > blind_usd
