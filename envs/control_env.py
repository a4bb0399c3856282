"""`marginroute/Control-v0`: the controller's environment, one world or many, on the fluid surrogate or the engine."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar, Literal

import gymnasium
import numpy as np
from gymnasium import spaces
from gymnasium.vector import AutoresetMode, VectorEnv

from envs.control_plant import ControlPlant
from envs.control_worlds import EngineControl, FluidControl
from envs.scenario import Scenario, Split, load_scenario
from envs.worlds import FleetWorlds
from marginroute import control
from marginroute.control import CLIP, ControlLayout, ControlView
from marginroute.errors import InputError

Array = np.ndarray[Any, Any]
ENV_ID = "marginroute/Control-v0"
Clock = Literal["fluid", "engine"]
CLOCKS = ("fluid", "engine")


def make_worlds(
    scenario: str | Scenario | ControlPlant, n_worlds: int, clock: Clock, tick_s: float | None = None
) -> FluidControl | EngineControl:
    """N worlds of a scenario on a clock.

    Raises:
        InputError: an unknown clock, or a tick that is not positive.
    """
    if clock not in CLOCKS:
        raise InputError(f"clock {clock!r} is not legal; legal is {', '.join(CLOCKS)}")
    if tick_s is not None and not tick_s > 0.0:
        raise InputError(f"tick_s {tick_s!r} is not legal; legal is a number above 0")
    if not isinstance(scenario, ControlPlant):
        scenario = ControlPlant(load_scenario(scenario) if isinstance(scenario, str) else scenario, tick_s)
    if clock == "fluid":
        return FluidControl(scenario, n_worlds)
    return EngineControl(FleetWorlds(scenario.plant, n_worlds), scenario.layout)


def observation_space(layout: ControlLayout) -> spaces.Box:
    """The flat observation of one world."""
    return spaces.Box(-CLIP, CLIP, (len(control.observation_names(layout)),), np.float32)


def action_space(layout: ControlLayout) -> spaces.Box:
    """One number in [-1, 1] per lever; masked ones do nothing."""
    return spaces.Box(-1.0, 1.0, (len(layout.lever_names),), np.float32)


class ControlEnv(gymnasium.Env[Array, Array]):
    """Set the levers of a fleet once per control tick so that the margin of the day is largest.

    One step is one tick of `control.tick_s` seconds (the scenario's key). A plain gateway routes requests: to the
    least busy replica, spilled or shed as the levers say.

    | space | meaning |
    | --- | --- |
    | action `Box(-1, 1, (A,))` | cap and replicas by pool, release of held work, spill and shed by class |
    | observation `Box(-5, 5, (D,))` | hour; traffic and held work by class; pools; what providers' limits leave |

    `marginroute.control` says what a lever means, and `observation_names` there which column is which.

    **Reward**: change of the ledger in USD over the tick. The rewards of an episode add up to its margin to the cent.

    **Start**: an empty fleet with the scenario's replicas. **End**: never terminated, truncated at the horizon; the
    last step settles the backlog: requests in flight run to their end, held work is bought from the dearest provider.

    **Clocks**: `fluid` moves amounts of requests (tens of thousands of ticks per second), `engine` plays every request.
    Both have the same spaces, and `info["ledger_usd"]` (A, K + 1) has the same accounts.

    `reset(options={"seed": int})`: the episode of a given seed of the split. `info["action_mask"]` is (A,), 1 for the
    levers that the scenario has.

    Args:
        scenario: name, path or Scenario.
        clock: fluid or engine.
        split: which seeds episodes are drawn from: train, validation or heldout.
        tick_s: control tick; None: the scenario's.
        render_mode: None or "ansi".

    Version history: v0, the first.
    """

    metadata: ClassVar[dict[str, Any]] = {"render_modes": ["ansi"], "render_fps": 4}

    def __init__(
        self,
        scenario: str | Scenario | ControlPlant = "day_night",
        clock: Clock = "fluid",
        split: Split = "train",
        tick_s: float | None = None,
        render_mode: str | None = None,
    ) -> None:
        if render_mode not in (None, *self.metadata["render_modes"]):
            raise InputError(f"render_mode {render_mode!r} is not offered; legal: None, 'ansi'")
        self.render_mode, self._split = render_mode, split
        self.worlds = make_worlds(scenario, 1, clock, tick_s)
        self.layout = self.worlds.layout
        self.observation_space: spaces.Box = observation_space(self.layout)
        self.action_space: spaces.Box = action_space(self.layout)

    @property
    def view(self) -> ControlView:
        """What a controller sees now."""
        return self.worlds.view()

    def _info(self) -> dict[str, Any]:
        return {
            "action_mask": self.layout.mask.astype(np.int8),
            "lever_names": self.layout.lever_names,
            "now_s": float(self.worlds.tick[0] * self.layout.tick_s),
            "ledger_usd": self.worlds.ledger_usd[0].copy(),
        }

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Array, dict[str, Any]]:
        """Starts an episode."""
        super().reset(seed=seed)
        episode = int((options or {}).get("seed", self.np_random.integers(2**31)))
        self.worlds.load_seed(0, episode, self._split)
        return control.observe(self.worlds.view())[0], self._info()

    def step(self, action: Array) -> tuple[Array, float, bool, bool, dict[str, Any]]:
        """Sets the levers for one tick."""
        self.worlds.step(np.asarray(action)[None])
        observation = control.observe(self.worlds.view())[0]
        return observation, float(self.worlds.rewards_usd[0]), False, bool(self.worlds.done[0]), self._info()

    def render(self) -> str | None:  # type: ignore[override]
        """Time, money, and every pool and class as text."""
        if self.render_mode != "ansi":
            return None
        view, layout = self.view, self.layout
        lines = [
            f"t = {self.worlds.tick[0] * layout.tick_s / 3600.0:6.2f} h   "
            f"margin = {self.worlds.ledger_usd[0].sum():10.2f} USD",
            f"{'pool':<14}" + "".join(f"{name:>14}" for name in control.POOL_SIGNALS),
        ]
        for p, name in enumerate(layout.pool_names):
            lines.append(f"{name:<14}" + "".join(f"{x:>14.1f}" for x in view.pools[0, p]))
        for k, name in enumerate(layout.class_names):
            arrived, _, _, lost = view.classes[0, k]
            lines.append(f"{name:<14} arrived {arrived:8.1f}  lost {lost:8.1f}  held {view.held[0, k].sum():8.1f}")
        return "\n".join(lines)


class ControlVectorEnv(VectorEnv):
    """N worlds in one kernel call per tick: `gymnasium.make_vec("marginroute/Control-v0", num_envs=N)`.

    An ended world starts again in the same step; the last observation and info are in `final_obs` and `final_info`.

    Args:
        num_envs: N.
        scenario, clock, split, tick_s: as `ControlEnv`.
        render_mode: not offered for many worlds.
        **kwargs: ignored options of Gymnasium's registry (max_episode_steps).
    """

    metadata: ClassVar[dict[str, Any]] = {"render_modes": [], "autoreset_mode": AutoresetMode.SAME_STEP}

    def __init__(
        self,
        num_envs: int = 1,
        scenario: str | Scenario | ControlPlant = "day_night",
        clock: Clock = "fluid",
        split: Split = "train",
        tick_s: float | None = None,
        render_mode: str | None = None,
        **kwargs: Any,
    ) -> None:
        self.num_envs, self._split, self.render_mode = num_envs, split, render_mode
        self.worlds = make_worlds(scenario, num_envs, clock, tick_s)
        self.layout = self.worlds.layout
        self.single_observation_space, self.single_action_space = (
            observation_space(self.layout),
            action_space(self.layout),
        )
        self.observation_space = spaces.Box(-CLIP, CLIP, (num_envs, *self.single_observation_space.shape), np.float32)
        self.action_space = spaces.Box(-1.0, 1.0, (num_envs, *self.single_action_space.shape), np.float32)

    def _load(self, w: int) -> None:
        self.worlds.load_seed(w, int(self.np_random.integers(2**31)), self._split)

    def _info(self) -> dict[str, Any]:
        mask = np.tile(self.layout.mask.astype(np.int8), (self.num_envs, 1))
        return {"action_mask": mask, "now_s": self.worlds.tick * self.layout.tick_s}

    def reset(
        self, *, seed: int | Sequence[int] | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Array, dict[str, Any]]:
        """Starts an episode in every world."""
        super().reset(seed=seed if seed is None or isinstance(seed, int) else int(seed[0]))
        for w in range(self.num_envs):
            self._load(w)
        return control.observe(self.worlds.view()), self._info()

    def step(self, actions: Array) -> tuple[Array, Array, Array, Array, dict[str, Any]]:
        """One tick in every world."""
        self.worlds.step(np.asarray(actions))
        rewards, dones = self.worlds.rewards_usd.copy(), self.worlds.done
        observation, final = control.observe(self.worlds.view()), {}
        if dones.any():
            final_obs = np.full(self.num_envs, None, dtype=object)
            last_info = {**self._info(), "ledger_usd": self.worlds.ledger_usd.copy()}
            for w in np.flatnonzero(dones):
                final_obs[w] = observation[w]
                self._load(int(w))
            final = {"final_obs": final_obs, "_final_obs": dones, "final_info": last_info, "_final_info": dones}
            observation = control.observe(self.worlds.view())
        return observation, rewards, np.zeros(self.num_envs, dtype=np.bool_), dones, {**self._info(), **final}
