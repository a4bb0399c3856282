"""From an operator's settings to a running gateway; the same keys for every adapter."""

from __future__ import annotations

import json
import logging
import math
import os
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from marginroute import bundle as bundles
from marginroute.bundle import Bundle
from marginroute.errors import InputError
from marginroute.feedback import QualityPosterior, load_posterior
from marginroute.gateway import Gateway
from marginroute.limits import limits_from
from marginroute.modes import ModeSettings
from marginroute.rate_limits import check_providers, rate_limits_from
from marginroute.record_log import AuditLog
from marginroute.reload import BundleWatch
from marginroute.rollback import RollbackLimits
from marginroute.scrape import Scraper
from marginroute.shared import SharedCounters
from marginroute.spans import TracedRecords

log = logging.getLogger("marginroute.gateway")

ABOVE_0 = (
    "stale_after_s",
    "hold_s",
    "lease_s",
    "max_body_bytes",
    "request_timeout_s",
    "assumed_answer_s",
    "max_hold_s",
)  # settings of any adapter, and finite
MOST_EVENT_BYTES = 1 << 16  # of the end of an event log that is read at the start


@dataclass(frozen=True)
class OperationSettings:
    """What the operator sets for any adapter.

    Attributes:
        bundle: folder written by export.py.
        log: JSONL file that decision records are appended to; rollbacks and swaps go to NAME.events.jsonl beside it.
        default_class: class of requests that name none; empty: the bundle's first.
        default_task: task type of requests that name none; empty: the bundle's first.
        mode: `shadow`, `canary` or `live`.
        canary_share: of tenants, sessions or requests that a canary acts on.
        canary_by: `tenant`, `session` or `request`.
        canary_tenants: acted on in a canary whatever their hash says.
        rollback: limits (see `rollback.RollbackLimits`).
        explore_share: of the decisions acted on that are drawn among near equals; 0: none.
        explore_limit_usd: expected USD that a drawn decision may cost at most.
        stale_after_s: silence after which a request is written off.
        feedback: file of `marginroute feedback` that corrects P(good); empty: none.
        prefix_block_tokens: tokens, about, per block hash of a prompt; 0: prompts are not hashed.
        telemetry: metrics page of each replica that is to be scraped, by candidate.
        telemetry_s: seconds between two scrapes of a page.
        telemetry_timeout_s: after which one is given up.
        reload_s: seconds between two looks for a new bundle (and feedback); null: never.
        log_max_bytes: size at which the log is rotated; 0: never.
        log_keep: rotated logs that stay.
        log_fsync_s: seconds after which the log is forced to the disk; null: the operating system decides.
        priority: by class, from 1 (first) up; classes without one come last.
        hold_s: batch work is due twice this long before its deadline; without a controller it comes back after it.
        shared: URL of a Redis through which workers share their counters; empty: each has its own.
        shared_s: seconds between two exchanges; shared_prefix: of the keys.
        otel: an OpenTelemetry span per decision, exported as the OTEL_* variables say.
        limits: on spend, rate and retries (see `limits`).
        rate_limits: of providers, by name, in place of the bundle's (see `rate_limits.RateLimit`).
        lease_s: that the place of a waiting request is kept while its caller is not on the line.
    """

    bundle: str
    log: str
    default_class: str = ""
    default_task: str = ""
    mode: str = "shadow"
    canary_share: float = 0.05
    canary_by: str = "tenant"
    canary_tenants: tuple[str, ...] = ()
    rollback: Mapping[str, Any] = field(default_factory=dict)
    explore_share: float = 0.0
    explore_limit_usd: float = 0.0
    stale_after_s: float = 7200.0
    feedback: str = ""
    prefix_block_tokens: int = 64
    telemetry: Mapping[str, str] = field(default_factory=dict)
    telemetry_s: float = 1.0
    telemetry_timeout_s: float = 1.0
    reload_s: float | None = 5.0
    log_max_bytes: int = 256 << 20
    log_keep: int = 10
    log_fsync_s: float | None = None
    priority: Mapping[str, int] = field(default_factory=dict)
    hold_s: float = 60.0
    lease_s: float = 30.0
    limits: Sequence[Mapping[str, Any]] = ()
    rate_limits: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    shared: str = ""
    shared_s: float = 0.2
    shared_prefix: str = "marginroute"
    otel: bool = False

    def modes(self) -> ModeSettings:
        """How far the bundle may act.

        Raises:
            InputError: a value that is not legal.
        """
        known = [f.name for f in fields(RollbackLimits)]
        if not isinstance(self.rollback, Mapping):
            raise InputError(f"rollback must map limits to values; legal: {', '.join(known)}")
        unknown = next((key for key in self.rollback if key not in known), None)
        if unknown is not None:
            raise InputError(f"rollback.{unknown} is unknown; legal: {', '.join(known)}")
        limits = RollbackLimits(**self.rollback)
        return ModeSettings(self.mode, self.canary_share, self.canary_by, tuple(self.canary_tenants), limits)

    def watched(self) -> list[Path]:
        """Files whose change means a new bundle."""
        return [Path(self.bundle) / "manifest.json", *([Path(self.feedback)] if self.feedback else [])]

    def load(self) -> tuple[Bundle, QualityPosterior | None]:
        """The bundle and the feedback, as they are on the disk now.

        Raises:
            InputError: one of them is unusable.
        """
        return bundles.load(self.bundle), load_posterior(self.feedback) if self.feedback else None


def open_gateway(
    settings: OperationSettings, can: Collection[str] = ("shed",), clock: Callable[[], float] = time.monotonic
) -> Gateway:
    """A gateway with its log.

    Args:
        settings: of the operator.
        can: what the gateway can do beside sending a request on (see `telemetry.GatewayState`).
        clock: seconds that never jump.

    Raises:
        InputError: a setting, the bundle or the log is unusable.
    """
    if settings.prefix_block_tokens < 0:
        raise InputError(f"prefix_block_tokens {settings.prefix_block_tokens} is not legal; legal is 0 (none) or more")
    modes, (bundle, posterior) = settings.modes(), settings.load()
    limits, rate_limits = limits_from(settings.limits), rate_limits_from(settings.rate_limits)
    check_providers(rate_limits, bundle.layout)
    check_priority(settings.priority, bundle.layout.class_names)
    for name in ABOVE_0:
        if not 0.0 < getattr(settings, name, 1.0) < math.inf:
            raise InputError(f"{name} = {getattr(settings, name)}; legal is a finite number above 0")
    records = AuditLog(settings.log, settings.log_max_bytes, settings.log_keep, settings.log_fsync_s)
    events = AuditLog(event_path(settings.log), max_bytes=1 << 24, keep=1, fsync_s=0.0)
    explore = (settings.explore_share, settings.explore_limit_usd) if settings.explore_share else None
    gateway = Gateway(
        bundle,
        TracedRecords(records) if settings.otel else records,
        modes,
        can,
        settings.stale_after_s,
        settings.prefix_block_tokens,
        posterior,
        explore,
        clock,
        on_event=events.write,
        waiting=(settings.hold_s, settings.lease_s),
        priority=settings.priority,
        limits=limits,
        rate_limits=rate_limits,
    )
    if settings.reload_s is not None:
        watch = BundleWatch(gateway, settings.load, settings.watched(), settings.reload_s, events.write)
        gateway.keep(watch.start())
    if settings.telemetry:
        every_s, timeout_s = settings.telemetry_s, settings.telemetry_timeout_s
        gateway.keep(Scraper(gateway, settings.telemetry, every_s, timeout_s).start())
    if settings.shared:
        gateway.keep(SharedCounters(gateway, settings.shared, settings.shared_s, settings.shared_prefix).start())
    if (rest := rollback_in_force(event_path(settings.log))) is not None:
        gateway.switch.resume_rolled_back(*rest)
    log.warning(
        "marginroute: %s mode, %s %s, records in %s", modes.mode, bundle.policy.name, bundle.digest[:12], settings.log
    )
    return gateway


def check_priority(priority: Mapping[str, Any], class_names: tuple[str, ...]) -> None:
    """Raises InputError at a class that the bundle does not know, or a priority that is none."""
    for name, number in priority.items():
        if name not in class_names:
            raise InputError(f"priority of {name!r}: no class of the bundle; legal: {', '.join(class_names)}")
        if not isinstance(number, int) or isinstance(number, bool) or number < 1:
            raise InputError(f"priority of {name!r} = {number!r}; legal is a whole number from 1 (first) up")


def event_path(path: str | Path) -> Path:
    """Where the events of a log go: `decisions.jsonl` -> `decisions.events.jsonl`."""
    return Path(path).with_suffix(".events.jsonl")


def rollback_in_force(path: Path) -> tuple[float, str] | None:
    """(seconds left, reason) of a rollback that an earlier process wrote last and that still holds."""
    try:
        with open(path, "rb") as file:
            file.seek(max(os.fstat(file.fileno()).st_size - MOST_EVENT_BYTES, 0))
            lines = file.read().splitlines()
    except OSError:
        return None
    for line in reversed(lines):
        try:
            event = json.loads(line)
            if event["event"] == "bundle":
                continue
            left_s = float(event["until_s"]) - time.time() if event["event"] == "rollback" else 0.0
        except (ValueError, KeyError, TypeError):
            continue
        return (left_s, str(event.get("reason", ""))) if left_s > 0.0 else None
    return None
