"""PPO for the controller: a network that corrects the tuned rule, on Stable-Baselines3.

Policy: N(correction, 1) in steps of `agents.control_worlds.STEPS`; the correction starts at zero, so that the untrained
controller is the rule. Exploration is small and fixed: large noise on replicas that take minutes to come is dear, and
teaches a policy to be good at being noisy. The critic sees what only training knows; the actor does not.

Advantage: generalised advantage estimation with lambda close to 1 and a time constant of about a day, minus the mean
advantage of the other worlds on the same trace (leave one out), which is the same for all actions of this one.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from gymnasium import spaces
from stable_baselines3.common.policies import ActorCriticPolicy
from torch import Tensor, nn

from agents.config import ControllerConfig, ppo_settings
from agents.control_worlds import ControlVecEnv
from agents.network import as_float32
from agents.ppo import ElapsedRolloutBuffer, MarginPPO
from marginroute.control import Array
from marginroute.control_policy import REACH, ControlNetwork, LearnedController
from marginroute.control_rules import RuleController

NAME = "marginroute"  # the exported controller's name in tables
_LOG_NORM = 0.5 * float(np.log(2.0 * np.pi))


class ControllerPolicy(ActorCriticPolicy):
    """Stable-Baselines3's policy object around the correction and its critic.

    Args:
        observation_space, action_space, lr_schedule: as Stable-Baselines3 passes them.
        n_public: columns that the actor sees.
        mean, std: of all columns.
        step: (A,) of the levers; those with 0 are not learned.
        width: hidden units.
        noise_ticks: mean time for which a world keeps its noise.
        **kwargs: passed on to ActorCriticPolicy.
    """

    def __init__(
        self,
        observation_space: spaces.Space[Any],
        action_space: spaces.Space[Any],
        lr_schedule: Callable[[float], float],
        n_public: int,
        mean: list[float],
        std: list[float],
        step: list[float],
        width: int = 64,
        noise_ticks: float = 1.0,
        **kwargs: Any,
    ) -> None:
        self._own = {
            "n_public": n_public,
            "mean": mean,
            "std": std,
            "step": step,
            "width": width,
            "noise_ticks": noise_ticks,
        }
        self._noise: Tensor | None = None
        super().__init__(observation_space, action_space, lr_schedule, **kwargs)

    def _build(self, lr_schedule: Callable[[float], float]) -> None:
        own, width = self._own, self._own["width"]
        self.n_public = own["n_public"]
        for name in ("mean", "std", "step"):
            self.register_buffer(name, torch.tensor(own[name], dtype=torch.float32))
        self.learned = (self.step > 0.0).float()
        self.body = nn.Sequential(nn.Linear(self.n_public, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU())
        self.head = nn.Linear(width, len(own["step"]), bias=False)
        self.critic = nn.Sequential(
            nn.Linear(len(own["mean"]), width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 1)
        )
        for layer in (*self.body, *self.critic):
            if isinstance(layer, nn.Linear):
                nn.init.orthogonal_(layer.weight, gain=np.sqrt(2.0))
                nn.init.zeros_(layer.bias)
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.critic[-1].weight)
        self.optimizer = self.optimizer_class(self.parameters(), lr=lr_schedule(1), **self.optimizer_kwargs)

    def _get_constructor_parameters(self) -> dict[str, Any]:
        return {**super()._get_constructor_parameters(), **self._own}

    def _both(self, obs: Tensor) -> tuple[Tensor, Tensor]:
        """Corrections (B, A) in steps and values (B,)."""
        x = (obs - self.mean) / self.std
        z = self.head(self.body(x[:, : self.n_public]))
        return REACH * torch.tanh(z / REACH), self.critic(x)[:, 0]

    def correction(self, inputs: Tensor) -> Tensor:
        """(B, A) in lever units of public inputs alone: what the runtime has to reproduce."""
        x = (inputs - self.mean[: self.n_public]) / self.std[: self.n_public]
        return self.step * REACH * torch.tanh(self.head(self.body(x)) / REACH)

    def _log_prob(self, actions: Tensor, correction: Tensor) -> Tensor:
        return (self.learned * (-0.5 * (actions - correction) ** 2 - _LOG_NORM)).sum(-1)

    def forward(self, obs: Tensor, deterministic: bool = False) -> tuple[Tensor, Tensor, Tensor]:
        """Actions (B, A), values (B,) and log-probabilities (B,), without gradients."""
        with torch.no_grad():
            correction, values = self._both(obs)
            actions = correction if deterministic else correction + self.learned * self._held_noise(correction)
            return actions, values, self._log_prob(actions, correction)

    def _held_noise(self, like: Tensor) -> Tensor:
        """(B, A) standard normal; each row is drawn anew at one tick in `noise_ticks`."""
        noise = torch.randn_like(like)
        if self._noise is not None and self._noise.shape == noise.shape:
            anew = torch.rand(len(noise), 1) < 1.0 / self._own["noise_ticks"]
            noise = torch.where(anew, noise, self._noise)
        self._noise = noise
        return noise

    def evaluate_actions(self, obs: Tensor, actions: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Values, log-probabilities and entropies (B,) of given actions."""
        correction, values = self._both(obs)
        entropy = (0.5 + _LOG_NORM) * self.learned.sum()
        return values, self._log_prob(actions, correction), entropy.expand(len(obs))

    def _predict(self, observation: Tensor, deterministic: bool = False) -> Tensor:
        return self.forward(observation, deterministic)[0]

    def predict_values(self, obs: Tensor) -> Tensor:
        """Values (B,)."""
        return self.critic((obs - self.mean) / self.std)[:, 0]


class GroupRolloutBuffer(ElapsedRolloutBuffer):
    """Advantages less those of the other worlds on the same trace."""

    size = 1

    def compute_returns_and_advantage(self, last_values: Tensor, dones: Array) -> None:
        """As its parent; the critic still learns the returns of each world."""
        super().compute_returns_and_advantage(last_values, dones)
        if self.size > 1:
            each = self.advantages.reshape(self.buffer_size, -1, self.size)
            others = (each.sum(axis=2, keepdims=True) - each) / (self.size - 1)
            self.advantages = (each - others).reshape(self.buffer_size, self.n_envs)


class ControllerPPO(MarginPPO):
    """`MarginPPO` on groups of worlds.

    Args:
        *args, **kwargs: as `MarginPPO`.
    """

    buffer_class = GroupRolloutBuffer

    def _setup_model(self) -> None:
        super()._setup_model()
        assert isinstance(self.rollout_buffer, GroupRolloutBuffer)
        self.rollout_buffer.size = self.env.size if isinstance(self.env, ControlVecEnv) else 1


def make_controller_model(
    env: ControlVecEnv,
    config: ControllerConfig,
    rate: Callable[[float], float],
    mean: Array,
    std: Array,
    seed: int,
    tensorboard: str | None,
) -> ControllerPPO:
    """An untrained model whose policy is the rule."""
    return ControllerPPO(
        ControllerPolicy,
        env,
        **ppo_settings(config),
        n_steps=config.rollout_ticks,
        learning_rate=rate,
        vf_coef=0.5,
        max_grad_norm=0.5,
        policy_kwargs={
            "n_public": env.n_public,
            "mean": mean.tolist(),
            "std": std.tolist(),
            "step": env.step_size.tolist(),
            "width": config.width,
            "noise_ticks": config.noise_ticks,
        },
        seed=seed,
        tensorboard_log=tensorboard,
    )


def learned_controller(policy: ControllerPolicy, rule: RuleController) -> LearnedController:
    """The trained policy as the numpy runtime runs it."""
    first, second, n = policy.body[0], policy.body[2], policy.n_public
    network = ControlNetwork(
        first=as_float32(first.weight.T),
        bias_1=as_float32(first.bias),
        second=as_float32(second.weight.T),
        bias_2=as_float32(second.bias),
        head=as_float32(policy.head.weight.T),
        mean=as_float32(policy.mean[:n]),
        std=as_float32(policy.std[:n]),
        step=as_float32(policy.step),
    )
    return LearnedController(NAME, rule.anew(), network)
