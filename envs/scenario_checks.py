"""What no single key can tell: checks across the sections of a scenario."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import product
from typing import TYPE_CHECKING

from envs import scenario_drift
from marginroute.errors import suggestion

if TYPE_CHECKING:
    from envs.scenario import Scenario
    from envs.scenario_pools import Pool
    from envs.scenario_sessions import SessionSection

Problem = tuple[str, str]  # dotted key path, sentence


def problems(scenario: Scenario) -> Iterator[Problem]:
    """Every contradiction between sections, as key path and what is legal there."""
    yield from _fleet(scenario)
    yield from _plans(scenario)
    yield from _workload(scenario)
    yield from _memory(scenario)
    for path, word, legal in scenario_drift.named(scenario):
        yield from _unknown(path, word, legal)


def _unknown(path: str, word: str, names: Iterable[str]) -> Iterator[Problem]:
    names = list(names)
    if word not in names:
        yield path, f"unknown name {word!r}{suggestion(word, names)}"


def _fleet(scenario: Scenario) -> Iterator[Problem]:
    fleet = scenario.fleet
    for name, pool in fleet.pools.items():
        yield from _unknown(f"fleet.pools.{name}.tier", pool.tier, fleet.tiers)
        if pool.max_num_batched_tokens < pool.max_num_seqs:
            yield (
                f"fleet.pools.{name}.max_num_batched_tokens",
                f"{pool.max_num_batched_tokens} is below max_num_seqs; legal is at least {pool.max_num_seqs}, "
                "so that every running request gets its token",
            )
        yield from _speculation(name, pool)
        if pool.scheduling_policy == "priority" and pool.scheduler != "vllm-v1":
            path = f"fleet.pools.{name}.scheduling_policy"
            yield path, f"is priority with scheduler {pool.scheduler}; legal is fcfs, or scheduler vllm-v1"
    sizes = {name: pool.block_size_tokens for name, pool in fleet.pools.items() if pool.prefix_caching}
    for name, size in sizes.items():
        first = next(iter(sizes.values()))
        if size != first:
            legal = f"legal is {first}, as in the first pool with prefix_caching"
            yield f"fleet.pools.{name}.block_size_tokens", f"{size} differs between caching pools; {legal}"
    for name, provider in fleet.providers.items():
        yield from _unknown(f"fleet.providers.{name}.tier", provider.tier, fleet.tiers)
    yield from _faults(scenario)
    clashes = [name for name in fleet.providers if name in fleet.pools or name in ("cache", "defer", "shed")]
    for name in clashes:
        yield f"fleet.providers.{name}", "name is taken by a pool or an action; legal is a name of its own"
    for name, tier in fleet.tiers.items():
        path = f"fleet.tiers.{name}.quality.ability"
        missing = [task for task in scenario.workload.tasks if task not in tier.quality.ability]
        if missing:
            legal = ", ".join(scenario.workload.tasks)
            yield path, f"has no figure for {', '.join(missing)}; legal is one for each of the tasks {legal}"
        first_name, first = next(iter(fleet.tiers.items()))
        count, legal_count = len(tier.quality.loadings), len(first.quality.loadings)
        if count != legal_count:
            path = f"fleet.tiers.{name}.quality.loadings"
            yield path, f"has {count} figures; legal is {legal_count}, as many as tier {first_name} has"


def _faults(scenario: Scenario) -> Iterator[Problem]:
    """Explicit faults hit something that is there."""
    fleet = scenario.fleet
    for row, event in enumerate(fleet.faults):
        path = f"fleet.faults.{row}"
        if event.provider is not None:
            yield from _unknown(f"{path}.provider", event.provider, fleet.providers)
            if event.index:
                yield f"{path}.index", f"{event.index} with a provider; legal is none, a provider has no replicas"
            continue
        yield from _unknown(f"{path}.pool", event.pool or "", fleet.pools)
        pool = fleet.pools.get(event.pool or "")
        if pool is not None and event.index >= pool.rows:
            yield f"{path}.index", f"{event.index}; legal is 0 to {pool.rows - 1}, the replicas of {event.pool}"
        elif pool is not None and event.reclaimed and event.index < pool.first_spot:
            spot = f"{pool.first_spot} to {pool.rows - 1}" if pool.spot else "a pool with spot"
            yield f"{path}.index", f"{event.index} is no spot replica of {event.pool}; legal is {spot}"


def _speculation(name: str, pool: Pool) -> Iterator[Problem]:
    """Every decode that speculates has its draft tokens and one more in the budget."""
    if pool.speculation is not None:
        decodes = min(pool.max_num_seqs, pool.speculation.max_batch or pool.max_num_seqs)
        least = decodes * (1 + pool.speculation.draft_tokens)
        if pool.max_num_batched_tokens < least:
            yield (
                f"fleet.pools.{name}.max_num_batched_tokens",
                f"{pool.max_num_batched_tokens} is below what {decodes} speculating sequences check; legal is at least "
                f"{least}, or a lower speculation.max_batch",
            )


def _plans(scenario: Scenario) -> Iterator[Problem]:
    plans = scenario.plans
    for name, customer in plans.classes.items():
        yield from _unknown(f"plans.classes.{name}.plan", customer.plan, plans.plans)
        share = scenario.workload.class_share
        if name not in share:
            legal = ", ".join(plans.classes)
            yield "workload.class_share", f"has no share for class {name}; legal is one for each of {legal}"
        yield from _entitlements(scenario, name)
        yield from _allowances(scenario, name)
    tolerant = [name for name, customer in plans.classes.items() if customer.delay_tolerant is not None]
    yield from _batch_endpoints(scenario, tolerant)
    if scenario.fleet.batch_queue is not None and not tolerant:
        yield "fleet.batch_queue", "is there but no class may wait; legal is a class with delay_tolerant, or no queue"
    for name in tolerant:
        customer = plans.classes[name]
        if customer.slo.ttft_s is not None and customer.slo.ttft_s < customer.delay_tolerant.deadline_s:
            limit = customer.delay_tolerant.deadline_s
            yield (
                f"plans.classes.{name}.slo.ttft_s",
                f"{customer.slo.ttft_s} is below the class's deadline; legal is at least {limit} or no TTFT promise",
            )


def _batch_endpoints(scenario: Scenario, tolerant: list[str]) -> Iterator[Problem]:
    """A batch endpoint has somebody to serve, who is owed something for an answer that comes too late."""
    for name, provider in scenario.fleet.providers.items():
        path = f"fleet.providers.{name}.batch_discount"
        if provider.batch_discount is None:
            continue
        if not tolerant:
            yield path, "is there but no class may wait; legal is a class with delay_tolerant, or none"
        for waiting in tolerant:
            entitled = scenario.plans.classes[waiting].entitlements
            uses = entitled.stations is None or name in entitled.stations
            uses = uses and (entitled.tiers is None or provider.tier in entitled.tiers)
            if uses and scenario.plans.classes[waiting].slo.e2e_s is None:
                legal = f"legal is plans.classes.{waiting}.slo.e2e_s with it"
                yield path, f"would let answers to class {waiting} come at any time; {legal}"


def _entitlements(scenario: Scenario, name: str) -> Iterator[Problem]:
    """Somebody must be allowed to answer."""
    fleet, entitled = scenario.fleet, scenario.plans.classes[name].entitlements
    tier_of = {key: item.tier for key, item in (*fleet.pools.items(), *fleet.providers.items())}
    batch = {key for key, item in fleet.providers.items() if item.batch_discount is not None}
    waits = scenario.plans.classes[name].delay_tolerant is not None
    path = f"plans.classes.{name}.entitlements"
    for tier in entitled.tiers or ():
        yield from _unknown(f"{path}.tiers", tier, fleet.tiers)
    for station in entitled.stations or ():
        yield from _unknown(f"{path}.stations", station, tier_of)
    allowed = [
        station
        for station, tier in tier_of.items()
        if (entitled.stations is None or station in entitled.stations)
        and (entitled.tiers is None or tier in entitled.tiers)
        and (waits or station not in batch)
    ]
    if not allowed:
        yield path, "leave no pool or provider; legal is at least one that may answer"


def _allowances(scenario: Scenario, name: str) -> Iterator[Problem]:
    """What is used at the start, and who has something to use."""
    customer = scenario.plans.classes[name]
    low, high = customer.used_at_start
    if high < low:
        yield f"plans.classes.{name}.used_at_start", f"[{low:g}, {high:g}] falls; legal is a second number no lower"
    if customer.limits.burst_requests is not None and customer.limits.requests_per_minute is None:
        yield f"plans.classes.{name}.limits.burst_requests", "has no rate; legal is requests_per_minute with it"


def _workload(scenario: Scenario) -> Iterator[Problem]:
    workload = scenario.workload
    for name in workload.class_share:
        yield from _unknown(f"workload.class_share.{name}", name, scenario.plans.classes)
    for name, shares in workload.class_task_share.items():
        yield from _unknown(f"workload.class_task_share.{name}", name, scenario.plans.classes)
        for task in shares:
            yield from _unknown(f"workload.class_task_share.{name}.{task}", task, workload.tasks)
        if not any(shares.values()):
            yield f"workload.class_task_share.{name}", "has no positive share; legal is at least one"
    for kind in ("prompt_tokens", "output_tokens"):
        if getattr(workload, kind) is None:
            for name, task in workload.tasks.items():
                if getattr(task, kind) is None:
                    yield f"workload.tasks.{name}.{kind}", f"is missing; legal is a mixture here or in workload.{kind}"
    yield from _composition(scenario)
    yield from _verifiers(scenario)
    for name in scenario.plans.workflows:
        yield from _unknown(f"plans.workflows.{name}", name, workload.sessions)
    if workload.intents is not None and workload.recurring.share > 0.0:
        yield "workload.recurring.share", f"{workload.recurring.share} beside intents; legal is 0, or no intents"


def _verifiers(scenario: Scenario) -> Iterator[Problem]:
    """Nobody's answers are looked at twice."""
    classes, tasks = scenario.plans.classes, scenario.workload.tasks
    taken: dict[tuple[str, str], str] = {}
    for name, verifier in scenario.fleet.verifiers.items():
        path = f"fleet.verifiers.{name}"
        for task in verifier.tasks or ():
            yield from _unknown(f"{path}.tasks", task, tasks)
        for customer in verifier.classes or ():
            yield from _unknown(f"{path}.classes", customer, classes)
        for cell in product(verifier.classes or classes, verifier.tasks or tasks):
            if taken.setdefault(cell, name) != name:
                yield path, f"looks at {cell[1]} of class {cell[0]} as {taken[cell]} does; legal is one verifier each"
                break


def _composition(scenario: Scenario) -> Iterator[Problem]:
    workload = scenario.workload
    total = sum(kind.share for kind in workload.sessions.values())
    if total > 1.0 + 1e-6:
        yield "workload.sessions", f"have shares that add up to {total:g}; legal is at most 1"
    for name, kind in workload.sessions.items():
        if kind.task is not None:
            yield from _unknown(f"workload.sessions.{name}.task", kind.task, workload.tasks)
    for name, client in (workload.clients.own if workload.clients else {}).items():
        if client.class_name is not None:
            yield from _unknown(f"workload.clients.own.{name}.class", client.class_name, scenario.plans.classes)
    if workload.jobs is not None:
        yield from _unknown("workload.jobs.class", workload.jobs.class_name, scenario.plans.classes)
    grown = [name for name in ("clients", "sessions", "jobs") if getattr(workload, name)]
    if grown and scenario.requests_per_episode is not None and scenario.trace is None:
        legal = "legal is leaving it out"
        yield "requests_per_episode", f"cannot be kept with {', '.join(grown)}; {legal}"


def _memory(scenario: Scenario) -> Iterator[Problem]:
    """A replica whose KV cache cannot hold the largest request would never finish it."""
    longest = _longest_tokens(scenario)
    for name, pool in scenario.fleet.pools.items():
        held = pool.kv_blocks * pool.block_size_tokens
        drafted = pool.speculation.draft_tokens if pool.speculation else 0
        if held < longest + drafted:
            blocks = -(-(longest + drafted) // pool.block_size_tokens)
            yield (
                f"fleet.pools.{name}.kv_blocks",
                f"{pool.kv_blocks} blocks hold {held} tokens, fewer than the largest request ({longest}); "
                f"legal is at least {blocks}",
            )


def _longest_tokens(scenario: Scenario) -> int:
    """Prompt and output of the largest request that may come."""
    trace = scenario.recorded
    if trace is not None:
        return int((trace.prompt_tokens + trace.output_tokens).max())
    workload = scenario.workload
    total = max((_longest_call(kind) for kind in workload.sessions.values()), default=0)
    for client in workload.clients.own.values() if workload.clients else ():
        parts = (client.prompt_tokens or workload.prompt_tokens, client.output_tokens or workload.output_tokens)
        total = max(total, sum(part.max_tokens for part in parts if part is not None))
    for task in workload.tasks.values():
        parts = (task.prompt_tokens or workload.prompt_tokens, task.output_tokens or workload.output_tokens)
        total = max(total, sum(part.max_tokens for part in parts if part is not None))
    return total


def _longest_call(kind: SessionSection) -> int:
    outputs = [kind.output_tokens, *(step.output_tokens for step in kind.steps.values())]
    return kind.max_prompt_tokens + max(part.max_tokens for part in outputs if part is not None)
