"""MarginPPO: advantages on paper, the advice as its starting point, and tiny problems with a known optimum."""

import copy

import by_hand
import numpy as np
import pytest
import torch
from gymnasium import spaces
from stable_baselines3 import PPO

from agents.config import load_training
from agents.export import residual_policy
from agents.ppo import ElapsedRolloutBuffer, MarginPPO, taught_loss
from agents.train import fit_normaliser, make_model
from envs.plant import Plant
from envs.scenario import Scenario
from envs.vector_env import FleetVecEnv, default_advice
from envs.worlds import FleetWorlds
from marginroute import view as v


def buffer(signals, values, discounts, starts, gae_lambda):
    """A rollout of one world with the given numbers."""
    made = ElapsedRolloutBuffer(
        len(signals), spaces.Box(-1, 1, (1,)), spaces.Discrete(2), device="cpu", gae_lambda=gae_lambda, n_envs=1
    )
    made.reset()
    for signal, value, discount, start in zip(signals, values, discounts, starts, strict=True):
        one = (np.array([x], dtype=np.float32) for x in (signal, start, value, 0.0, discount))
        signal, start, value, log_prob, discount = one
        made.add_step(np.zeros((1, 1)), np.zeros(1), signal, start, value, log_prob, discount)
    return made


def test_advantages_by_hand():
    """Two steps of one episode, then one of the next; lambda 0.5, another discount at each step."""
    made = buffer([1.0, 2.0, 4.0], [0.5, 0.25, 0.125], [0.9, 0.8, 0.7], [1, 0, 1], gae_lambda=0.5)
    made.compute_returns_and_advantage(torch.tensor([10.0]), dones=np.array([False]))
    third = 4.0 + 0.7 * 10.0 - 0.125
    second = 2.0 - 0.25  # the episode ended: neither the next value nor the next advantage counts
    first = 1.0 + 0.9 * 0.25 - 0.5 + 0.9 * 0.5 * second
    assert made.advantages[:, 0] == pytest.approx([first, second, third])
    assert made.returns[:, 0] == pytest.approx([first + 0.5, second + 0.25, third + 0.125])


def test_an_episode_that_ends_with_the_rollout_takes_no_value_from_the_next():
    made = buffer([1.0], [0.5], [0.9], [0], gae_lambda=0.9)
    made.compute_returns_and_advantage(torch.tensor([100.0]), dones=np.array([True]))
    assert made.advantages[0, 0] == pytest.approx(0.5)


def test_with_lambda_one_returns_are_discounted_sums():
    discounts = [np.exp(-dt / 5.0) for dt in (1.0, 0.2, 3.0)]
    made = buffer([1.0, 2.0, 3.0], [7.0, 8.0, 9.0], discounts, [0, 0, 0], gae_lambda=1.0)
    made.compute_returns_and_advantage(torch.tensor([0.0]), dones=np.array([True]))
    wanted = 1.0 + discounts[0] * (2.0 + discounts[1] * 3.0)
    assert made.returns[0, 0] == pytest.approx(wanted, rel=1e-5)


def test_discount_is_by_elapsed_time(small_plant, tiny_config):
    env = FleetVecEnv(small_plant, tiny_config.n_envs)
    spec, _ = fit_normaliser(small_plant, env.worlds.advice, tiny_config)
    model = make_model(env, tiny_config, spec, seed=0, tensorboard=None)
    assert isinstance(model, MarginPPO) and model.tau_s == tiny_config.tau_s
    model.tau_s = 5.0
    assert model.discount(np.array([0.0, 5.0, 10.0])) == pytest.approx([1.0, np.exp(-1.0), np.exp(-2.0)])
    model.tau_s = 0.0
    assert model.discount(np.array([0.0, 5.0])).tolist() == [0.0, 0.0]


def views(plant, seeds=(0, 1), split="validation"):
    """Views along episodes played at random, and the worlds that show them."""
    worlds = FleetWorlds(plant, len(seeds))
    worlds.load_all([plant.scenario.generate(seed, split) for seed in seeds])
    rng = np.random.default_rng(0)
    while not worlds.done.any():
        yield worlds.view()
        worlds.step(np.where(worlds.legal, rng.random(worlds.legal.shape), -1.0).argmax(axis=1))


def test_untrained_policy_is_the_advice(small_plant, tiny_config):
    """The head is zero: same argmax in every state, and probabilities are the advice's softmax."""
    advice = default_advice(small_plant)
    spec, scale_usd = fit_normaliser(small_plant, advice, tiny_config)
    assert scale_usd > 0.0
    env = FleetVecEnv(small_plant, tiny_config.n_envs, advice=advice, spec=spec)
    model = make_model(env, tiny_config, spec, seed=3, tensorboard=None)
    untrained = residual_policy(model.policy, advice, spec)
    states = 0
    for view in views(small_plant):
        np.testing.assert_array_equal(untrained.decide_batch(view), advice.decide_batch(view))
        states += len(view.legal)
    assert states >= 200
    observation = env.reset()
    done = False
    while not done:
        choices, _ = model.predict(observation, deterministic=True)
        np.testing.assert_array_equal(choices, advice.decide_batch(env.worlds.view()))
        observation, _, dones, _ = env.step(choices)
        done = dones.any()


def test_normaliser_is_that_of_training_states(small_plant, tiny_config):
    """Normalised training features have mean 0 and deviation 1, but for constant or nearly constant columns."""
    advice = default_advice(small_plant)
    spec, _ = fit_normaliser(small_plant, advice, tiny_config)
    rng = np.random.default_rng(0)
    candidate = rng.normal(3.0, 2.0, (50, 7, spec.n_candidate))
    context = rng.normal(-1.0, 0.5, (50, spec.n_context))
    candidate[..., 0], context[:, 0] = 0.1, 0.25 + 1e-4 * context[:, 0]
    fitted = spec.with_normaliser(candidate, context)
    x = (candidate - fitted.candidate_mean) / fitted.candidate_std
    assert x[..., 1:].mean(axis=(0, 1)) == pytest.approx(0.0, abs=1e-12)
    assert x[..., 1:].std(axis=(0, 1)) == pytest.approx(1.0)
    assert x[..., 0] == pytest.approx(0.0) and fitted.candidate_std[0] == 1.0
    assert np.abs((context - fitted.context_mean) / fitted.context_std)[:, 0].max() < 0.1  # not blown up


def two_specialists(learnable):
    """Weak answers chats and never code, strong the other way round; the public prior thinks they are alike.

    The advice therefore takes the cheaper of the two for everything. Nothing can be answered from a cache, deferred or
    bought; the task is in the View.
    """
    data = copy.deepcopy(by_hand.SCENARIO)
    fleet = data["fleet"]
    for tier, ability in (("weak", {"chat": 4.0, "code": -4.0}), ("strong", {"chat": -4.0, "code": 4.0})):
        fleet["tiers"][tier]["quality"] = {"slope": 0.0, "prior_ability": 0.0, "ability": ability}
        if not learnable:
            fleet["tiers"][tier]["quality"]["ability"] = {"chat": 0.0, "code": 0.0}
    fleet["tiers"]["hosted"]["quality"] = {"slope": 0.0, "prior_ability": -4.0, "ability": {"chat": -4.0, "code": -4.0}}
    fleet["pools"]["two"]["replicas"] = 1
    fleet["providers"] = {}
    del fleet["response_cache"], fleet["batch_queue"], data["plans"]["classes"]["night"]["delay_tolerant"]
    data["workload"]["recurring"] = {"share": 0.0, "prompts_per_tenant": 1, "zipf_exponent": 1.0}
    return Scenario.model_validate({"name": "two specialists", **data})


def trained(plant, steps, **training):
    """An advice and the policy that MarginPPO makes of it."""
    settings = {"n_envs": 16, "rollout_steps": 32, "minibatch": 256, "epochs": 4, "width": 16, "learning_rate": 0.01}
    settings |= {
        "normaliser_episodes": 4,
        "temperature_share": 0.1,
        "steps": steps,
        "target_kl": None,
        "sees": "all",
    } | training
    config = load_training(None, settings)
    torch.set_num_threads(1)
    advice = default_advice(plant)
    spec, scale_usd = fit_normaliser(plant, advice, config)
    env = FleetVecEnv(plant, config.n_envs, None, advice, spec, scale_usd, stagger=True)
    model = make_model(env, config, spec, seed=1, tensorboard=None)
    model.learn(steps)
    return advice, residual_policy(model.policy, advice, spec)


def right_share(plant, policy):
    """Share of requests that go to the tier that can answer them."""
    right = decisions = 0
    for view in views(plant, seeds=(5, 6, 7)):
        task = view.request[v.TASK_INDEX].astype(int)
        tier = plant.layout.tier[policy.decide_batch(view)]
        right += (tier == task).sum()  # chat: weak (0), code: strong (1)
        decisions += len(task)
    return right / decisions


@pytest.mark.parametrize(
    ("steps", "tau_s", "taught_share"),
    [(12_288, 0.0, 0.0), (12_288, 5.0, 0.0), (3_072, 0.0, 1.0)],
    ids=["bandit", "discounted", "taught"],
)
def test_learns_who_answers_what(steps, tau_s, taught_share):
    """Teaching needs a quarter of the decisions."""
    plant = Plant(two_specialists(learnable=True))
    advice, policy = trained(plant, steps, tau_s=tau_s, taught_share=taught_share)
    assert 0.3 < right_share(plant, advice) < 0.7
    assert right_share(plant, policy) > 0.97


@pytest.mark.parametrize("taught_share", [0.0, 1.0], ids=["bandit", "taught"])
def test_learns_nothing_where_the_advice_is_right(taught_share):
    """Both answer alike and the prior knows it: the cheaper one stays the choice."""
    plant = Plant(two_specialists(learnable=False))
    advice, policy = trained(plant, 6_144, tau_s=0.0, taught_share=taught_share)
    same = total = 0
    for view in views(plant, seeds=(5, 6)):
        same += (advice.decide_batch(view) == policy.decide_batch(view)).sum()
        total += len(view.legal)
    assert same / total > 0.95


def test_taught_loss_is_zero_for_who_knows():
    """Logits count up to a constant per decision; those of illegal candidates, and of the very worst, not at all."""
    rng = np.random.default_rng(0)
    taught = torch.tensor(rng.normal(size=(5, 4)), dtype=torch.float32)
    advice, legal = torch.zeros(5, 4), torch.ones(5, 4)
    legal[:, 3], advice[:, 2] = 0.0, -20.0
    observation = torch.cat([torch.zeros(5, 3), advice, legal], dim=1)
    logits = taught + torch.tensor(rng.normal(size=(5, 1)), dtype=torch.float32)
    logits[:, 2:] = -100.0
    logits.requires_grad_()
    loss = taught_loss(logits, taught, observation)
    assert loss.item() == pytest.approx(0.0, abs=1e-10)
    moved = logits.detach().clone()
    moved[:, 0] += 1.0  # half of it is a constant of the two that count
    loss = taught_loss(moved.requires_grad_(), taught, observation)
    loss.backward()
    assert loss.item() == pytest.approx(2 * 0.5 * 0.5**2 / 4)
    assert (moved.grad[:, 2:] == 0.0).all() and (moved.grad[:, 0] > 0.0).all() and (moved.grad[:, 1] < 0.0).all()


def test_teaching_comes_first_and_resumes(small_plant, tiny_config, tmp_path):
    """So many decisions are taught, then PPO; an archive knows how many."""
    steps = 4 * tiny_config.n_envs * tiny_config.rollout_steps
    config = tiny_config.model_copy(update={"taught_share": 0.5, "steps": steps})
    spec, scale_usd = fit_normaliser(small_plant, default_advice(small_plant), config)
    env = FleetVecEnv(small_plant, config.n_envs, None, default_advice(small_plant), spec, scale_usd)
    model = make_model(env, config, spec, seed=0, tensorboard=None)
    seen = []
    teach, ppo = MarginPPO.teach, PPO.train
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(MarginPPO, "teach", lambda self, rollout: (seen.append("taught"), teach(self, rollout))[0])
        patch.setattr(PPO, "train", lambda self: (seen.append("ppo"), ppo(self))[0])
        model.learn(config.steps)
    assert seen == ["taught"] * 2 + ["ppo"] * 2
    model.save(tmp_path / "model.zip")
    assert MarginPPO.load(tmp_path / "model.zip").taught_steps == config.steps // 2
    ledger = make_model(env, config.model_copy(update={"signal": "ledger"}), spec, seed=0, tensorboard=None)
    assert ledger.taught_steps == 0
