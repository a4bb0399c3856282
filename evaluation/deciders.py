"""Router and controller together as one entrant of a comparison.

A controller sets levers once per tick, the router decides what they leave open (`envs.control_worlds.EngineControl`).
Without a router the plain gateway routes: to the least busy replica of the pool that is behind its share.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from marginroute.control_rules import Controller
from marginroute.decision import Decision
from marginroute.policy import Policy
from marginroute.quality import FittedQuality
from marginroute.view import Array, Layout, View

if TYPE_CHECKING:
    from envs.worlds import FleetWorlds

PLAIN = "plain"  # the gateway without a router


@dataclass(frozen=True, eq=False)
class Deciders:
    """Who decides on requests, and who sets the levers.

    Attributes:
        controller: sets the levers.
        router: decides on requests; None: the plain gateway.
    """

    controller: Controller
    router: Policy | None = None

    @property
    def name(self) -> str:
        """Router + controller."""
        return f"{PLAIN if self.router is None else self.router.name} + {self.controller.name}"

    def decide(self, view: View) -> Decision:
        """The router's decision under the levers of the moment."""
        assert self.router is not None, "the plain gateway explains nothing"
        return self.router.decide(view)

    def decide_batch(self, view: View) -> Array:
        """The router's choices under the levers of the moment."""
        assert self.router is not None, "the plain gateway is played by its kernel"
        return np.asarray(self.router.decide_batch(view))

    def in_flight_caps(self, layout: Layout, slots: Array) -> Array | None:
        """None: caps are levers."""
        return None

    @property
    def quality(self) -> FittedQuality | None:
        """The router's; None: there is none."""
        return None if self.router is None else self.router.quality

    def run(self, worlds: FleetWorlds, max_ticks: int | None = None) -> None:
        """Plays loaded worlds until all are settled, or for `max_ticks`."""
        from envs.control_worlds import EngineControl

        worlds.expect(self.quality)
        EngineControl(worlds, self.controller.layout, self.router).run(self.controller, max_ticks)
