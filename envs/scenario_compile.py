"""From a scenario to what the layers below take: plain numbers, without names, files or price lists."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import numpy as np

from envs.scenario_composition import composition
from envs.scenario_files import locate, read_yaml
from envs.scenario_fleet import FleetSection
from envs.scenario_lengths import LengthSection
from envs.scenario_providers import Provider
from envs.workload.lengths import LengthMixture
from envs.workload.quality import QualityTruth, mean_ability, with_auc
from envs.workload.spec import WorkloadSpec
from marginroute.errors import InputError, nearest

if TYPE_CHECKING:
    from envs.fleet.profile import Profile
    from envs.fleet.spec import FleetSpec
    from envs.scenario import Scenario

Array = np.ndarray[Any, Any]


def with_prices(fleet: FleetSection, place: Callable[..., str]) -> FleetSection:
    """Replaces every provider's `price_of` by the list prices of that model."""
    providers = {name: _priced(item, place("providers", name, "price_of")) for name, item in fleet.providers.items()}
    return fleet.model_copy(update={"providers": providers})


def _priced(provider: Provider, place: str) -> Provider:
    if provider.price_of is None:
        return provider
    price, source = list_price(provider.price_of, place)
    own = provider.cached_input_usd_per_mtok
    update = {
        "price_of": None,
        "price_source": source,
        "input_usd_per_mtok": price[0],
        "output_usd_per_mtok": price[1],
        "cached_input_usd_per_mtok": price[2] if own is None else own,
    }
    return provider.model_copy(update=update)


def list_price(model: str, place: str) -> tuple[tuple[float, float, float | None], str]:
    """USD per million (input, output, cached input) tokens of a public model, lowest context tier, and their source.

    The price of cached input is None where the list has none.
    """
    import genai_prices
    from genai_prices.data_snapshot import get_snapshot

    try:
        provider, info = get_snapshot().find_provider_model(model, None, None, None)
    except LookupError:
        listed = {item.id for source in get_snapshot().providers for item in source.models}
        hint = nearest(model, listed)
        raise InputError(f"{place}: {model!r} is not in genai-prices;{hint} legal is a model it lists") from None
    prices = info.prices if not isinstance(info.prices, list) else info.prices[-1].prices
    listed = (prices.input_mtok, prices.output_mtok, prices.cache_read_mtok)
    usd = [float(getattr(value, "base", value) or 0.0) for value in listed]
    cached = None if prices.cache_read_mtok is None else min(usd[2], usd[0])
    version = getattr(genai_prices, "__version__", "")
    return (usd[0], usd[1], cached), f"{provider.id}/{info.id}, genai-prices {version}".strip()


def with_profiles(fleet: FleetSection, place: Callable[..., str]) -> FleetSection:
    """Fills in the content of every engine profile that a pool names."""
    profiles = dict(fleet.profiles)
    for name, pool in fleet.pools.items():
        if pool.profile not in profiles:
            try:
                profiles[pool.profile] = read_yaml(locate(pool.profile, "profile"))
            except InputError as error:
                raise InputError(f"{place('pools', name, 'profile')}: {error}") from None
        gpus = _profile_gpus(profiles[pool.profile])
        if pool.gpus_per_replica < gpus:
            raise InputError(
                f"{place('pools', name, 'gpus_per_replica')}: {pool.gpus_per_replica} is fewer than profile "
                f"{pool.profile} runs on; legal is at least {gpus}"
            )
    used = {pool.profile for pool in fleet.pools.values()}
    return fleet.model_copy(update={"profiles": {key: profiles[key] for key in profiles if key in used}})


def _profile_gpus(profile: Mapping[str, Any]) -> int:
    """GPUs that one engine of a profile spans (tensor parallel), as far as its file says so."""
    memory = profile.get("kv_cache")
    gpus = memory.get("gpus") if isinstance(memory, Mapping) else None
    return gpus if isinstance(gpus, int) else 1


@lru_cache(maxsize=64)
def _compact(name: str, content: str) -> Profile:
    """An engine profile from its content as JSON; once for all members of a family."""
    from envs.fleet.profile import compact_profile

    return compact_profile(name, json.loads(content))


def fleet_spec(scenario: Scenario) -> FleetSpec:
    """The engine's fleet."""
    from envs.fleet.spec import FleetSpec, PoolSpec, ProviderSpec
    from envs.fleet.speculation import Speculation
    from envs.fleet.state import NO_CAP

    fleet, tiers = scenario.fleet, scenario.tier_names
    pools = tuple(
        PoolSpec(
            name=name,
            profile=_compact(pool.profile, json.dumps(fleet.profiles[pool.profile])),
            replicas=pool.replicas,
            tier=tiers.index(pool.tier),
            kv_blocks=pool.kv_blocks,
            block_size_tokens=pool.block_size_tokens,
            max_num_seqs=pool.max_num_seqs,
            max_num_batched_tokens=pool.max_num_batched_tokens,
            scheduler=pool.scheduler,
            scheduling_policy=pool.scheduling_policy,
            speculation=Speculation(**pool.speculation.model_dump(exclude_none=True)) if pool.speculation else None,
            in_flight_cap=pool.in_flight_cap or NO_CAP,
            watermark_share=pool.watermark_share,
            prefix_caching=pool.prefix_caching,
            max_replicas=pool.max_replicas or 0,
            min_replicas=pool.min_replicas,
            reserved_replicas=pool.reserved_replicas,
            spot_replicas=pool.spot.replicas if pool.spot else 0,
            notice_s=pool.spot.notice_s if pool.spot else 0.0,
            provision_s=pool.provision_s,
            load_s=pool.load_s,
            paid_from_load=pool.paid_from == "load",
            detect_s=pool.detect_s,
            connection_errors=pool.connection_errors,
        )
        for name, pool in fleet.pools.items()
    )
    providers = tuple(
        ProviderSpec(
            name=name,
            tier=tiers.index(item.tier),
            ttft_s=item.ttft_median_s,
            ttft_sigma=item.ttft_sigma,
            tpot_s=item.tpot_median_s,
            tpot_sigma=item.tpot_sigma,
            requests_per_minute=item.requests_per_minute,
            burst_requests=item.burst_requests,
            tokens_per_minute=item.tokens_per_minute or math.inf,
            burst_tokens=item.burst_tokens,
            error_after_s=item.error_after_s,
        )
        for name, item in fleet.providers.items()
    )
    return FleetSpec(pools, providers, fleet.telemetry.scrape_interval_s)


def workload_spec(scenario: Scenario) -> WorkloadSpec:
    """The workload's distributions as plain numbers; shares are rescaled to add up to 1."""
    workload, classes = scenario.workload, scenario.plans.classes
    class_share = _normalised([workload.class_share[name] for name in classes])
    task_share = [_task_share(scenario, name) for name in classes]
    prompt = _mixtures(scenario, "prompt_tokens")
    output = _mixtures(scenario, "output_tokens")
    patience = [customer.patience for customer in classes.values()]
    count = scenario.requests_per_episode
    deadlines = [customer.delay_tolerant for customer in classes.values()]
    return WorkloadSpec(
        arrivals=workload.arrivals.build().scaled(scenario.load_scale),
        horizon_s=scenario.horizon_s,
        requests_per_episode=None if count is None else max(1, round(count * scenario.load_scale)),
        class_share=class_share,
        task_share=tuple(task_share),
        tenants=tuple(customer.tenants for customer in classes.values()),
        tenant_exponent=workload.tenant_zipf_exponent,
        prompt_lengths=prompt,
        output_lengths=output,
        patience_median_s=tuple(item.median_s if item else math.inf for item in patience),
        patience_sigma=tuple(item.sigma if item else 0.0 for item in patience),
        deadline_s=tuple(item.deadline_s if item else math.inf for item in deadlines),
        recurring_share=workload.recurring.share,
        recurring_prompts=workload.recurring.prompts_per_tenant,
        recurring_exponent=workload.recurring.zipf_exponent,
        quality=_quality(scenario, np.array(class_share) @ np.array(task_share)),
        composition=composition(scenario, class_share),
        intents=workload.intents.build() if workload.intents else None,
        reuse=tuple(task.reuse.build() for task in workload.tasks.values()) if workload.intents else (),
        judged_share=workload.feedback.share if workload.feedback else 0.0,
        attempts=max((item.max_attempts for item in scenario.fleet.verifiers.values()), default=0),
    )


def _normalised(weights: list[float]) -> tuple[float, ...]:
    total = math.fsum(weights)
    return tuple(weight / total for weight in weights)


def _task_share(scenario: Scenario, class_name: str) -> tuple[float, ...]:
    own = scenario.workload.class_task_share.get(class_name)
    tasks = scenario.workload.tasks.items()
    return _normalised([own.get(name, 0.0) if own else task.share for name, task in tasks])


def _mixtures(scenario: Scenario, kind: str) -> tuple[LengthMixture, ...]:
    """(J,) mixtures; tasks without one of their own share one object."""
    default: LengthSection | None = getattr(scenario.workload, kind)
    common = default.build() if default else None
    own = [getattr(task, kind) for task in scenario.workload.tasks.values()]
    return tuple(section.build() if section else common for section in own)


def _quality(scenario: Scenario, task_share: Array) -> QualityTruth:
    tiers, difficulty = [tier.quality for tier in scenario.fleet.tiers.values()], scenario.workload.difficulty
    ability = [tuple(tier.ability[task] for task in scenario.task_names) for tier in tiers]
    loadings = tuple(tier.loadings for tier in tiers) if tiers[0].loadings else ()
    own = [task.nobody_can_share for task in scenario.workload.tasks.values()]
    nobody, task_nobody, able_share = difficulty.nobody_can_share, (), task_share
    if any(share is not None for share in own):
        task_nobody = tuple(nobody if share is None else share for share in own)
        nobody = float(task_share @ np.array(task_nobody))
        able_share = task_share * (1.0 - np.array(task_nobody)) / (1.0 - nobody)
    prior = [
        mean_ability(np.array(mine), tier.slope, able_share, sum(x * x for x in tier.loadings))
        if tier.prior_ability is None
        else tier.prior_ability
        for tier, mine in zip(tiers, ability, strict=True)
    ]
    truth = QualityTruth(
        ability=tuple(ability),
        slope=tuple(tier.slope for tier in tiers),
        prior_ability=tuple(prior),
        nobody_can_share=nobody,
        signal_correlation=difficulty.signal_correlation or 1.0,
        loadings=loadings,
        task_nobody_can=task_nobody,
        independent_luck=difficulty.luck == "independent",
    )
    if difficulty.signal_auc is None:
        return truth
    try:
        return with_auc(truth, task_share, difficulty.signal_auc)
    except InputError as error:
        raise InputError(f"workload.difficulty.signal_auc: {error}") from None
