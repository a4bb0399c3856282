"""The candidate scorer as a Stable-Baselines3 policy: `marginroute.policy.Network` in torch, with a critic beside it.

Observations are flat (see `marginroute.features`): candidates | context | advice logits | legal mask. The normaliser is
part of the policy (buffers), the head starts at zero, and illegal candidates have no probability.

By default the network corrects the advice by what tells of answers alone (`OF_ANSWERS`). What is crowded, slow or dear
is the advice's part: a fleet in a state that training never saw meets a rule, no extrapolation. And it corrects in
proportion to how much it has been told (`trust`): where nothing was judged yet, it is the rule. The critic sees all.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from gymnasium import spaces
from stable_baselines3.common.policies import ActorCriticPolicy
from torch import Tensor, nn

from agents import fused
from agents.config import TrainingConfig
from agents.fused import FusedScorer, Memory, Weights
from marginroute.features import FeatureSpec
from marginroute.policy import Network

Array = np.ndarray[Any, Any]

JUDGED = frozenset({"surprise", "confidence", "tier_surprise", "tier_confidence"})
"""What the gateway has heard of its answers lately."""
OF_ANSWERS = JUDGED | {
    *("p_good", "refund", "similarity", "entry_age_s", "tried"),
    *("difficulty_signal", "turned_down", "verifier_score", "task_value_usd"),
}
"""Features that tell how good an answer will be and what a bad one costs, beside those of tier, class and task."""


def is_seen(name: str, sees: str) -> bool:
    """Whether the network looks at a feature by `TrainingConfig.sees`."""
    if sees == "answers":
        return name in OF_ANSWERS or name.startswith(("tier_", "class_", "task_"))
    return sees == "all" or name not in JUDGED


class Scorer(nn.Module):
    """Logits of all candidates with shared weights, and the value of the state.

    Args:
        spec: feature columns with a fitted normaliser.
        n_candidates: C.
        width: hidden units H.
        residual: whether logits start at the advice's; False: at nothing, and the advice's scores are ignored.
        sees: features that logits may depend on, as `TrainingConfig.sees`.
    """

    def __init__(
        self, spec: FeatureSpec, n_candidates: int, width: int, residual: bool = True, sees: str = "all"
    ) -> None:
        super().__init__()
        self.spec, self.n_candidates, self._memory = spec, n_candidates, Memory()
        self._kept: tuple[tuple[int, ...], Weights] | None = None  # folded weights and the version they are of
        f, g = spec.n_candidate, spec.n_context
        self.candidate, self.context = nn.Linear(f, width, bias=False), nn.Linear(g, width)
        self.hidden, self.head = nn.Linear(width, width), nn.Linear(width, 1, bias=False)
        self.kappa = nn.Parameter(torch.full((1,), float(residual)), requires_grad=residual)
        self.trust: Tensor
        self.register_buffer("trust", torch.zeros(2))
        self._told = sees == "answers"
        self.follow(1.0)
        self.value = nn.Sequential(nn.Linear(f + g, width), nn.ReLU(), nn.Linear(width, 1))
        for name in ("candidate_mean", "candidate_std", "context_mean", "context_std"):
            self.register_buffer(name, torch.as_tensor(getattr(spec, name), dtype=torch.float32))
        for name, columns in (("candidate_seen", spec.candidate), ("context_seen", spec.context)):
            self.register_buffer(name, torch.tensor([float(is_seen(column.name, sees)) for column in columns]))
        for layer in (self.candidate, self.context, self.hidden):
            nn.init.orthogonal_(layer.weight, gain=np.sqrt(2.0))
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.value[-1].weight)

    def forward(self, observation: Tensor) -> tuple[Tensor, Tensor]:
        """Log-probabilities (B, C) of the candidates and values (B,)."""
        return FusedScorer.apply(observation, self.n_candidates, self._memory, *self.folded())  # type: ignore[no-any-return]

    def run(self, observation: Tensor) -> tuple[Array, Array]:
        """Logits (B, C), very low where a candidate is not legal, and values (B,), without gradients."""
        version = (self.trust._version, *(parameter._version for parameter in self.parameters()))
        if self._kept is None or self._kept[0] != version:
            self._kept = version, fused.arrays_of(self.folded())
        return fused.run(observation.numpy(), self.n_candidates, self._kept[1], self._memory)

    def follow(self, strength: float) -> None:
        """Sets how far the correction counts, always or in proportion to what the gateway has been told."""
        self.trust.copy_(torch.tensor([0.0, strength] if self._told else [strength, 0.0]))

    def first_layer(self) -> tuple[Tensor, Tensor]:
        """Weights (H, F) and (H, G) of normalised features; 0 for what the network does not look at."""
        return self.candidate.weight * self.candidate_seen, self.context.weight * self.context_seen

    def folded(self) -> Weights:
        """The weights as functions of raw features: the normaliser folded into the first layers."""
        f = self.spec.n_candidate
        first, last = self.value[0], self.value[-1]

        def fold(candidate: Tensor, context: Tensor, bias: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            w, wg = candidate / self.candidate_std, context / self.context_std
            return w.t(), wg.t(), bias - w @ self.candidate_mean - wg @ self.context_mean

        return Weights(
            *fold(*self.first_layer(), self.context.bias),
            self.hidden.weight.t(),
            self.hidden.bias,
            self.head.weight[0],
            self.kappa,
            self.trust,
            *fold(first.weight[:, :f], first.weight[:, f:], first.bias),
            last.weight[0],
            last.bias,
        )


class ScorerPolicy(ActorCriticPolicy):
    """Stable-Baselines3's policy object around a `Scorer`.

    Args:
        observation_space, action_space, lr_schedule: as Stable-Baselines3 passes them.
        spec: `FeatureSpec.to_dict()` with the fitted normaliser.
        width: hidden units.
        residual, sees: as `Scorer`.
        **kwargs: passed on to ActorCriticPolicy.

    Attributes:
        worlds: (first, of) where `forward` is given worlds first, first + 1, ... of so many: it draws the noise of all.
    """

    def __init__(
        self,
        observation_space: spaces.Space[Any],
        action_space: spaces.Space[Any],
        lr_schedule: Callable[[float], float],
        spec: dict[str, Any],
        width: int = 32,
        residual: bool = True,
        sees: str = "all",
        **kwargs: Any,
    ) -> None:
        self._spec, self._width, self._residual, self._sees = spec, width, residual, sees
        self.worlds: tuple[int, int] | None = None
        super().__init__(observation_space, action_space, lr_schedule, **kwargs)

    def _build(self, lr_schedule: Callable[[float], float]) -> None:
        candidates = int(self.action_space.n)  # type: ignore[attr-defined]
        self.scorer = Scorer(FeatureSpec.from_dict(self._spec), candidates, self._width, self._residual, self._sees)
        self.optimizer = self.optimizer_class(self.parameters(), lr=lr_schedule(1), **self.optimizer_kwargs)

    def _get_constructor_parameters(self) -> dict[str, Any]:
        return {
            **super()._get_constructor_parameters(),
            "spec": self._spec,
            "width": self._width,
            "residual": self._residual,
            "sees": self._sees,
        }

    def forward(self, obs: Tensor, deterministic: bool = False) -> tuple[Tensor, Tensor, Tensor]:
        """Actions (B,), values (B,) and log-probabilities (B,), without gradients: `evaluate_actions` has those."""
        logits, values = self.scorer.run(obs)
        first, of = self.worlds or (0, len(logits))
        noise, log_probs = torch.empty(of, logits.shape[1]), np.empty_like(logits)
        noise = noise.fill_(1.0) if deterministic else noise.exponential_()
        noise = noise[first : first + len(logits)]
        actions, chosen = np.empty(len(logits), dtype=np.int64), np.empty(len(logits), dtype=np.float32)
        fused.log_softmax(logits, log_probs)
        fused.choose(log_probs, noise.numpy(), actions, chosen)
        return torch.from_numpy(actions), torch.from_numpy(values), torch.from_numpy(chosen)

    def evaluate_actions(self, obs: Tensor, actions: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Values, log-probabilities and entropies (B,) of given actions."""
        log_probs, values = self.scorer(obs)
        entropy = -(log_probs.exp() * log_probs).sum(-1)
        return values, log_probs.gather(-1, actions.long().unsqueeze(-1)).squeeze(-1), entropy

    def _predict(self, observation: Tensor, deterministic: bool = False) -> Tensor:
        return self.forward(observation, deterministic)[0]

    def predict_values(self, obs: Tensor) -> Tensor:
        """Values (B,)."""
        return torch.from_numpy(self.scorer.run(obs)[1])


def scorer_settings(config: TrainingConfig, spec: FeatureSpec) -> dict[str, Any]:
    """Keyword arguments of `ScorerPolicy`; a network that decides alone sees everything."""
    sees = config.sees if config.residual else "all"
    return {"spec": spec.to_dict(), "width": config.width, "residual": config.residual, "sees": sees}


def as_float32(tensor: Tensor) -> np.ndarray[Any, Any]:
    """Weights as the numpy runtime takes them."""
    return np.ascontiguousarray(tensor.detach().cpu().numpy().astype(np.float32))


def to_numpy(scorer: Scorer) -> Network:
    """The scorer's weights in the layout that `marginroute` runs."""
    candidate, context = scorer.first_layer()
    return Network(
        candidate=as_float32(candidate.T),
        context=as_float32(context.T),
        bias_1=as_float32(scorer.context.bias),
        hidden=as_float32(scorer.hidden.weight.T),
        bias_2=as_float32(scorer.hidden.bias),
        head=as_float32(scorer.head.weight[0]),
        kappa=as_float32(scorer.kappa),
        trust=as_float32(scorer.trust),
    )
