"""One held-out episode as pictures, evenly over its time."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from envs.live_view import Array, LiveView
from envs.plant import Plant
from envs.progress import Progress, silent
from envs.worlds import FleetWorlds

if TYPE_CHECKING:
    from envs.scenario import Scenario
    from marginroute.policy import Policy

FRAMES = 96
FRAMES_PER_S = 8.0


def pictures(
    scenario: Scenario, policy: Policy, seed: int = 0, frames: int = FRAMES, progress: Progress = silent
) -> list[Array]:
    """Plays a policy and draws its fleet.

    Args:
        scenario: the world.
        policy: decides.
        seed: of the held-out episode.
        frames: how many pictures, fewer where decisions are.
        progress: called with pictures drawn and pictures in all.

    Returns:
        Pictures, (height, width, 3) uint8 each; the last one is of the end, when everything is settled.
    """
    plant = Plant(scenario)
    workload = scenario.generate(seed, "heldout")
    worlds = FleetWorlds(plant, 1)
    worlds.load_all([workload])
    worlds.follow(policy)
    view = LiveView(plant, f"{scenario.name}: {policy.name}")
    drawn: list[Array] = []
    every_s, last = workload.horizon_s / max(frames - 1, 1), ""
    while not worlds.done[0]:
        if float(worlds.desks["now_s"][0]) >= len(drawn) * every_s:
            drawn.append(view.frame(worlds, last=last))
            progress(min(len(drawn), frames), frames)
        choice = int(np.asarray(policy.decide_batch(worlds.view())).reshape(-1)[0])
        last = plant.layout.names[choice]
        worlds.step(np.array([choice]))
    drawn.append(view.frame(worlds, last="settled"))
    progress(frames, frames)
    return drawn
