"""Counters of an adapter as Prometheus metrics; needs prometheus-client."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from marginroute.gateway import Gateway

DECISION_S = (25e-6, 50e-6, 1e-4, 2e-4, 5e-4, 1e-3, 2e-3, 5e-3, 0.01, 0.1, 1.0)  # upper bounds of the histogram


class Histogram:
    """How often something took how long."""

    def __init__(self) -> None:
        self.counts, self.sum_s = [0] * (len(DECISION_S) + 1), 0.0

    def add(self, seconds: float) -> None:
        """One more."""
        self.sum_s += seconds
        for i, bound_s in enumerate(DECISION_S):
            if seconds <= bound_s:
                self.counts[i] += 1
                return
        self.counts[-1] += 1

    def cumulative(self) -> list[tuple[str, float]]:
        """(upper bound, count up to it), as Prometheus wants them."""
        total, rows = 0, []
        for bound, count in zip((*map(str, DECISION_S), "+Inf"), self.counts, strict=True):
            total += count
            rows.append((bound, float(total)))
        return rows


class Source(Protocol):
    """What an adapter counts.

    Attributes:
        gateway: decides.
        took: time of decisions.
        errors: exceptions of ours by place; none of them reached a request.
    """

    gateway: Gateway
    took: Histogram
    errors: dict[str, int]


class _Collector:
    def __init__(self, source: Source) -> None:
        self._source = source

    def collect(self) -> Iterator[Any]:
        from prometheus_client import core

        desk, gateway = self._source, self._source.gateway
        status, layout = gateway.status(), gateway.bundle.layout
        decisions = core.CounterMetricFamily(
            "marginroute_decisions", "Decisions", labels=("candidate", "kind", "guard", "acting")
        )
        for (name, kind, guard, acting), count in list(gateway.decided.items()):
            decisions.add_metric((name, kind, guard, str(acting).lower()), count)
        yield decisions
        took = core.HistogramMetricFamily("marginroute_decision_seconds", "Time of a decision")
        took.add_metric((), desk.took.cumulative(), desk.took.sum_s)
        yield took
        errors = core.CounterMetricFamily("marginroute_errors", "Exceptions of ours, by place", labels=("place",))
        for place, count in list(desk.errors.items()):
            errors.add_metric((place,), count)
        yield errors
        in_flight = core.GaugeMetricFamily("marginroute_in_flight", "Requests in flight", labels=("candidate",))
        for name, count in zip(layout.names, gateway.state.counters()["in_flight"].tolist(), strict=True):
            in_flight.add_metric((name,), count)
        yield in_flight
        yield core.GaugeMetricFamily("marginroute_pending", "Decided and not finished", value=status["pending"])
        yield core.GaugeMetricFamily("marginroute_share", "Of requests that are acted on", value=status["share"])
        yield core.GaugeMetricFamily("marginroute_workers", "That share their counters", value=status["workers"])
        yield core.CounterMetricFamily("marginroute_rollbacks", "Returns to shadow mode", value=status["rollbacks"])
        yield from _guards(core, gateway)
        yield from _levers(core, status, gateway.replicas_wanted() is not None)
        info = core.InfoMetricFamily("marginroute_bundle", "What decides")
        info.add_metric((), {name: str(status[name]) for name in ("policy", "bundle", "mode", "state")})
        yield info


def _guards(core: Any, gateway: Gateway) -> Iterator[Any]:
    """Decisions of the guard, and those that candidates were left out of; requests beyond limits; drift by feature."""
    handed: dict[str, float] = {}
    for (_, _, guard, _), count in list(gateway.decided.items()):
        if guard:
            handed[guard] = handed.get(guard, 0.0) + count
    family = core.CounterMetricFamily("marginroute_guard", "Decisions of the guard, by reason", labels=("guard",))
    for guard, number in handed.items():
        family.add_metric((guard,), number)
    yield family
    family = core.CounterMetricFamily(
        "marginroute_stale", "Decisions that a replica was left out of, its scrape being too old", labels=("candidate",)
    )
    for name, number in list(gateway.left_out.items()):
        family.add_metric((name,), number)
    yield family
    family = core.CounterMetricFamily(
        "marginroute_rate_limited",
        "Decisions that a provider was left out of, its rate limit being spent",
        labels=("candidate",),
    )
    for c, number in list(gateway.state.rates.left_out.items()):
        family.add_metric((gateway.bundle.layout.names[c],), number)
    yield family
    monitor = gateway.drift
    if monitor is not None:
        drifted = float(monitor.drifted)
        yield core.GaugeMetricFamily("marginroute_drifted", "1 while the fallback decides", value=drifted)
        by_feature = core.GaugeMetricFamily(
            "marginroute_drift", "Of recent requests against training", labels=("feature", "measure")
        )
        for name, (psi, ks) in monitor.values().items():
            by_feature.add_metric((name, "psi"), psi)
            by_feature.add_metric((name, "ks"), ks)
        yield by_feature


def _levers(core: Any, status: dict[str, Any], acting: bool) -> Iterator[Any]:
    """What waits, and the controller's levers, where there are any."""
    if "held" in status:
        yield core.GaugeMetricFamily("marginroute_held", "Batch work that waits", value=status["held"])
        yield core.GaugeMetricFamily("marginroute_queued", "Requests that wait for room", value=status["queued"])
        yield core.CounterMetricFamily(
            "marginroute_control_errors", "Control ticks that failed", value=status["control_errors"]
        )
    if "replicas" not in status:
        return
    wanted = core.GaugeMetricFamily(
        "marginroute_replicas_wanted", "For an autoscaler, where acting is true", labels=("pool", "acting")
    )
    for pool, count in status["replicas"].items():
        wanted.add_metric((pool, str(acting).lower()), count)
    yield wanted
    for name, about, label in (
        ("in_flight_caps", "In-flight cap of a replica", "pool"),
        ("spill_share", "Share of a class that providers get", "class"),
        ("shed_share", "Share of a class that is turned away", "class"),
    ):
        family = core.GaugeMetricFamily(f"marginroute_{name}", about, labels=(label,))
        for key, value in status[name].items():
            family.add_metric((key,), value)
        yield family
    rate = status["release_per_s"]
    yield core.GaugeMetricFamily(
        "marginroute_release_per_second", "Held work released", value=float("inf") if rate is None else rate
    )


def scale(gateway: Gateway) -> tuple[int, str, bytes]:
    """`/v1/scale`: status, type and body; replicas wanted, none while the controller must not act."""
    wanted = gateway.replicas_wanted()
    if wanted is None:
        said = {"error": "nothing is to be scaled: there is no controller, or it may not act"}
        return 409, "application/json", json.dumps(said).encode()
    pools = {name: {"replicas": count} for name, count in wanted.items()}
    return 200, "application/json", json.dumps({"pools": pools}).encode()


def exposition(source: Source) -> bytes:
    """All metrics as text."""
    from prometheus_client import CollectorRegistry, generate_latest

    registry = CollectorRegistry(auto_describe=False)
    registry.register(_Collector(source))
    return bytes(generate_latest(registry))
