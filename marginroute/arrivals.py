"""How many requests per second a gateway gets, by a running mean of the gaps between them."""

from __future__ import annotations

from marginroute.latency import RECENT_ARRIVALS, running_mean


class Arrivals:
    """Not thread-safe (see `telemetry.GatewayState`).

    Args:
        now_s: of the gateway's clock.

    Attributes:
        gap_s: mean of recent gaps.
    """

    def __init__(self, now_s: float) -> None:
        self.gap_s, self._count, self._last_s = 0.0, 0, now_s

    def note(self, now_s: float) -> None:
        """A request arrives."""
        self.gap_s, _ = running_mean(self.gap_s, self._count, now_s - self._last_s, RECENT_ARRIVALS)
        self._count += 1
        self._last_s = now_s

    @property
    def per_s(self) -> float:
        """Requests per second, as of the last one."""
        return 1.0 / max(self.gap_s, 1e-6)

    def per_s_at(self, now_s: float) -> float:
        """Requests per second as of now: 0 before the first two, and less and less once it has been quiet for long."""
        quiet_s = now_s - self._last_s
        return 0.0 if self._count < 2 else 1.0 / max(self.gap_s, quiet_s / RECENT_ARRIVALS, 1e-6)

    def take_over(self, old: Arrivals) -> None:
        """Goes on where those of an earlier bundle end."""
        self.gap_s, self._count, self._last_s = old.gap_s, old._count, old._last_s
