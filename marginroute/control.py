"""The controller's side of the gateway: what it sees at a control tick, and what its levers mean; numpy only.

A controller decides once per tick (seconds to minutes) how many replicas each pool shall have, how many requests one of
them may have at once, how fast held batch work is released, and which shares of each class are spilled to providers
or shed. The same functions build observations in the fluid surrogate, on the engine and in a gateway, for any number of
worlds at once.

Shapes: N worlds (first axis), P pools, K classes, V providers, A levers, H hours of the season, G parts of a deadline,
X prices that may differ from the usual.

Levers, each in [-1, 1] (`ControlLayout.lever_names`), x = (lever + 1) / 2:

| lever | what it means | who carries it out, and when |
| --- | --- | --- |
| `cap:POOL` | in-flight cap per replica = slots 2^(4 x - 3), 1 or more | gateway, now |
| `replicas:POOL` | round(min + x (max - min)) replicas | autoscaler, after provisioning and loading |
| `release` | x^2 times what all replicas together can serve, requests/s; x = 0: only what is due | gateway, now |
| `spill:CLASS` | share x of its requests goes to providers, as far as their limits allow | gateway, now |
| `shed:CLASS` | share x of its requests is turned away | gateway, now |

`ControlLayout.mask` says which levers a scenario has: pools that cannot scale, classes without providers or batch work
have fixed ones. Levers that are masked do nothing.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from functools import cached_property
from typing import Any

import numpy as np

Array = np.ndarray[Any, Any]

CONTROL_VERSION = 2
DAY_S = 86400.0
FAST_S, SLOW_S = 600.0, 7200.0  # time constants of the two levels of traffic
AGES = 4  # G
AHEAD_S = (600.0, 3600.0, 10800.0, 21600.0)  # forecasts of the observation
CLIP = 5.0
CAP_OCTAVES = (-3.0, 1.0)

POOL_SIGNALS = ("ready", "starting", "draining", "next_ready_s", "in_flight", "waiting", "target", "cap")
(READY, STARTING, DRAINING, NEXT_READY_S, IN_FLIGHT, WAITING, TARGET, CAP) = range(8)
CLASS_SIGNALS = ("arrived", "served", "slo_ok", "lost")  # in the last tick
(ARRIVED, SERVED, SLO_OK, LOST) = range(4)


@dataclass(frozen=True, eq=False)
class ControlLayout:
    """What there is to control, and what an operator knows of it beforehand.

    Attributes:
        pool_names, class_names, provider_names: P, K and V names.
        tick_s: seconds between two decisions.
        min_replicas, max_replicas, start_replicas: (P,).
        slots: (P,) sequences of a replica.
        lag_s: (P,) from an order of a replica to its first request.
        requests_per_s: (P,) throughput of one full replica under the usual mix, by a load test.
        deadline_s: (K,) until which a class may be held; inf: not at all.
        season_per_s: (H, K) usual arrivals at H even times of the day, joined by straight lines.
        allowance: (V,) size of a provider's token bucket in requests.
        refill_per_s: (V,) requests per second that it fills with.
        price_names: X, `gpu:POOL`, `api:PROVIDER` or `call:CLASS`: those that differ in a family of scenarios.
        usual_usd: (X,) what they are as a rule; units as in `ControlView.prices_usd`.
    """

    pool_names: tuple[str, ...]
    class_names: tuple[str, ...]
    provider_names: tuple[str, ...]
    tick_s: float
    min_replicas: Array
    max_replicas: Array
    start_replicas: Array
    slots: Array
    lag_s: Array
    requests_per_s: Array
    deadline_s: Array
    season_per_s: Array
    allowance: Array
    refill_per_s: Array
    price_names: tuple[str, ...] = ()
    usual_usd: Array = field(default_factory=lambda: np.zeros(0))

    @cached_property
    def lever_names(self) -> tuple[str, ...]:
        """(A,) names, in the order of an action."""
        pools, classes = self.pool_names, self.class_names
        return (
            *(f"cap:{name}" for name in pools),
            *(f"replicas:{name}" for name in pools),
            "release",
            *(f"spill:{name}" for name in classes),
            *(f"shed:{name}" for name in classes),
        )

    @cached_property
    def mask(self) -> Array:
        """(A,) bool, levers that do something in this scenario."""
        k, holds = len(self.class_names), np.isfinite(self.deadline_s)
        parts = [
            np.ones(len(self.pool_names)),
            self.max_replicas > self.min_replicas,
            [holds.any()],
            np.full(k, len(self.provider_names) > 0),
            np.ones(k),
        ]
        return np.concatenate(parts).astype(np.bool_)

    @property
    def holds(self) -> Array:
        """(K,) bool, classes that may wait."""
        return np.isfinite(self.deadline_s)

    @property
    def top_per_s(self) -> float:
        """Requests per second of all replicas that there can be."""
        return float(self.max_replicas @ self.requests_per_s)

    def season(self, time_s: Array) -> Array:
        """Usual arrivals per second (..., K) at times of the day (...,)."""
        hours = len(self.season_per_s)
        at = np.asarray(time_s, dtype=np.float64) % DAY_S / DAY_S * hours
        left = at.astype(np.int64) % hours
        right = (at - np.floor(at))[..., None]
        return self.season_per_s[left] * (1.0 - right) + self.season_per_s[(left + 1) % hours] * right

    def to_dict(self) -> dict[str, Any]:
        """Plain data; infinities stay floats."""
        return {key: x.tolist() if isinstance(x, np.ndarray) else x for key, x in asdict(self).items()}

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> ControlLayout:
        """The layout that `to_dict` wrote; infinities may be strings."""
        names = {key: tuple(data[key]) for key in ("pool_names", "class_names", "provider_names", "price_names")}
        arrays = {
            key: np.array(data[key], dtype=np.float64).reshape(-1, len(names["class_names"]))
            if key == "season_per_s"
            else np.array([float(x) for x in data[key]])
            for key in cls.__dataclass_fields__
            if key not in names and key != "tick_s"
        }
        return cls(**names, tick_s=float(data["tick_s"]), **arrays)


@dataclass(frozen=True, eq=False)
class ControlView:
    """What a controller can know at a tick.

    Attributes:
        layout: what there is.
        time_s: (N,) seconds since Monday 0:00.
        fresh: (N,) bool, first tick of a world.
        pools: (N, P, 8), `POOL_SIGNALS`; requests and replicas; next_ready_s is 0 where nothing is on its way.
        classes: (N, K, 4), `CLASS_SIGNALS`, requests of the last tick.
        held: (N, K, G) held requests by the part of their deadline that has passed.
        fast, slow: (N, K) arrivals relative to the season, averaged over `FAST_S` and `SLOW_S`.
        allowance: (N, V) calls that the providers' limits leave now.
        prices_usd: (N, X) of a replica-hour, of a provider's tokens, and of a class's call; None: the usual ones.
    """

    layout: ControlLayout
    time_s: Array
    fresh: Array
    pools: Array
    classes: Array
    held: Array
    fast: Array
    slow: Array
    allowance: Array
    prices_usd: Array | None = None

    def forecast_per_s(self, ahead_s: float | Array, trend: float | Array = 0.0) -> Array:
        """Arrivals per second (N, K) expected `ahead_s` from now: season times level, and a share of its trend."""
        level = np.maximum(self.slow + trend * (self.fast - self.slow), 0.0)
        return self.layout.season(self.time_s + ahead_s) * level


class Levels:
    """Moving averages of arrivals over what the season lets expect, for N worlds.

    level = sum_i a^i arrived_i / sum_i a^i expected_i with a = exp(-tick / tau), begun at 1 with the weight of tau.
    """

    def __init__(self, layout: ControlLayout, n_worlds: int) -> None:
        self._layout = layout
        shape = (n_worlds, len(layout.class_names))
        self._seen, self._expected = (np.ones((2, *shape)) for _ in range(2))
        self._keep = np.exp(-layout.tick_s / np.array([FAST_S, SLOW_S]))[:, None, None]
        self._begin = np.array([FAST_S, SLOW_S])[:, None]

    def reset(self, worlds: Array | slice, time_s: Array, levels: float | Array = 1.0) -> None:
        """Starts worlds anew at times of the day (n,), where fast and slow level stand at `levels` (2, n, K)."""
        usual = np.maximum(self._layout.season(time_s), 1e-9)
        self._expected[:, worlds] = self._begin[..., None] * usual
        self._seen[:, worlds] = levels * self._expected[:, worlds]

    def update(self, arrived: Array, time_s: Array) -> None:
        """Takes in the arrivals (N, K) of the tick that ended at `time_s` (N,)."""
        usual = self._layout.season(time_s - 0.5 * self._layout.tick_s) * self._layout.tick_s
        self._seen = self._keep * self._seen + arrived
        self._expected = self._keep * self._expected + np.maximum(usual, 1e-9)

    @property
    def fast(self) -> Array:
        """(N, K)."""
        return self._seen[0] / self._expected[0]

    @property
    def slow(self) -> Array:
        """(N, K)."""
        return self._seen[1] / self._expected[1]


@dataclass(frozen=True, eq=False)
class Levers:
    """Levers in physical units.

    Attributes:
        caps: (N, P) in-flight cap per replica, whole.
        replicas: (N, P) wanted, whole.
        release_per_s: (N,) held requests per second.
        spill_share, shed_share: (N, K).
    """

    caps: Array
    replicas: Array
    release_per_s: Array
    spill_share: Array
    shed_share: Array


def decode(layout: ControlLayout, action: Array) -> Levers:
    """What actions (N, A) mean; values outside [-1, 1] are brought inside, masked levers stand at what does nothing."""
    p, k = len(layout.pool_names), len(layout.class_names)
    x = 0.5 * (np.clip(np.nan_to_num(action, nan=0.0), -1.0, 1.0) + 1.0)
    cap, replicas, release, spill, shed = np.split(x, [p, 2 * p, 2 * p + 1, 2 * p + 1 + k], axis=-1)
    low, high = CAP_OCTAVES
    caps = np.maximum(np.rint(layout.slots * 2.0 ** (low + (high - low) * cap)), 1.0)
    span = layout.max_replicas - layout.min_replicas
    release_per_s = layout.top_per_s * np.square(release[..., 0])
    if not layout.holds.any():
        release_per_s = np.full_like(release_per_s, np.inf)
    return Levers(
        caps=caps,
        replicas=np.rint(layout.min_replicas + span * replicas),
        release_per_s=release_per_s,
        spill_share=spill if layout.provider_names else np.zeros_like(spill),
        shed_share=shed,
    )


def encode(layout: ControlLayout, levers: Levers) -> Array:
    """Actions (N, A) that mean these levers, as far as they can be reached; masked ones are -1."""
    low, high = CAP_OCTAVES
    span = np.maximum(layout.max_replicas - layout.min_replicas, 1e-9)
    parts = [
        (np.log2(np.maximum(levers.caps, 1e-9) / layout.slots) - low) / (high - low),
        (levers.replicas - layout.min_replicas) / span,
        np.sqrt(np.clip(levers.release_per_s / layout.top_per_s, 0.0, 1.0))[..., None],
        levers.spill_share,
        levers.shed_share,
    ]
    x = np.clip(np.concatenate(parts, axis=-1), 0.0, 1.0)
    return np.where(layout.mask, 2.0 * x - 1.0, -1.0)


def observation_names(layout: ControlLayout) -> tuple[str, ...]:
    """(D,) names of the observation's columns."""
    hours = [f"day_{wave}{n}" for n in (1, 2) for wave in ("sin", "cos")]
    per_class = (
        "fast",
        "slow",
        *(f"forecast_{int(ahead_s)}s" for ahead_s in AHEAD_S),
        *(f"held_{g}" for g in range(AGES)),
        "slo_missed",
        "lost",
    )
    per_pool = ("ready", "starting", "draining", "next_ready", "fill", "waiting", "target", "cap")
    return (
        *hours,
        *(f"{name}:{of}" for of in layout.class_names for name in per_class),
        *(f"{name}:{of}" for of in layout.pool_names for name in per_pool),
        *(f"allowance:{of}" for of in layout.provider_names),
        *(f"price:{of}" for of in layout.price_names),
    )


def observe(view: ControlView) -> Array:
    """(N, D) float32 within +-`CLIP`: the columns of `observation_names`.

    Rates are in the throughput of all replicas that there can be, held work in what those serve in an hour, replicas in
    the pool's largest number, requests in sequence slots of the ready replicas, prices as logarithms of their ratio to
    the usual ones.
    """
    layout, n = view.layout, len(view.time_s)
    angle = 2.0 * np.pi / DAY_S * view.time_s
    hours = [np.sin(angle), np.cos(angle), np.sin(2.0 * angle), np.cos(2.0 * angle)]
    forecasts = [view.forecast_per_s(ahead_s) / layout.top_per_s for ahead_s in AHEAD_S]
    calls = np.maximum(view.classes[..., ARRIVED], 1.0)
    missed = 1.0 - view.classes[..., SLO_OK] / np.maximum(view.classes[..., SERVED], 1e-9)
    of_class = np.stack(
        [
            view.fast - 1.0,
            view.slow - 1.0,
            *forecasts,
            *np.moveaxis(view.held / (3600.0 * layout.top_per_s), -1, 0),
            np.where(view.classes[..., SERVED] > 0.5, missed, 0.0),
            view.classes[..., LOST] / calls,
        ],
        axis=-1,
    )
    pools, most = view.pools, layout.max_replicas
    room = np.maximum(pools[..., READY], 1.0) * layout.slots
    of_pool = np.stack(
        [
            pools[..., READY] / most,
            pools[..., STARTING] / most,
            pools[..., DRAINING] / most,
            pools[..., NEXT_READY_S] / np.maximum(layout.lag_s, 1.0),
            pools[..., IN_FLIGHT] / room,
            pools[..., WAITING] / room,
            pools[..., TARGET] / most,
            np.log2(np.maximum(pools[..., CAP], 1.0) / layout.slots),
        ],
        axis=-1,
    )
    parts = [np.stack(hours, axis=-1), of_class.reshape(n, -1), of_pool.reshape(n, -1)]
    if layout.provider_names:
        parts.append(view.allowance / np.maximum(layout.allowance, 1e-9))
    if layout.price_names:
        now_usd = layout.usual_usd if view.prices_usd is None else view.prices_usd
        parts.append(np.broadcast_to(np.log(now_usd / layout.usual_usd), (n, len(layout.price_names))))
    return np.clip(np.concatenate(parts, axis=-1), -CLIP, CLIP).astype(np.float32)
