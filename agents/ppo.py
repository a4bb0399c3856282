"""PPO on Stable-Baselines3 that learns from the learning signal and discounts by elapsed time.

The rollout differs from Stable-Baselines3's in three ways; PPO's update is its own. (1) The reward of a step is the
environment's `learning_signal` (own margin of the decision at expected credits, minus the shadow price of the capacity
taken; docs/learning.md) instead of the ledger's change. (2) Decisions are not equally spaced, so a step that lasted
dt seconds discounts by exp(-dt / tau) (semi-Markov); retries and held jobs add steps without adding time. (3) An
episode ends by truncation: its last transition gets no bootstrap from the observation after the reset, and adds none.

PPO may be preceded by *teaching*. The simulator knows the learning signal of every candidate, not only of the one that
was chosen, and the policy's logits are regressed on it: on the log-probabilities of a policy that knew. Rollouts are
the same, and an update has as many gradient steps; where PPO sees one noisy number per decision, this sees all.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from stable_baselines3 import PPO
from stable_baselines3.common.buffers import RolloutBuffer
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.type_aliases import RolloutBufferSamples
from stable_baselines3.common.vec_env import VecEnv

Array = np.ndarray[Any, Any]

NEAR_LOGITS = 12.0  # behind the best: what the advice puts there is not taught
HUBER_LOGITS = 5.0  # off by more than this counts linearly


class ElapsedRolloutBuffer(RolloutBuffer):
    """A rollout buffer whose discount differs by step: `discounts` has shape (n_steps, n_envs)."""

    discounts: Array = None  # type: ignore[assignment]
    teaching = False  # whether the logits by the learning signal are stored beside the rest
    taught: Array | None = None  # (n_steps, n_envs, C) those logits
    _batch: list[Array] | None = None

    def reset(self) -> None:
        """Forgets the rollout; its memory is filled again."""
        if self.discounts is None:
            self.discounts = np.zeros((self.buffer_size, self.n_envs), dtype=np.float32)
            super().reset()
        self.pos, self.full = 0, False

    def add_step(
        self, obs: Array, action: Array, signal: Array, start: Array, value: Array, log_prob: Array, discount: Array
    ) -> None:
        """Stores one step of all worlds; every argument is (N,), observations (N, D), actions of levers (N, A)."""
        t = self.pos
        self.observations[t] = obs
        self.actions[t] = action.reshape(self.n_envs, -1)
        self.rewards[t] = signal
        self.episode_starts[t] = start
        self.values[t] = value
        self.log_probs[t] = log_prob
        self.discounts[t] = discount
        self.pos += 1
        self.full = self.pos == self.buffer_size

    def room_to_teach(self, n_candidates: int) -> Array:
        """`taught`, made where there is none yet."""
        if self.taught is None:
            self.taught = np.empty((self.buffer_size, self.n_envs, n_candidates), dtype=np.float32)
        return self.taught

    def lessons(self, batch_size: int) -> Iterator[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
        """Observations (B, D), taught logits (B, C) and returns (B,) of the whole rollout in random order."""
        assert self.taught is not None
        for parts in self._minibatches([self.observations, self.taught, self.returns], batch_size):
            yield tuple(parts)  # type: ignore[misc]

    def get(self, batch_size: int | None = None) -> Iterator[RolloutBufferSamples]:
        """Minibatches as Stable-Baselines3's PPO takes them."""
        columns = [self.observations, self.actions, self.values, self.log_probs, self.advantages, self.returns]
        for parts in self._minibatches(columns, batch_size):
            yield RolloutBufferSamples(*parts)

    def _minibatches(self, columns: list[Array], batch_size: int | None) -> Iterator[list[torch.Tensor]]:
        """Of columns (T, N, ...) in random order, all in the same memory: take one before the next."""
        total = self.buffer_size * self.n_envs
        size = min(batch_size or total, total)
        flat = [x.reshape(total, *x.shape[2:]) for x in columns]
        shapes = [(size, *x.shape[1:]) for x in flat]
        if self._batch is None or [x.shape for x in self._batch] != shapes:
            self._batch = [np.empty(shape, dtype=x.dtype) for shape, x in zip(shapes, flat, strict=True)]
        order = torch.randperm(total).numpy()
        for start in range(0, total, size):
            rows = order[start : start + size]
            parts = [part[: len(rows)] for part in self._batch]
            for x, part in zip(flat, parts, strict=True):
                np.take(x, rows, axis=0, out=part, mode="clip")  # any other mode copies once more
            yield [torch.from_numpy(part) for part in parts]

    def compute_returns_and_advantage(self, last_values: torch.Tensor, dones: Array) -> None:
        """Generalised advantage estimation with the step's own discount (Schulman et al. 2016, eq. 16)."""
        following, advantage = last_values.cpu().numpy().flatten(), np.zeros(self.n_envs, dtype=np.float32)
        for t in reversed(range(self.buffer_size)):
            open_ = 1.0 - (dones if t == self.buffer_size - 1 else self.episode_starts[t + 1])
            discount = self.discounts[t] * open_
            delta = self.rewards[t] + discount * following - self.values[t]
            advantage = delta + discount * self.gae_lambda * advantage
            self.advantages[t] = advantage
            following = self.values[t]
        self.returns = self.advantages + self.values


def discounts(elapsed_s: Array, tau_s: float) -> Array:
    """exp(-dt / tau) of each world's last step, (N,)."""
    return np.exp(-elapsed_s / tau_s) if tau_s > 0 else np.zeros_like(elapsed_s)


def taught_loss(log_probs: torch.Tensor, taught: torch.Tensor, observations: torch.Tensor) -> torch.Tensor:
    """How far log-probabilities (B, C) lie from taught logits (B, C), by Huber; both up to a constant per decision.

    Of legal candidates alone, and of those not so far behind the best by the advice that nothing would bring them up.
    """
    c = taught.shape[1]
    near = (observations[:, -c:] > 0.5) & (observations[:, -2 * c : -c] > -NEAR_LOGITS)
    weight = near.float()
    off = torch.where(near, log_probs - taught, 0.0)
    off = (off - off.sum(1, keepdim=True) / weight.sum(1, keepdim=True)) * weight
    return torch.nn.functional.huber_loss(off, torch.zeros_like(off), delta=HUBER_LOGITS)


def play(
    policy: torch.nn.Module,
    env: Any,
    buffer: ElapsedRolloutBuffer,
    obs: Array,
    starts: Array,
    discount: Callable[[Array], Array],
) -> Iterator[tuple[Array, Array, list[dict[str, Any]]]]:
    """Fills a buffer with decisions of every world.

    Args:
        policy: gives actions, values and log-probabilities of observations.
        env: as of `MarginPPO`.
        buffer: empty.
        obs: (N, D) of now.
        starts: (N,) whether it is an episode's first one.
        discount: of elapsed seconds (N,).

    Yields:
        After every step the next observations (N, D), which episodes have ended (N,), and infos.
    """
    for _ in range(buffer.buffer_size):
        action, value, log_prob = (x.numpy() for x in policy(torch.as_tensor(obs)))
        if buffer.teaching:
            logits = env.signal_logits()
            buffer.room_to_teach(logits.shape[1])[buffer.pos] = logits
        following, _, dones, infos = env.step(action)
        buffer.add_step(obs, action, env.learning_signal, starts, value, log_prob, discount(env.elapsed_s))
        obs, starts = following, dones
        yield obs, dones, infos


class MarginPPO(PPO):
    """PPO whose rollouts read `learning_signal` and `elapsed_s` of a natively batched environment.

    Args:
        *args: as Stable-Baselines3's PPO; the environment must be an `envs.vector_env.FleetVecEnv`.
        tau_s: time constant of the discount in seconds; 0: only the decision's own signal counts.
        taught_steps: decisions during which the policy is taught, before PPO.
        **kwargs: as Stable-Baselines3's PPO.
    """

    buffer_class: type[ElapsedRolloutBuffer] = ElapsedRolloutBuffer

    def __init__(self, *args: Any, tau_s: float = 5.0, taught_steps: int = 0, **kwargs: Any) -> None:
        self.tau_s, self.taught_steps = tau_s, taught_steps
        super().__init__(*args, rollout_buffer_class=self.buffer_class, **kwargs)

    def discount(self, elapsed_s: Array) -> Array:
        """exp(-dt / tau) of each world's last step, (N,)."""
        return discounts(elapsed_s, self.tau_s)

    def collect_rollouts(
        self, env: VecEnv, callback: BaseCallback, rollout_buffer: RolloutBuffer, n_rollout_steps: int
    ) -> bool:
        """Fills the buffer with `n_rollout_steps` decisions of every world."""
        assert isinstance(rollout_buffer, ElapsedRolloutBuffer) and self._last_obs is not None
        self.policy.set_training_mode(False)
        rollout_buffer.reset()
        rollout_buffer.teaching = self.num_timesteps < self.taught_steps
        callback.on_rollout_start()
        for obs, dones, infos in self._play(env, rollout_buffer):
            self.num_timesteps += env.num_envs
            callback.update_locals(locals())
            if not callback.on_step():
                return False
            if dones.any():
                self._update_info_buffer(infos, dones)
            self._last_obs, self._last_episode_starts = obs, dones
        with torch.no_grad():
            last_values = self.policy.predict_values(torch.as_tensor(self._last_obs))
        rollout_buffer.compute_returns_and_advantage(last_values, dones)
        callback.on_rollout_end()
        return True

    def train(self) -> None:
        """One update: by teaching as long as that goes on, then by Stable-Baselines3's PPO."""
        assert isinstance(self.rollout_buffer, ElapsedRolloutBuffer)
        if self.rollout_buffer.teaching:
            self.teach(self.rollout_buffer)
        else:
            super().train()

    def teach(self, buffer: ElapsedRolloutBuffer) -> None:
        """One update by what the simulator knows of every candidate."""
        self.policy.set_training_mode(True)
        self._update_learning_rate(self.policy.optimizer)
        losses = []
        for _ in range(self.n_epochs):
            for observations, taught, returns in buffer.lessons(self.batch_size):
                log_probs, values = self.policy.scorer(observations)
                loss = taught_loss(log_probs, taught, observations)
                losses.append(loss.item())
                loss = loss + self.vf_coef * torch.nn.functional.mse_loss(values, returns)
                self.policy.optimizer.zero_grad()
                loss.backward()
                torch.nn.utils.clip_grad_norm_(self.policy.parameters(), self.max_grad_norm)
                self.policy.optimizer.step()
        self._n_updates += self.n_epochs
        self.logger.record("train/taught_loss", float(np.mean(losses)))

    def _play(self, env: VecEnv, buffer: ElapsedRolloutBuffer) -> Iterator[tuple[Array, Array, list[dict[str, Any]]]]:
        assert self._last_episode_starts is not None
        return play(self.policy, env, buffer, self._last_obs, self._last_episode_starts, self.discount)  # type: ignore[arg-type]
