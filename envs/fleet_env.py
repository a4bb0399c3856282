"""`marginroute/Fleet-v0`: the router's environment, one world."""

from __future__ import annotations

from typing import Any, ClassVar

import gymnasium
import numpy as np
from gymnasium import spaces

from envs.live_view import LiveView
from envs.scenario import Scenario, load_scenario
from envs.vector_env import ObservedWorlds
from envs.workload.requests import Workload
from marginroute import view as v
from marginroute.errors import InputError
from marginroute.margin_rule import MarginRule
from marginroute.view import Array, View

ENV_ID = "marginroute/Fleet-v0"


class FleetEnv(gymnasium.Env[Array, np.int64]):
    """Route each request of a day at a gateway so that the margin is largest.

    One step is one decision: a request that arrived, or a held batch job that is offered again.

    | space | meaning |
    | --- | --- |
    | action `Discrete(C)` | candidates: replicas (pool by pool), providers, cached answer, *defer*, *shed* |
    | observation `Box(D)` | candidate features (C x F), context (G), advice logits (C), legal mask (C), all float32 |

    **Reward**: change of the ledger in USD since the last decision: revenue, refunds, service credits, API spend,
    GPU-hours, energy, cache. The rewards of an episode add up to its margin to the cent.

    **Start**: an empty fleet and response cache; the workload is drawn from the scenario's split by the seed.

    **End**: never terminated, truncated at the horizon. The last step settles the backlog: requests in flight run to
    their end without new arrivals, and deferred jobs are bought from the dearest provider.

    **Illegal actions** (a provider out of its rate limit, *cache* without a hit, *defer* for interactive work, any
    index outside 0..C-1) shed the request; `info["illegal"]` counts them. `info["action_mask"]` holds what is legal.

    `info["elapsed_s"]` is the time that the step took, for discounting by time; `info["ledger_usd"]` is (A, K + 1),
    accounts by classes; see `envs.economics.ledger`.

    `reset(options={"workload": Workload, "seed": int, "in_flight_caps": {pool: n}})`: an episode of one's own, the
    episode of a given seed, and in-flight caps; `set_in_flight_caps` changes the caps between steps.

    Args:
        scenario: name, path or Scenario.
        split: which seeds episodes are drawn from: train, validation or heldout.
        advice: margin rule behind the estimates in the observation; None: the untuned expected margin.
        render_mode: None, "ansi" (text) or "rgb_array" (a picture of queues, batches, KV use and money).

    Version history: v0, the first.
    """

    metadata: ClassVar[dict[str, Any]] = {"render_modes": ["ansi", "rgb_array"], "render_fps": 8}

    def __init__(
        self,
        scenario: str | Scenario = "quickstart",
        split: str = "train",
        advice: MarginRule | None = None,
        render_mode: str | None = None,
    ) -> None:
        if render_mode not in (None, *self.metadata["render_modes"]):
            raise InputError(f"render_mode {render_mode!r} is not offered; legal: None, 'ansi', 'rgb_array'")
        resolved = load_scenario(scenario) if isinstance(scenario, str) else scenario
        self.render_mode, self._split = render_mode, split
        self.worlds = ObservedWorlds(resolved, 1, advice, None)
        self.observation_space: spaces.Box = self.worlds.observation_space
        self.action_space: spaces.Discrete = self.worlds.action_space  # type: ignore[assignment]
        self._last = ""
        self._live = LiveView(self.worlds.plant)

    @property
    def view(self) -> View:
        """What the gateway knows now; a copy."""
        return self.worlds.view()[0].copy()

    def action_masks(self) -> Array:
        """(C,) legal candidates, as sb3-contrib's maskable algorithms ask for them."""
        return self.worlds.legal[0].copy()

    def set_in_flight_caps(self, caps: dict[str, int]) -> None:
        """Sets how many requests a replica of each named pool may have at once; the rest waits in the gateway.

        Raises:
            InputError: an unknown pool, or a cap below 1.
        """
        names = self.worlds.plant.scenario.pool_names
        current = self.worlds.fleet.replicas["in_flight_cap"][0]
        pools = self.worlds.plant.spec.pool_of_replica
        values = np.array([current[pools == p][0] for p in range(len(names))])
        for name, cap in caps.items():
            if name not in names:
                raise InputError(f"in_flight_caps names pool {name!r}; legal: {', '.join(names)}")
            if cap < 1:
                raise InputError(f"in_flight_caps[{name!r}] is {cap}; legal is 1 or more")
            values[names.index(name)] = cap
        self.worlds.set_in_flight_caps(values)

    def _info(self) -> dict[str, Any]:
        worlds = self.worlds
        return {
            "action_mask": worlds.legal[0].copy(),
            "elapsed_s": float(worlds.elapsed_s[0]),
            "now_s": float(worlds.desks["now_s"][0]),
            "illegal": int(worlds.desks["illegal"][0]),
            "ledger_usd": worlds.ledger_usd[0].copy(),
        }

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Array, dict[str, Any]]:
        """Starts an episode."""
        super().reset(seed=seed)
        options = options or {}
        workload: Workload | None = options.get("workload")
        if workload is None:
            episode = int(options.get("seed", self.np_random.integers(2**31)))
            workload = self.worlds.plant.scenario.generate(episode, self._split)  # type: ignore[arg-type]
        self.worlds.load_all([workload])
        self.worlds.set_in_flight_caps(None)
        self.set_in_flight_caps(options.get("in_flight_caps", {}))
        self._last = ""
        self._live.forget()
        return self.worlds.observe()[0], self._info()

    def step(self, action: np.int64 | int) -> tuple[Array, float, bool, bool, dict[str, Any]]:
        """Carries out one decision and advances to the next."""
        names, choice = self.worlds.plant.layout.names, int(action)
        self._last = names[choice] if 0 <= choice < len(names) and self.worlds.legal[0, choice] else "shed (illegal)"
        self.worlds.step(np.array([choice]))
        done = bool(self.worlds.done[0])
        return self.worlds.observe()[0], float(self.worlds.reward_usd[0]), False, done, self._info()

    def render(self) -> str | Array | None:  # type: ignore[override]
        """The gateway's desk as text (time, money, the request at hand, each candidate), or the fleet as a picture."""
        if self.render_mode == "rgb_array":
            return self._live.frame(self.worlds, last=self._last)
        if self.render_mode != "ansi":
            return None
        view, desk = self.view, self.worlds.desks[0]
        layout, q = view.layout, view.request
        lines = [
            f"t = {float(desk['now_s']):8.2f} s   margin = {self.worlds.ledger_usd[0].sum():10.4f} USD   "
            f"decisions = {int(desk['sequence'])}   last: {self._last or 'none'}",
            f"request: {layout.class_names[int(q[v.CLASS_INDEX])]}, {layout.task_names[int(q[v.TASK_INDEX])]}, "
            f"{int(q[v.PROMPT_TOKENS])} prompt tokens, about {q[v.EXPECTED_OUTPUT_TOKENS]:.0f} to come",
            f"{'candidate':<14}{'legal':>6}{'in flight':>10}{'held':>6}{'prefill tok':>12}{'KV use':>8}{'P(good)':>9}",
        ]
        s = view.signals
        for c, name in enumerate(layout.names):
            lines.append(
                f"{name:<14}{'yes' if view.legal[c] else '-':>6}{s[v.IN_FLIGHT, c]:>10.0f}{s[v.HELD, c]:>6.0f}"
                f"{s[v.PENDING_PREFILL_TOKENS, c]:>12.0f}{s[v.KV_USAGE, c]:>8.2f}{s[v.P_GOOD_PRIOR, c]:>9.2f}"
            )
        return "\n".join(lines)
